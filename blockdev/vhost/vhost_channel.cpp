// SPDX-License-Identifier: Apache-2.0
#include "blockdev/vhost/vhost_channel.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace vmferry {

namespace {
constexpr int kMessagesPerRound = 32;
}  // namespace

VhostChannel::VhostChannel(Reactor& reactor, UniqueFd socket, Received received, Closed closed)
    : reactor_(reactor),
      socket_(std::move(socket)),
      received_(std::move(received)),
      closed_(std::move(closed)),
      bytes_(vhost::kHeaderSize) {
  fcntl(socket_.get(), F_SETFL, fcntl(socket_.get(), F_GETFL) | O_NONBLOCK);
  watch_ = reactor_.watch(socket_.get(), EPOLLIN, [this](uint32_t) { ready(); });
}

VhostChannel::~VhostChannel() {
  reactor_.unwatch(watch_);
}

void VhostChannel::pause(bool paused) {
  if (paused_ == paused || !socket_.valid()) return;
  paused_ = paused;
  // Even paused, the end of the connection has to be noticed: EPOLLRDHUP comes with the hang-up.
  reactor_.set_events(watch_, paused ? static_cast<uint32_t>(EPOLLRDHUP) : static_cast<uint32_t>(EPOLLIN));
}

void VhostChannel::ready() {
  if (paused_) return close({ErrorKind::Unavailable, "the front-end hung up"});
  const auto alive = alive_.token();
  for (int i = 0; i < kMessagesPerRound && alive() && socket_.valid() && !paused_; ++i) {
    if (!read_some()) return;
    if (filled_ == bytes_.size()) deliver();
  }
}

bool VhostChannel::read_some() {
  iovec vector{bytes_.data() + filled_, bytes_.size() - filled_};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * vhost::kDescriptorsMax)] = {};
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t count = ::recvmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (count < 0) {
    if (errno != EAGAIN && errno != EINTR) close({ErrorKind::Unavailable, errno_text(errno)});
    return false;
  }
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t fd_count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < fd_count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
      packet_.fds.emplace_back(fd);
    }
  }
  if (count == 0) {
    close({ErrorKind::Unavailable, "the front-end closed the connection"});
    return false;
  }
  if ((message.msg_flags & MSG_CTRUNC) != 0 || packet_.fds.size() > vhost::kDescriptorsMax) {
    close({ErrorKind::LimitExceeded, "more descriptors than a message may have"});
    return false;
  }
  filled_ += static_cast<size_t>(count);
  return true;
}

void VhostChannel::deliver() {
  if (!header_known_) {
    const auto header = vhost::decode_header(bytes_);
    if (!header) return close(header.error());
    packet_.header = *header;
    header_known_ = true;
    bytes_.resize(header->payload_size);
    filled_ = 0;
    if (header->payload_size > 0) return;
  }
  VhostPacket packet = std::exchange(packet_, {});
  packet.payload = std::exchange(bytes_, Bytes(vhost::kHeaderSize));
  header_known_ = false;
  filled_ = 0;
  received_(std::move(packet));
}

void VhostChannel::send(ByteSpan bytes, int fd) {
  if (!socket_.valid()) return;
  iovec vector{const_cast<uint8_t*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  if (::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(bytes.size())) return;
  // Later, because the caller is in the middle of something.
  reactor_.post([this, alive = alive_.token()] {
    if (alive()) close({ErrorKind::Unavailable, "the front-end does not take its replies"});
  });
}

void VhostChannel::close(const Error& why) {
  if (!socket_.valid()) return;
  reactor_.unwatch(watch_);
  watch_ = 0;
  socket_.reset();
  packet_.fds.clear();
  const Closed closed = std::move(closed_);
  closed(why);
}

}  // namespace vmferry
