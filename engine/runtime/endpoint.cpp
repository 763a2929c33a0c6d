// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/endpoint.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>

namespace vmferry {

namespace {

constexpr size_t kUnixPathSizeMax = sizeof(sockaddr_un{}.sun_path) - 1;

SocketAddress unix_address(const std::string& path) {
  SocketAddress address;
  auto* un = reinterpret_cast<sockaddr_un*>(&address.storage);
  un->sun_family = AF_UNIX;
  std::memcpy(un->sun_path, path.c_str(), path.size() + 1);
  address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + 1);
  return address;
}

}  // namespace

Result<Endpoint> Endpoint::parse(std::string_view text) {
  Endpoint endpoint;
  if (text.starts_with("unix:")) {
    endpoint.is_unix = true;
    endpoint.path = text.substr(5);
    if (endpoint.path.empty() || endpoint.path.find('\0') != std::string::npos)
      return fail(ErrorKind::InvalidArgument, "'{}' has no path after 'unix:'", text);
    if (endpoint.path.size() > kUnixPathSizeMax)
      return fail(ErrorKind::InvalidArgument, "'{}': a unix socket's path has at most {} bytes", text,
                  kUnixPathSizeMax);
    return endpoint;
  }
  std::string_view rest = text;
  if (rest.starts_with("tcp:")) rest.remove_prefix(4);
  const size_t colon = rest.rfind(':');
  if (colon == std::string_view::npos)
    return fail(ErrorKind::InvalidArgument, "'{}' is neither unix:PATH nor HOST:PORT", text);
  std::string_view host = rest.substr(0, colon);
  const std::string_view port = rest.substr(colon + 1);
  if (host.starts_with('[') && host.ends_with(']') && host.size() > 2) {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string_view::npos) {
    return fail(ErrorKind::InvalidArgument, "'{}': write an IPv6 address as [ADDRESS]:PORT", text);
  }
  unsigned number = 0;
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), number);
  if (port.empty() || error != std::errc{} || end != port.data() + port.size() || number > 65535)
    return fail(ErrorKind::InvalidArgument, "'{}': '{}' is not a port number", text, port);
  if (host.find('\0') != std::string_view::npos || host.size() > 253)
    return fail(ErrorKind::InvalidArgument, "'{}': not a host name", text);
  endpoint.host = host;
  endpoint.port = static_cast<uint16_t>(number);
  return endpoint;
}

std::string Endpoint::to_string() const {
  if (is_unix) return "unix:" + path;
  if (host.find(':') != std::string::npos) return fmt::format("[{}]:{}", host, port);
  return fmt::format("{}:{}", host, port);
}

bool Endpoint::is_loopback() const {
  if (is_unix || host == "localhost") return true;
  in_addr v4{};
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6{};
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

std::string SocketAddress::to_string() const {
  char text[INET6_ADDRSTRLEN] = "?";
  if (family() == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(&storage)->sin_addr, text, sizeof text);
    return fmt::format("{}:{}", text, port());
  }
  if (family() == AF_INET6) {
    inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_addr, text, sizeof text);
    return fmt::format("[{}]:{}", text, port());
  }
  if (family() == AF_UNIX && size > offsetof(sockaddr_un, sun_path))
    return fmt::format("unix:{}", reinterpret_cast<const sockaddr_un*>(&storage)->sun_path);
  return "unix:";
}

uint16_t SocketAddress::port() const {
  if (family() == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in*>(&storage)->sin_port);
  if (family() == AF_INET6) return ntohs(reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port);
  return 0;
}

void SocketAddress::set_port(uint16_t port) {
  if (family() == AF_INET) reinterpret_cast<sockaddr_in*>(&storage)->sin_port = htons(port);
  if (family() == AF_INET6) reinterpret_cast<sockaddr_in6*>(&storage)->sin6_port = htons(port);
}

Result<Endpoint> local_address(int fd) {
  SocketAddress address;
  address.size = sizeof address.storage;
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&address.storage), &address.size) != 0)
    return fail(ErrorKind::InvalidArgument, "its address: {}", errno_text(errno));
  if (address.family() == AF_INET || address.family() == AF_INET6) return Endpoint::parse(address.to_string());
  if (address.family() != AF_UNIX) return fail(ErrorKind::InvalidArgument, "it is neither a unix nor a TCP socket");
  // An unnamed or abstract one has no path, or one that begins with NUL; the kernel ends a path with NUL if it fits.
  if (address.size <= offsetof(sockaddr_un, sun_path) ||
      reinterpret_cast<const sockaddr_un*>(&address.storage)->sun_path[0] != '/')
    return fail(ErrorKind::InvalidArgument, "it is a unix socket without an absolute path");
  return Endpoint::parse(address.to_string());
}

Result<std::vector<SocketAddress>> resolve(const Endpoint& endpoint, ResolveFor purpose) {
  if (endpoint.is_unix) return std::vector<SocketAddress>{unix_address(endpoint.path)};
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (purpose == ResolveFor::Listen ? AI_PASSIVE : 0);
  addrinfo* list = nullptr;
  const std::string port = std::to_string(endpoint.port);
  const int error = getaddrinfo(endpoint.host.empty() ? nullptr : endpoint.host.c_str(), port.c_str(), &hints, &list);
  if (error != 0)
    return fail(error == EAI_AGAIN ? ErrorKind::Unavailable : ErrorKind::NotFound, "resolve '{}': {}", endpoint.host,
                gai_strerror(error));
  std::vector<SocketAddress> addresses;
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    if (entry->ai_addrlen > sizeof(sockaddr_storage)) continue;
    SocketAddress address;
    std::memcpy(&address.storage, entry->ai_addr, entry->ai_addrlen);
    address.size = entry->ai_addrlen;
    addresses.push_back(address);
  }
  freeaddrinfo(list);
  if (addresses.empty()) return fail(ErrorKind::NotFound, "resolve '{}': no address", endpoint.host);
  return addresses;
}

Result<PeerCredentials> peer_credentials(int fd) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0)
    return fail(ErrorKind::Internal, "SO_PEERCRED: {}", errno_text(errno));
  return PeerCredentials{credentials.pid, credentials.uid, credentials.gid};
}

Result<SocketPair> make_socket_pair() {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0)
    return fail(ErrorKind::LimitExceeded, "socketpair: {}", errno_text(errno));
  return SocketPair{UniqueFd(fds[0]), UniqueFd(fds[1])};
}

}  // namespace vmferry
