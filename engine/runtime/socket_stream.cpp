// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/socket_stream.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr size_t kBuffersPerSend = 64;
constexpr size_t kMergeBelow = 16_KiB;  // small writes share a buffer: replies of one round become one segment

constexpr int kKeepaliveIdleSeconds = 60;
constexpr int kKeepaliveIntervalSeconds = 10;
constexpr int kKeepaliveProbes = 6;

void apply_options(int fd, const SocketOptions& options) {
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);  // refused by unix sockets, which need none
  // A host that vanishes says nothing: without asking, its idle connection would take up room for ever.
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &kKeepaliveIdleSeconds, sizeof kKeepaliveIdleSeconds);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &kKeepaliveIntervalSeconds, sizeof kKeepaliveIntervalSeconds);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &kKeepaliveProbes, sizeof kKeepaliveProbes);
  if (options.notsent_lowat != 0)
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &options.notsent_lowat, sizeof options.notsent_lowat);
  if (options.send_buffer != 0) {
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &options.send_buffer, sizeof options.send_buffer);
  }
  if (options.receive_buffer != 0)
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &options.receive_buffer, sizeof options.receive_buffer);
  if (!options.congestion.empty())
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, options.congestion.c_str(),
               static_cast<socklen_t>(options.congestion.size()));
}

}  // namespace

SocketStream::SocketStream(Reactor& reactor, UniqueFd fd, std::string peer_text, const SocketOptions& options)
    : reactor_(reactor),
      fd_(std::move(fd)),
      peer_text_(std::move(peer_text)),
      flush_later_(reactor, [this] { flush(); }) {
  VF_ASSERT(fd_.valid());
  const int flags = fcntl(fd_.get(), F_GETFL);
  fcntl(fd_.get(), F_SETFL, flags | O_NONBLOCK);
  apply_options(fd_.get(), options);
  watch_ = reactor_.watch(fd_.get(), 0, [this](uint32_t events) { ready(events); });
}

SocketStream::~SocketStream() {
  close();
}

void SocketStream::set_handler(StreamHandler* handler) {
  handler_ = handler;
  if (fd_.valid()) update_interest();
}

void SocketStream::write(ByteSpan bytes) {
  if (!fd_.valid() || draining_ || bytes.empty()) return;
  if (!queue_.empty() && !queue_.back().attached.valid() && queue_.back().bytes.size() + bytes.size() <= kMergeBelow) {
    Bytes& last = queue_.back().bytes;
    last.insert(last.end(), bytes.begin(), bytes.end());
    unsent_ += bytes.size();
    if (!blocked_) flush_later_.schedule();
    return;
  }
  queue(Chunk{Bytes(bytes.begin(), bytes.end()), {}});
}

void SocketStream::write(Bytes&& bytes) {
  if (!fd_.valid() || draining_ || bytes.empty()) return;
  queue(Chunk{std::move(bytes), {}});
}

void SocketStream::write_with_fd(ByteSpan bytes, UniqueFd fd) {
  VF_ASSERT(!bytes.empty());
  if (!fd_.valid() || draining_) return;
  queue(Chunk{Bytes(bytes.begin(), bytes.end()), std::move(fd)});
}

void SocketStream::queue(Chunk&& chunk) {
  unsent_ += chunk.bytes.size();
  queue_.push_back(std::move(chunk));
  if (!blocked_) flush_later_.schedule();
}

void SocketStream::pause_reading(bool paused) {
  if (paused_ == paused) return;
  paused_ = paused;
  if (fd_.valid()) update_interest();
}

void SocketStream::close() {
  if (!fd_.valid()) return;
  reactor_.unwatch(watch_);
  watch_ = 0;
  flush_later_.cancel();
  fd_.reset();
  handler_ = nullptr;
  queue_.clear();
  unsent_ = 0;
  front_sent_ = 0;
}

