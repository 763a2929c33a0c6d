// SPDX-License-Identifier: Apache-2.0
//
// One attempt to reach a peer: connect, TLS, check that the key is the pinned one, send a first message, wait for the
// first answer. Used by PeerLink (Hello) and by `peer join` (JoinRequest).
// Threads: the executor's thread. Destroying it gives the attempt up; `done` then never runs.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "engine/replicate/dialer.h"
#include "engine/replicate/peer_connection.h"

namespace vmferry {

struct PeerDialOptions {
  std::string address{};
  KeyHash pinned_key{};
  Nanoseconds connect_timeout = 3 * kSecond;  // short: a SYN lost in a cut is repeated by a fresh attempt
  Nanoseconds answer_timeout = 5 * kSecond;   // TLS handshake and first answer
};

class PeerDial final : private PeerConnectionHandler {
 public:
  struct FirstMessage {
    MessageType type;
    Bytes payload{};
  };
  // The connection with its first answer; the receiver sets its own handler.
  struct Answer {
    std::unique_ptr<PeerConnection> connection;
    MessageType type;
    ByteSpan payload;  // during the call
  };
  using MakeFirst = std::function<Result<FirstMessage>(const PeerConnection&)>;
  using Done = std::function<void(Result<Answer>)>;

  // `done` runs once, never inside the constructor, and may destroy this object.
  PeerDial(Executor& executor, Dialer& dialer, const TlsIdentity& identity, PeerDialOptions options,
           MakeFirst make_first, Done done);
  ~PeerDial();

  // True once the peer may act on what we sent: from then on giving up could leave it with half a connection.
  bool first_message_sent() const { return first_sent_; }

 private:
  void connected(Result<std::unique_ptr<ByteStream>> stream);
  void connection_established() override;
  void connection_message(MessageType type, ByteSpan payload) override;
  void connection_writable() override {}
  void connection_closed(const Error& error) override;
  void finish(const Error& error);

  Executor& executor_;
  const TlsIdentity& identity_;
  PeerDialOptions options_;
  MakeFirst make_first_;
  Done done_;
  bool first_sent_ = false;
  std::unique_ptr<PeerConnection> connection_;
  Timer timeout_;
  Alive alive_;
};

}  // namespace vmferry
