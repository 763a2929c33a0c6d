// SPDX-License-Identifier: Apache-2.0
//
// Where a socket listens or connects to: "unix:PATH", "tcp:HOST:PORT", "HOST:PORT", "[IPV6]:PORT".
// Threads: values; resolve() blocks and belongs on a worker or at start.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/base/result.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

struct Endpoint {
  bool is_unix = false;
  std::string path{};  // unix; at most 107 bytes
  std::string host{};  // tcp; a name or an address without brackets, "" = every address (listening only)
  uint16_t port = 0;   // tcp; 0 = any (listening only)

  static Result<Endpoint> parse(std::string_view text);
  std::string to_string() const;  // what parse() takes
  // True for unix sockets and 127.0.0.0/8, ::1, "localhost".
  bool is_loopback() const;
};

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
  std::string to_string() const;
  uint16_t port() const;
  void set_port(uint16_t port);
};

// What a socket is bound to: an absolute path or a TCP address, so that a client can be told it. InvalidArgument for
// everything else, abstract unix sockets among them.
Result<Endpoint> local_address(int fd);

enum class ResolveFor : uint8_t { Connect, Listen };
// Every address of the endpoint, in the order to try.
Result<std::vector<SocketAddress>> resolve(const Endpoint& endpoint, ResolveFor purpose);

struct PeerCredentials {
  int32_t pid = 0;
  uint32_t uid = 0;
  uint32_t gid = 0;
};
// Of a connected unix socket: who called connect() or listen().
Result<PeerCredentials> peer_credentials(int fd);

struct SocketPair {
  UniqueFd first;  // both non-blocking, close-on-exec
  UniqueFd second;
};
Result<SocketPair> make_socket_pair();

}  // namespace vmferry
