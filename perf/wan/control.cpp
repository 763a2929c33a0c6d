// SPDX-License-Identifier: Apache-2.0
#include "perf/wan/control.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace vmferry::wan {
namespace {

constexpr size_t kLineSizeMax = 4096;
constexpr size_t kClientCountMax = 16;
constexpr time_t kCallTimeoutSeconds = 5;

Result<sockaddr_un> unix_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return fail(ErrorKind::InvalidArgument, "control socket path '{}' is empty or longer than {} bytes", path,
                sizeof(address.sun_path) - 1);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

}  // namespace

Result<ControlServer> ControlServer::listen(const std::string& path) {
  const Result<sockaddr_un> address = unix_address(path);
  if (!address) return tl::unexpected(address.error());
  struct stat existing {};
  if (lstat(path.c_str(), &existing) == 0) {
    if (!S_ISSOCK(existing.st_mode)) {
      return fail(ErrorKind::Exists, "control socket '{}': a file of another kind is there", path);
    }
    unlink(path.c_str());
  }
  Fd listener(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const mode_t umask_before = umask(0177);
  const int bound = bind(listener.get(), reinterpret_cast<const sockaddr*>(&*address), sizeof(*address));
  const int bind_error = errno;
  umask(umask_before);
  if (bound != 0) return fail(ErrorKind::Io, "control socket '{}': {}", path, errno_text(bind_error));
  ControlServer server(path, std::move(listener));
  if (::listen(server.listener_.get(), kClientCountMax) != 0) {
    return fail(ErrorKind::Io, "control socket '{}': {}", path, errno_text(errno));
  }
  return server;
}

ControlServer::ControlServer(ControlServer&& other) noexcept
    : path_(std::exchange(other.path_, {})),
      listener_(std::move(other.listener_)),
      clients_(std::move(other.clients_)) {}

ControlServer::~ControlServer() {
  if (!path_.empty()) unlink(path_.c_str());
}

void ControlServer::append_polls(std::vector<pollfd>& polls) const {
  polls.push_back({.fd = listener_.get(), .events = POLLIN, .revents = 0});
  for (const Client& client : clients_) polls.push_back({.fd = client.socket.get(), .events = POLLIN, .revents = 0});
}

void ControlServer::serve(const Handler& handler) {
  std::erase_if(clients_, [&handler](Client& client) { return !serve_client(client, handler); });
  for (;;) {
    Fd accepted(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (accepted.get() < 0) return;
    // The newest is turned away: a harness that leaks connections notices at once.
    if (clients_.size() < kClientCountMax) clients_.push_back({.socket = std::move(accepted), .pending = {}});
  }
}

// False when the client is to be disconnected.
bool ControlServer::serve_client(Client& client, const Handler& handler) {
  std::array<char, kLineSizeMax> buffer;
  const ssize_t received = recv(client.socket.get(), buffer.data(), buffer.size(), 0);
  if (received < 0) return errno == EAGAIN || errno == EINTR;
  if (received == 0) return false;
  client.pending.append(buffer.data(), static_cast<size_t>(received));
  for (size_t end = client.pending.find('\n'); end != std::string::npos; end = client.pending.find('\n')) {
    const std::string answer = handler(std::string_view(client.pending).substr(0, end)) + "\n";
    client.pending.erase(0, end + 1);
    const ssize_t sent = send(client.socket.get(), answer.data(), answer.size(), MSG_NOSIGNAL);
    if (sent != static_cast<ssize_t>(answer.size())) return false;
  }
  return client.pending.size() < kLineSizeMax;
}

Result<std::string> call_control(const std::string& path, std::string_view command) {
  const Result<sockaddr_un> address = unix_address(path);
  if (!address) return tl::unexpected(address.error());
  const Fd socket_fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval timeout{.tv_sec = kCallTimeoutSeconds, .tv_usec = 0};
  setsockopt(socket_fd.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  setsockopt(socket_fd.get(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  if (connect(socket_fd.get(), reinterpret_cast<const sockaddr*>(&*address), sizeof(*address)) != 0) {
    return fail(ErrorKind::Unavailable, "connect to '{}': {}", path, errno_text(errno));
  }
  const std::string line = std::string(command) + "\n";
  if (send(socket_fd.get(), line.data(), line.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(line.size())) {
    return fail(ErrorKind::Unavailable, "send to '{}': {}", path, errno_text(errno));
  }
  std::string answer;
  std::array<char, kLineSizeMax> buffer;
  while (!answer.ends_with('\n')) {
    const ssize_t received = recv(socket_fd.get(), buffer.data(), buffer.size(), 0);
    if (received <= 0) {
      return fail(ErrorKind::Unavailable, "no answer from '{}': {}", path,
                  received == 0 ? "connection closed" : errno_text(errno));
    }
    answer.append(buffer.data(), static_cast<size_t>(received));
  }
  answer.pop_back();
  return answer;
}

}  // namespace vmferry::wan
