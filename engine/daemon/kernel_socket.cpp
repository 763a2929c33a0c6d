// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/kernel_socket.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <cerrno>

#include "engine/runtime/socket_stream.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kHandshakeTimeout = 10 * kSecond;

// Lives until it has called done.
class Maker final : public std::enable_shared_from_this<Maker>, private StreamHandler {
 public:
  using Done = std::function<void(Result<KernelSockets>)>;

  Maker(Reactor& reactor, std::string export_name, std::string user, uint32_t count, Done done)
      : reactor_(reactor),
        export_name_(std::move(export_name)),
        user_(std::move(user)),
        count_(count),
        done_(std::move(done)),
        timer_(reactor) {}

  void start(NbdServer& server) {
    self_ = shared_from_this();
    timer_.start(kHandshakeTimeout, [this] { finish(fail(ErrorKind::Timeout, "the export does not answer")); });
    for (uint32_t i = 0; i < count_; ++i) {
      int pair[2];
      if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
        return finish(fail(ErrorKind::LimitExceeded, "no socketpair for the kernel: {}", errno_text(errno)));
      }
      ours_.push_back(std::make_unique<SocketStream>(reactor_, UniqueFd(pair[0]), "kernel"));
      server.accept(std::make_unique<SocketStream>(reactor_, UniqueFd(pair[1]), "kernel:" + user_));
    }
    next();
  }

 private:
  // One after the other: they are the same, and what is wrong with one is wrong with all.
  void next() {
    if (sockets_.fds.size() == count_) return finish({});
    handshake_.emplace(export_name_);
    ours_[sockets_.fds.size()]->set_handler(this);
  }

  void stream_readable(ByteSpan bytes) override {
    SocketStream& stream = *ours_[sockets_.fds.size()];
    Bytes out;
    const size_t used = handshake_->feed(bytes, out);
    if (handshake_->state() == nbd::ClientHandshake::State::Failed) {
      return finish(fail(ErrorKind::Unavailable, "{}", handshake_->reason()));
    }
    if (handshake_->state() != nbd::ClientHandshake::State::Transmission) return stream.write(out);
    if (used != bytes.size()) return finish(fail(ErrorKind::Internal, "the export replied before it was asked"));
    sockets_.facts = handshake_->facts();
    sockets_.fds.push_back(stream.release());
    reactor_.post([self = shared_from_this()] {
      if (self->done_) self->next();
    });
  }
  void stream_writable() override {}
  void stream_closed(Errno error) override {
    finish(fail(ErrorKind::Unavailable, "the export closed the connection{}{}", error != 0 ? ": " : "",
                error != 0 ? errno_text(error) : ""));
  }

  void finish(const Status& status) {
    if (!done_) return;
    timer_.cancel();
    // Later, because a stream may be on the stack.
    reactor_.post([self = std::move(self_), done = std::exchange(done_, nullptr), status] {
      self->ours_.clear();
      if (!status) return done(tl::unexpected(status.error()));
      done(std::move(self->sockets_));
    });
  }

  Reactor& reactor_;
  const std::string export_name_;
  const std::string user_;
  const uint32_t count_;
  Done done_;
  Timer timer_;
  std::shared_ptr<Maker> self_;
  std::vector<std::unique_ptr<SocketStream>> ours_;
  std::optional<nbd::ClientHandshake> handshake_;  // of the socket whose turn it is
  KernelSockets sockets_;
};

}  // namespace

void make_kernel_sockets(Reactor& reactor, NbdServer& server, const std::string& export_name, const std::string& user,
                         uint32_t count, std::function<void(Result<KernelSockets>)> done) {
  std::make_shared<Maker>(reactor, export_name, user, count, std::move(done))->start(server);
}

}  // namespace vmferry
