// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/connector.h"

#include <sys/epoll.h>

#include <cerrno>

namespace vmferry {

void Connector::connect(const Endpoint& endpoint, const ConnectOptions& options, Done done) {
  cancel();
  endpoint_ = endpoint;
  options_ = options;
  done_ = std::move(done);
  last_error_ = 0;
  timeout_.start(options.timeout, [this] {
    finish(fail(ErrorKind::Timeout, "connect to {}: no answer within {} ms", endpoint_.to_string(),
                options_.timeout / kMillisecond));
  });
  auto answer = std::make_shared<Result<std::vector<SocketAddress>>>();
  reactor_.offload([endpoint, answer] { *answer = resolve(endpoint, ResolveFor::Connect); },
                   [this, alive = alive_.token(), generation = generation_, answer] {
                     if (alive() && generation == generation_) resolved(std::move(*answer));
                   });
}

void Connector::cancel() {
  ++generation_;
  timeout_.cancel();
  reactor_.unwatch(watch_);
  watch_ = 0;
  fd_.reset();
  const Done doomed = std::exchange(done_, nullptr);
}

void Connector::resolved(Result<std::vector<SocketAddress>> addresses) {
  if (!addresses) return finish(fail_with(addresses.error(), "connect to " + endpoint_.to_string()));
  addresses_ = std::move(*addresses);
  next_ = 0;
  try_next();
}

void Connector::try_next() {
  reactor_.unwatch(watch_);
  watch_ = 0;
  while (next_ < addresses_.size()) {
    const SocketAddress& address = addresses_[next_++];
    fd_.reset(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd_.valid()) {
      last_error_ = errno;
      continue;
    }
    if (::connect(fd_.get(), address.get(), address.size) == 0) return connected();
    if (errno != EINPROGRESS) {
      last_error_ = errno;
      continue;
    }
    watch_ = reactor_.watch(fd_.get(), EPOLLOUT, [this](uint32_t) {
      int error = 0;
      socklen_t size = sizeof error;
      getsockopt(fd_.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error == 0) return connected();
      last_error_ = error;
      try_next();
    });
    return;
  }
  finish(fail(ErrorKind::Unavailable, "connect to {}: {}", endpoint_.to_string(), errno_text(last_error_)));
}

void Connector::connected() {
  reactor_.unwatch(watch_);
  watch_ = 0;
  const std::string peer = endpoint_.is_unix ? endpoint_.to_string() : addresses_[next_ - 1].to_string();
  finish(std::make_unique<SocketStream>(reactor_, std::move(fd_), peer, options_.socket));
}

void Connector::finish(Result<std::unique_ptr<SocketStream>> result) {
  const Done done = std::exchange(done_, nullptr);
  cancel();
  if (done) done(std::move(result));
}

}  // namespace vmferry
