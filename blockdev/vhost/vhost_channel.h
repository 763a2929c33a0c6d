// SPDX-License-Identifier: Apache-2.0
//
// The control socket of a vhost-user connection: whole messages with their descriptors in, replies out.
//
// Reads exactly a header and then exactly its payload, so that descriptors can be told apart by message. A front-end
// that does not take its replies is dropped: they are few and small. Threads: the reactor's.
#pragma once

#include <functional>
#include <vector>

#include "engine/runtime/reactor.h"
#include "netproto/vhost/message.h"

namespace vmferry {

struct VhostPacket {
  vhost::Header header;
  Bytes payload;
  std::vector<UniqueFd> fds;
};

class VhostChannel {
 public:
  using Received = std::function<void(VhostPacket)>;
  using Closed = std::function<void(const Error&)>;  // once, last; may destroy the channel

  VhostChannel(Reactor& reactor, UniqueFd socket, Received received, Closed closed);
  ~VhostChannel();
  VhostChannel(const VhostChannel&) = delete;
  VhostChannel& operator=(const VhostChannel&) = delete;

  void send(ByteSpan bytes, int fd = -1);
  void pause(bool paused);  // messages then wait in the socket

 private:
  void ready();
  bool read_some();  // false: nothing more now, or closed
  void deliver();
  void close(const Error& why);

  Reactor& reactor_;
  UniqueFd socket_;
  Received received_;
  Closed closed_;
  WatchId watch_ = 0;
  bool paused_ = false;
  bool header_known_ = false;
  VhostPacket packet_;
  Bytes bytes_;        // of the header, then of the payload
  size_t filled_ = 0;  // of bytes_
  Alive alive_;
};

}  // namespace vmferry