bool SocketStream::peer_gone() const {
  pollfd state{.fd = fd_.get(), .events = 0, .revents = 0};
  return !fd_.valid() || (::poll(&state, 1, 0) == 1 && (state.revents & (POLLHUP | POLLERR)) != 0);
}

UniqueFd SocketStream::release() {
  VF_ASSERT(queue_.empty());
  if (fd_.valid()) reactor_.unwatch(watch_);
  watch_ = 0;
  UniqueFd released = std::move(fd_);
  close();
  return released;
}

void SocketStream::close_after_writing() {
  if (!fd_.valid() || draining_) return;
  draining_ = true;
  update_interest();
  flush_later_.schedule();
}

void SocketStream::update_interest() {
  uint32_t events = 0;
  if (handler_ != nullptr && !paused_ && !draining_) events |= EPOLLIN;
  if (blocked_) events |= EPOLLOUT;
  reactor_.set_events(watch_, events);
}

void SocketStream::ready(uint32_t events) {
  const auto alive = alive_.token();
  if ((events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) != 0 && blocked_) {
    blocked_ = false;
    flush();
    if (!alive() || !fd_.valid()) return;
    update_interest();
  }
  if ((events & (EPOLLIN | EPOLLERR | EPOLLHUP)) != 0 && !paused_ && !draining_ && handler_ != nullptr) read_some();
}

void SocketStream::read_some() {
  const MutableByteSpan buffer = reactor_.scratch();
  const ssize_t count = ::recv(fd_.get(), buffer.data(), buffer.size(), 0);
  if (count > 0) return handler_->stream_readable(buffer.first(static_cast<size_t>(count)));
  if (count == 0) return finish(0);
  if (errno != EAGAIN && errno != EINTR) finish(errno);
}

// One sendmsg over the head of the queue. A chunk with a descriptor is a message of its own, because the kernel
// delivers the descriptor with the first byte of the message that carries it.
ssize_t SocketStream::send_front(size_t& attempted) {
  iovec vectors[kBuffersPerSend];
  size_t count = 0;
  attempted = 0;
  size_t skip = front_sent_;
  for (Chunk& chunk : queue_) {
    if (count == kBuffersPerSend || (count > 0 && chunk.attached.valid())) break;
    vectors[count] = {chunk.bytes.data() + skip, chunk.bytes.size() - skip};
    attempted += vectors[count].iov_len;
    skip = 0;
    ++count;
    if (chunk.attached.valid()) break;
  }
  msghdr message{};
  message.msg_iov = vectors;
  message.msg_iovlen = count;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (queue_.front().attached.valid()) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int fd = queue_.front().attached.get();
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  return ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void SocketStream::flush() {
  const size_t unsent_before = unsent_;
  while (!queue_.empty()) {
    size_t attempted = 0;
    const ssize_t sent = send_front(attempted);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != ENOBUFS) return finish(errno);
      blocked_ = true;
      break;
    }
    queue_.front().attached.reset();  // it went with the first byte
    size_t left = static_cast<size_t>(sent);
    unsent_ -= left;
    while (left > 0) {
      const size_t front = queue_.front().bytes.size() - front_sent_;
      if (left < front) {
        front_sent_ += left;
        break;
      }
      left -= front;
      front_sent_ = 0;
      queue_.pop_front();
    }
  }
  if (blocked_) update_interest();
  if (draining_ && queue_.empty()) return finish(0);
  const bool drained = unsent_before > 0 && unsent_ == 0;
  const bool below = unsent_before > low_mark_ && unsent_ <= low_mark_;
  if ((drained || below) && handler_ != nullptr && !draining_) handler_->stream_writable();
}

void SocketStream::finish(Errno error) {
  StreamHandler* handler = handler_;
  const size_t unsent = unsent_;
  close();
  unsent_ = unsent;                                       // what never left, for a handler that has to know
  if (handler != nullptr) handler->stream_closed(error);  // may destroy this stream
}

}  // namespace vmferry
