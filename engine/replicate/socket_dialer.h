// SPDX-License-Identifier: Apache-2.0
//
// The real Dialer: TCP through the reactor. Also the one place that knows which socket options a link to a peer wants.
// Threads: the reactor's.
#pragma once

#include <list>

#include "engine/replicate/dialer.h"
#include "engine/runtime/connector.h"

namespace vmferry {

// For the listener of peers as well. Little unsent in the kernel, so that a control message waits for little; BBR where
// the kernel has it, because random loss must not halve the rate.
SocketOptions peer_socket_options();

class SocketDialer final : public Dialer {
 public:
  explicit SocketDialer(Reactor& reactor) : reactor_(reactor) {}
  void connect(const std::string& address, Done done) override;

 private:
  struct Attempt {
    explicit Attempt(Reactor& reactor) : connector(reactor) {}
    Connector connector;
    Done done;
  };
  Reactor& reactor_;
  std::list<Attempt> attempts_;  // bounded by the callers: one per link, each with a timeout
};

}  // namespace vmferry
