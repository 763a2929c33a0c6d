// SPDX-License-Identifier: Apache-2.0
//
// Opens connections: resolves on a worker, tries each address in turn, gives up at the timeout.
// Threads: the reactor's. Destroying the Connector cancels; `done` then never runs.
#pragma once

#include "engine/runtime/socket_stream.h"

namespace vmferry {

struct ConnectOptions {
  Nanoseconds timeout = 10 * kSecond;  // for all addresses together
  SocketOptions socket{};
};

class Connector {
 public:
  using Done = std::function<void(Result<std::unique_ptr<SocketStream>>)>;

  explicit Connector(Reactor& reactor) : reactor_(reactor), timeout_(reactor) {}
  ~Connector() { cancel(); }
  Connector(const Connector&) = delete;
  Connector& operator=(const Connector&) = delete;

  // `done` runs once, never inline, and may destroy or restart this Connector. A connect under way is cancelled.
  void connect(const Endpoint& endpoint, const ConnectOptions& options, Done done);
  void cancel();
  bool busy() const { return done_ != nullptr; }

 private:
  void resolved(Result<std::vector<SocketAddress>> addresses);
  void try_next();
  void connected();
  void finish(Result<std::unique_ptr<SocketStream>> result);

  Reactor& reactor_;
  Endpoint endpoint_;
  ConnectOptions options_;
  Done done_;
  std::vector<SocketAddress> addresses_;
  size_t next_ = 0;
  UniqueFd fd_;
  WatchId watch_ = 0;
  Timer timeout_;
  Errno last_error_ = 0;
  uint64_t generation_ = 0;  // answers of the resolver for an earlier connect() are dropped
  Alive alive_;
};

}  // namespace vmferry
