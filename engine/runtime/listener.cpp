// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/listener.h"

#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/stat.h>

#include <cerrno>

#include "engine/base/log.h"

namespace vmferry {

namespace {

constexpr int kAcceptsPerRound = 16;
constexpr Nanoseconds kBackOff = 100 * kMillisecond;

// Removes `path` when it is a socket on which nobody accepts.
Status remove_stale_socket(const std::string& path, const SocketAddress& address) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) return {};
  if (!S_ISSOCK(info.st_mode)) return fail(ErrorKind::Exists, "listen on unix:{}: a file of that name exists", path);
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!probe.valid()) return fail(ErrorKind::LimitExceeded, "socket: {}", errno_text(errno));
  // Only ECONNREFUSED proves that it is dead; EAGAIN is a full backlog.
  if (::connect(probe.get(), address.get(), address.size) == 0 || errno != ECONNREFUSED)
    return fail(ErrorKind::Busy, "listen on unix:{}: another process accepts there", path);
  if (::unlink(path.c_str()) != 0 && errno != ENOENT)
    return fail(ErrorKind::Denied, "remove stale socket {}: {}", path, errno_text(errno));
  return {};
}

}  // namespace

Result<std::unique_ptr<Listener>> Listener::create(Reactor& reactor, const Endpoint& endpoint,
                                                   const ListenOptions& options, Accepted accepted) {
  auto addresses = resolve(endpoint, ResolveFor::Listen);
  if (!addresses) return tl::unexpected(addresses.error());
  std::unique_ptr<Listener> listener(new Listener(reactor, options, std::move(accepted)));
  listener->local_ = endpoint;
  Status status;
  for (SocketAddress& address : *addresses) {
    // With port 0 every address gets the port that the first one was given.
    if (!endpoint.is_unix) address.set_port(listener->local_.port);
    Status one = listener->listen_on(address);
    if (!one && status) status = one;
  }
  // A host without IPv6 may still resolve to ::1; one address that works is enough.
  if (listener->fds_.empty()) return tl::unexpected(status.error());
  listener->start();
  return listener;
}

std::unique_ptr<Listener> Listener::adopt(Reactor& reactor, UniqueFd listening, const Endpoint& address,
                                          const ListenOptions& options, Accepted accepted) {
  std::unique_ptr<Listener> listener(new Listener(reactor, options, std::move(accepted)));
  listener->local_ = address;
  listener->fds_.push_back(std::move(listening));
  listener->start();
  return listener;
}

Listener::Listener(Reactor& reactor, const ListenOptions& options, Accepted accepted)
    : reactor_(reactor), options_(options), accepted_(std::move(accepted)), back_off_(reactor) {}

Listener::~Listener() {
  for (const WatchId watch : watches_) reactor_.unwatch(watch);
  struct stat info {};
  if (socket_inode_ != 0 && ::lstat(local_.path.c_str(), &info) == 0 && info.st_ino == socket_inode_)
    ::unlink(local_.path.c_str());
}

Status Listener::listen_on(const SocketAddress& address) {
  UniqueFd fd(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return fail(ErrorKind::LimitExceeded, "socket: {}", errno_text(errno));
  const bool is_unix = address.family() == AF_UNIX;
  const int one = 1;
  mode_t umask_before = 0;
  if (is_unix) {
    if (Status status = remove_stale_socket(local_.path, address); !status) return status;
    umask_before = ::umask(0777 & ~options_.mode);
  } else {
    setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (address.family() == AF_INET6) setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
  }
  const int bound = ::bind(fd.get(), address.get(), address.size);
  const Errno bind_error = errno;
  if (is_unix) ::umask(umask_before);
  if (bound != 0) {
    return fail(bind_error == EADDRINUSE ? ErrorKind::Busy : ErrorKind::Denied, "listen on {}: {}", local_.to_string(),
                errno_text(bind_error));
  }
  if (is_unix) {
    struct stat info {};
    if (::lstat(local_.path.c_str(), &info) == 0) socket_inode_ = info.st_ino;
    if ((options_.owner || options_.group) &&
        ::lchown(local_.path.c_str(), options_.owner.value_or(static_cast<uid_t>(-1)),
                 options_.group.value_or(static_cast<gid_t>(-1))) != 0)
      return fail(ErrorKind::Denied, "change the owner of {}: {}", local_.path, errno_text(errno));
  }
  if (::listen(fd.get(), options_.backlog) != 0)
    return fail(ErrorKind::Busy, "listen on {}: {}", local_.to_string(), errno_text(errno));
  if (!is_unix && local_.port == 0) {
    SocketAddress actual;
    actual.size = sizeof actual.storage;
    getsockname(fd.get(), reinterpret_cast<sockaddr*>(&actual.storage), &actual.size);
    local_.port = actual.port();
  }
  fds_.push_back(std::move(fd));
  return {};
}

void Listener::start() {
  for (const UniqueFd& fd : fds_)
    watches_.push_back(reactor_.watch(fd.get(), EPOLLIN, [this, raw = fd.get()](uint32_t) { accept_some(raw); }));
}

void Listener::pause(bool paused) {
  paused_ = paused;
  update();
}

void Listener::update() {
  for (const WatchId watch : watches_)
    reactor_.set_events(watch, paused_ || back_off_.running() ? 0U : static_cast<uint32_t>(EPOLLIN));
}

void Listener::accept_some(int fd) {
  const auto alive = alive_.token();
  for (int i = 0; i < kAcceptsPerRound && !paused_; ++i) {
    SocketAddress peer;
    peer.size = sizeof peer.storage;
    UniqueFd connection(
        ::accept4(fd, reinterpret_cast<sockaddr*>(&peer.storage), &peer.size, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!connection.valid()) {
      // Anything but "none waiting" and "this one is gone" is a lack of descriptors or memory.
      if (errno == EAGAIN || errno == ECONNABORTED || errno == EINTR || errno == EPROTO) return;
      return back_off(errno);
    }
    const std::string text = local_.is_unix ? local_.to_string() : peer.to_string();
    accepted_(std::make_unique<SocketStream>(reactor_, std::move(connection), text, options_.socket));
    if (!alive()) return;
  }
}

void Listener::back_off(Errno error) {
  log::warn("listen={} error=\"{}\" accept paused for {} ms", local_.to_string(), errno_text(error),
            kBackOff / kMillisecond);
  back_off_.start(kBackOff, [this] { update(); });
  update();
}

}  // namespace vmferry
