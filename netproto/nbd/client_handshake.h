// SPDX-License-Identifier: Apache-2.0
//
// The client's side of the NBD handshake (fixed newstyle, NBD_OPT_GO), for sockets that are handed to the kernel.
//
// Nothing optional is negotiated, because Linux's nbd.ko knows simple replies only. Bytes in, bytes out; at the end the
// socket is in the transmission phase and nothing of it has been read. The server is ours, its bytes are checked all
// the same (I11): what comes out of here becomes a block device.
// Source of truth: proto.md "Handshake phase". Threads: none of its own; one owner.
#pragma once

#include <cstdint>
#include <string>

#include "netproto/nbd/wire.h"

namespace vmferry::nbd {

// NBD_INFO_EXPORT.
struct ExportFacts {
  uint64_t size = 0;   // bytes
  uint16_t flags = 0;  // TransmissionFlag
};

class ClientHandshake {
 public:
  enum class State : uint8_t {
    Greeting,     // the server speaks first
    ReplyHeader,  // GO was sent
    ReplyData,
    Transmission,  // facts() holds
    Failed,        // reason() says why; close the socket
  };

  static constexpr size_t kReplySizeMax = 16U << 10;  // no reply that we can get is longer
  static constexpr uint32_t kReplyCountMax = 64;      // a server that goes on longer is dropped

  explicit ClientHandshake(std::string export_name);  // at most kStringSizeMax bytes

  // Consumes bytes and appends what the server is to be told. Returns how many were consumed: all, unless the state
  // became final.
  size_t feed(ByteSpan bytes, Bytes& out);

  State state() const { return state_; }
  bool is_final() const { return state_ == State::Transmission || state_ == State::Failed; }
  const ExportFacts& facts() const { return facts_; }
  const std::string& reason() const { return reason_; }

 private:
  void on_greeting(Bytes& out);
  void on_reply_header();
  void on_reply();
  void on_info();
  void fail(std::string reason);
  void expect(State state, size_t size);

  const std::string export_name_;
  State state_ = State::Greeting;
  Bytes pending_;  // an incomplete element, at most kReplySizeMax bytes
  size_t wanted_ = kGreetingSize;
  uint32_t reply_type_ = 0;
  uint32_t reply_count_ = 0;
  bool facts_known_ = false;
  ExportFacts facts_;
  std::string reason_;
};

}  // namespace vmferry::nbd
