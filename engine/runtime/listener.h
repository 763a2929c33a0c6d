// SPDX-License-Identifier: Apache-2.0
//
// Accepts connections on a unix or TCP socket.
//
// A left-over unix socket is removed only when nobody accepts on it. Out of descriptors, accepting pauses for 100 ms
// instead of spinning. Threads: the reactor's; the listener may be destroyed inside the callback.
#pragma once

#include <sys/types.h>

#include <optional>

#include "engine/runtime/socket_stream.h"

namespace vmferry {

struct ListenOptions {
  int backlog = 128;
  mode_t mode = 0600;  // unix sockets; the file never has more, not even for a moment
  std::optional<uid_t> owner{};
  std::optional<gid_t> group{};
  SocketOptions socket{};
};

class Listener {
 public:
  using Accepted = std::function<void(std::unique_ptr<SocketStream>)>;

  static Result<std::unique_ptr<Listener>> create(Reactor& reactor, const Endpoint& endpoint,
                                                  const ListenOptions& options, Accepted accepted);
  // On a socket that somebody else made and listens already, as service managers do: it stays theirs, and its file, if
  // it has one, stays there. `address` is what it is bound to. Of the options only `socket` counts.
  static std::unique_ptr<Listener> adopt(Reactor& reactor, UniqueFd listening, const Endpoint& address,
                                         const ListenOptions& options, Accepted accepted);
  ~Listener();  // stops accepting and removes the unix socket that it made

  Endpoint local() const { return local_; }  // with the real port when 0 was asked
  void pause(bool paused);                   // connections then wait in the backlog

 private:
  Listener(Reactor& reactor, const ListenOptions& options, Accepted accepted);
  Status listen_on(const SocketAddress& address);
  void start();
  void accept_some(int fd);
  void back_off(Errno error);
  void update();

  Reactor& reactor_;
  ListenOptions options_;
  Accepted accepted_;
  Endpoint local_;
  std::vector<UniqueFd> fds_;
  std::vector<WatchId> watches_;
  ino_t socket_inode_ = 0;  // of the unix socket we made; 0 = none
  bool paused_ = false;
  Timer back_off_;
  Alive alive_;
};

}  // namespace vmferry
