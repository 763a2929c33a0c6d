// SPDX-License-Identifier: Apache-2.0
//
// What PeerService keeps per connection that is not yet a peer's, and per `peer join` under way. Only for the sources
// of PeerService. Threads: the executor's thread.
#pragma once

#include "engine/replicate/peer_service.h"

namespace vmferry {

// An accepted connection until it has said what it wants.
class PeerService::Stranger final : private PeerConnectionHandler {
 public:
  Stranger(PeerService& service, uint64_t id, std::unique_ptr<PeerConnection> made)
      : connection(std::move(made)), service_(service), id_(id), timeout_(service.executor_) {
    timeout_.start(service.options_.first_message_timeout, [this] {
      service_.stranger_closed(id_, {ErrorKind::Timeout, "said nothing in time"});
    });
  }
  void begin() { connection->set_handler(*this); }
  void stop_timeout() { timeout_.cancel(); }

  std::unique_ptr<PeerConnection> connection;
  bool answering = false;  // its request is being made durable; further messages are not welcome

 private:
  void connection_established() override {}
  void connection_message(MessageType type, ByteSpan payload) override {
    service_.stranger_message(id_, type, payload);  // may destroy this
  }
  void connection_writable() override {}
  void connection_closed(const Error& error) override { service_.stranger_closed(id_, error); }

  PeerService& service_;
  uint64_t id_;
  Timer timeout_;
};

struct PeerService::Join {
  JoinOptions options;
  PairingToken token{};
  size_t next_address = 0;
  std::string failures{};  // of the addresses tried so far
  std::unique_ptr<PeerDial> dial{};
  std::function<void(Result<JoinOutcome>)> done{};
};

}  // namespace vmferry
