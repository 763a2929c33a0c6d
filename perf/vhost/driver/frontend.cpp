// SPDX-License-Identifier: Apache-2.0
#include "perf/vhost/driver/frontend.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

namespace vmferry::perf {

using vhost::Request;

namespace {

constexpr uint64_t kWantedProtocol = vhost::kProtocolMq | vhost::kProtocolLogShmfd | vhost::kProtocolReplyAck |
                                     vhost::kProtocolBackendReq | vhost::kProtocolConfig |
                                     vhost::kProtocolInflightShmfd | vhost::kProtocolConfigureMemSlots |
                                     vhost::kProtocolResetDevice;
constexpr int kReplyTimeoutSeconds = 30;

Status no_memory(std::string_view what) {
  return fail(ErrorKind::LimitExceeded, "{}: {}", what, errno_text(errno));
}

}  // namespace

Result<std::unique_ptr<Frontend>> Frontend::create(const FrontendOptions& options) {
  std::unique_ptr<Frontend> frontend(new Frontend(options));
  if (Status made = frontend->make_memory(); !made) return tl::unexpected(made.error());
  return frontend;
}

Frontend::~Frontend() {
  if (memory_ != nullptr) ::munmap(memory_, memory_bytes_);
  if (log_ != nullptr) ::munmap(log_, log_bytes_);
}

Status Frontend::make_memory() {
  const uint64_t ring_bytes = virtio::DriverRing::memory_size(options_.ring, options_.queue_size);
  data_offset_ = round_up(ring_bytes * options_.queues, 4096);
  memory_bytes_ = round_up(data_offset_ + options_.data_bytes, 4096);
  memory_fd_.reset(::memfd_create("guest-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory_fd_.valid()) return no_memory("memfd_create");
  if (::ftruncate(memory_fd_.get(), static_cast<off_t>(memory_bytes_)) != 0) return no_memory("ftruncate");
  void* const address = ::mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd_.get(), 0);
  if (address == MAP_FAILED) return no_memory("mmap");
  memory_ = static_cast<uint8_t*>(address);
  for (uint16_t i = 0; i < options_.queues; ++i) {
    Queue queue;
    queue.offset = ring_bytes * i;
    queue.ring = std::make_unique<virtio::DriverRing>(options_.ring, options_.queue_size, memory_ + queue.offset,
                                                      kGuestBase + queue.offset);
    queue.kick.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    queue.call.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    queue.error.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!queue.kick.valid() || !queue.call.valid() || !queue.error.valid()) return no_memory("eventfd");
    queues_.push_back(std::move(queue));
  }
  return {};
}

Result<UniqueFd> Frontend::dial(const std::string& socket_path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket_path.size() >= sizeof address.sun_path)
    return fail(ErrorKind::InvalidArgument, "socket path '{}' is too long", socket_path);
  std::memcpy(address.sun_path, socket_path.data(), socket_path.size());
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return fail(ErrorKind::LimitExceeded, "socket: {}", errno_text(errno));
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return fail(ErrorKind::Unavailable, "connect to '{}': {}", socket_path, errno_text(errno));
  return fd;
}

Status Frontend::connect(UniqueFd socket) {
  socket_ = std::move(socket);
  const timeval timeout{.tv_sec = kReplyTimeoutSeconds, .tv_usec = 0};
  setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  if (Status status = negotiate(); !status) return fail_with(status.error(), "negotiate");
  if (Status status = share_inflight(); !status) return fail_with(status.error(), "in-flight region");
  const int fd = memory_fd_.get();
  Status status;
  if (options_.memory_slots && (protocol_features_ & vhost::kProtocolConfigureMemSlots) != 0) {
    status = order(Request::AddMemReg, region(), std::span(&fd, 1));
  } else {
    status = order(Request::SetMemTable, vhost::MemoryTable{{region()}}, std::span(&fd, 1));
  }
  if (!status) return fail_with(status.error(), "memory");
  for (uint16_t i = 0; i < options_.queues; ++i) {
    // The base is as old as that of a front-end which did not see the back-end die.
    if (Status started = start_queue(i, ring(i).base()); !started) return fail_with(started.error(), "start a queue");
  }
  return {};
}

Status Frontend::negotiate() {
  const auto offered = ask(Request::GetFeatures);
  if (!offered) return tl::unexpected(offered.error());
  if ((*offered & vhost::kFeatureProtocolFeatures) == 0)
    return fail(ErrorKind::Mismatch, "the back-end has no protocol features");
  const auto protocol = ask(Request::GetProtocolFeatures);
  if (!protocol) return tl::unexpected(protocol.error());
  protocol_features_ = *protocol & kWantedProtocol;
  if (!options_.inflight) protocol_features_ &= ~uint64_t{vhost::kProtocolInflightShmfd};
  if (Status sent = send(Request::SetProtocolFeatures, vhost::NumberBody{protocol_features_}); !sent) return sent;
  if (Status sent = send(Request::SetOwner, {}); !sent) return sent;

  uint64_t wanted = *offered & ~options_.features_refused & ~vhost::kFeatureLogAll;
  const auto want = [&](bool on, uint64_t bit) {
    if (!on) wanted &= ~bit;
    return !on || (wanted & bit) != 0;
  };
  if (!want(options_.ring.packed, virtio::kRingPacked) || !want(options_.ring.indirect, virtio::kRingIndirect) ||
      !want(options_.ring.event_idx, virtio::kRingEventIdx))
    return fail(ErrorKind::Mismatch, "the back-end offers features {:#x} only", *offered);
  features_ = wanted;
  if (const auto queues = ask(Request::GetQueueNum); !queues || *queues < options_.queues)
    return fail(ErrorKind::Mismatch, "the back-end has {} queues", queues ? *queues : 0);
  if (Status order_sent = order(Request::SetFeatures, vhost::NumberBody{features_}); !order_sent) return order_sent;
  if ((protocol_features_ & vhost::kProtocolBackendReq) != 0) {
    int pair[2] = {-1, -1};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return no_memory("socketpair");
    backend_channel_.reset(pair[0]);
    const UniqueFd theirs(pair[1]);
    if (Status sent = order(Request::SetBackendReqFd, {}, std::span(&pair[1], 1)); !sent) return sent;
  }
  return read_config();
}

Status Frontend::read_config() {
  vhost::ConfigAccess wanted{.offset = 0, .size = virtio::kBlkConfigSize, .flags = 0, .data = {}};
  wanted.data.resize(wanted.size);
  if (Status sent = send(Request::GetConfig, wanted); !sent) return sent;
  const auto answer = receive(Request::GetConfig);
  if (!answer) return tl::unexpected(answer.error());
  const auto config = virtio::decode_blk_config(std::get<vhost::ConfigAccess>(*answer).data);
  if (!config) return fail(ErrorKind::Corrupt, "configuration space is too short");
  config_ = *config;
  return {};
}

Status Frontend::share_inflight() {
  if ((protocol_features_ & vhost::kProtocolInflightShmfd) == 0) return {};
  if (!inflight_fd_.valid()) {
    const vhost::Inflight wanted{0, 0, options_.queues, options_.queue_size};
    if (Status sent = send(Request::GetInflightFd, wanted); !sent) return sent;
    const auto answer = receive(Request::GetInflightFd, &inflight_fd_);
    if (!answer) return tl::unexpected(answer.error());
    inflight_shape_ = std::get<vhost::Inflight>(*answer);
    if (!inflight_fd_.valid()) return fail(ErrorKind::Corrupt, "no descriptor came");
  }
  const int fd = inflight_fd_.get();
  return order(Request::SetInflightFd, inflight_shape_, std::span(&fd, 1));
}

vhost::VringAddress Frontend::addresses(uint16_t index) const {
  const Queue& queue = queues_[index];
  const auto start = reinterpret_cast<uint64_t>(memory_ + queue.offset);
  return {.index = index,
          .flags = logging_ ? vhost::kVringFlagLog : 0,
          .descriptor = start,
          .used = start + queue.ring->device_offset(),
          .available = start + queue.ring->driver_offset(),
          .log = kGuestBase + queue.offset + queue.ring->device_offset()};
}

vhost::MemoryRegion Frontend::region() const {
  return {kGuestBase, memory_bytes_, reinterpret_cast<uint64_t>(memory_), 0};
}

Status Frontend::start_queue(uint16_t index, uint32_t base) {
  const Queue& queue = queues_[index];
  const int kick = queue.kick.get();
  const int call = queue.call.get();
  const int error = queue.error.get();
  const vhost::VringFd which{static_cast<uint8_t>(index), true};
  const struct {
    Request request;
    vhost::Body body;
    std::span<const int> fds;
  } steps[] = {{Request::SetVringNum, vhost::VringState{index, options_.queue_size}, {}},
               {Request::SetVringBase, vhost::VringState{index, base}, {}},
               {Request::SetVringAddr, addresses(index), {}},
               {Request::SetVringErr, which, std::span(&error, 1)},
               {Request::SetVringCall, which, std::span(&call, 1)},
               {Request::SetVringKick, which, std::span(&kick, 1)},
               {Request::SetVringEnable, vhost::VringState{index, 1}, {}}};
  for (const auto& step : steps)
    if (Status done = order(step.request, step.body, step.fds); !done)
      return fail_with(done.error(), to_string(step.request));
  return {};
}

Result<uint32_t> Frontend::stop_queue(uint16_t index) {
  if (Status sent = send(Request::GetVringBase, vhost::VringState{index, 0}); !sent)
    return tl::unexpected(sent.error());
  const auto answer = receive(Request::GetVringBase);
  if (!answer) return tl::unexpected(answer.error());
  return std::get<vhost::VringState>(*answer).number;
}

Status Frontend::set_logging(bool on) {
  if (on && log_ == nullptr) {
    log_bytes_ = round_up(div_up(kGuestBase + memory_bytes_, virtio::DirtyLog::kPageSize * 8), 4096);
    log_fd_.reset(::memfd_create("dirty-log", MFD_CLOEXEC));
    if (!log_fd_.valid() || ::ftruncate(log_fd_.get(), static_cast<off_t>(log_bytes_)) != 0) return no_memory("log");
    void* const address = ::mmap(nullptr, log_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, log_fd_.get(), 0);
    if (address == MAP_FAILED) return no_memory("mmap");
    log_ = static_cast<uint8_t*>(address);
  }
  if (on) {
    const int fd = log_fd_.get();
    if (Status sent = send(Request::SetLogBase, vhost::LogArea{log_bytes_, 0}, std::span(&fd, 1)); !sent) return sent;
    if (const auto answer = receive(Request::SetLogBase); !answer) return tl::unexpected(answer.error());
  }
  logging_ = on;
  const uint64_t features = features_ | (on ? vhost::kFeatureLogAll : 0);
  if (Status done = order(Request::SetFeatures, vhost::NumberBody{features}); !done) return done;
  for (uint16_t i = 0; i < options_.queues; ++i)
    if (Status done = order(Request::SetVringAddr, addresses(i)); !done) return done;
  return {};
}

bool Frontend::is_logged(uint64_t guest_address) const {
  const uint64_t page = guest_address / virtio::DirtyLog::kPageSize;
  return (virtio::load_shared<uint8_t>(log_ + page / 8, std::memory_order_acquire) >> (page % 8) & 1) != 0;
}

void Frontend::clear_log() {
  for (uint8_t& byte : log()) virtio::store_shared<uint8_t>(&byte, 0);
}

bool Frontend::wait_backend_message(int timeout_ms) {
  pollfd waiting{backend_channel_.get(), POLLIN, 0};
  if (::poll(&waiting, 1, timeout_ms) != 1) return false;
  uint8_t bytes[vhost::kHeaderSize];
  return ::recv(backend_channel_.get(), bytes, sizeof bytes, MSG_WAITALL) == static_cast<ssize_t>(sizeof bytes);
}

void Frontend::kick(uint16_t index) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t ignored = ::write(queues_[index].kick.get(), &one, sizeof one);
}

Status Frontend::send(Request request, const vhost::Body& body, std::span<const int> fds, bool need_reply) {
  Bytes bytes;
  vhost::encode(bytes, request, need_reply ? vhost::kFlagNeedReply : 0, body);
  return send_bytes(bytes, fds);
}

Status Frontend::send_bytes(ByteSpan bytes, std::span<const int> fds) {
  iovec vector{const_cast<uint8_t*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(header), fds.data(), sizeof(int) * fds.size());
  }
  if (::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) != static_cast<ssize_t>(bytes.size()))
    return fail(ErrorKind::Unavailable, "send: {}", errno_text(errno));
  return {};
}

Result<vhost::Body> Frontend::receive(Request request, UniqueFd* fd) {
  uint8_t bytes[vhost::kHeaderSize + vhost::kPayloadSizeMax];
  iovec vector{bytes, vhost::kHeaderSize};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (::recvmsg(socket_.get(), &message, MSG_WAITALL | MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(vhost::kHeaderSize))
    return fail(ErrorKind::Unavailable, "no answer to {}", to_string(request));
  UniqueFd received;
  if (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    int raw = -1;
    std::memcpy(&raw, CMSG_DATA(header), sizeof raw);
    received.reset(raw);
  }
  const auto header = vhost::decode_header(ByteSpan(bytes, vhost::kHeaderSize));
  if (!header) return tl::unexpected(header.error());
  uint8_t* const payload = bytes + vhost::kHeaderSize;
  if (header->payload_size > 0 &&
      ::recv(socket_.get(), payload, header->payload_size, MSG_WAITALL) != static_cast<ssize_t>(header->payload_size))
    return fail(ErrorKind::Unavailable, "half an answer to {}", to_string(request));
  if (fd != nullptr) *fd = std::move(received);
  return vhost::decode_reply(*header, ByteSpan(payload, header->payload_size), request);
}

Status Frontend::order(Request request, const vhost::Body& body, std::span<const int> fds) {
  const bool acknowledged = (protocol_features_ & vhost::kProtocolReplyAck) != 0;
  if (Status sent = send(request, body, fds, acknowledged); !sent || !acknowledged) return sent;
  const auto answer = receive(request);
  if (!answer) return tl::unexpected(answer.error());
  const uint64_t refused = std::get<vhost::NumberBody>(*answer).value;
  if (refused != 0) return fail(ErrorKind::Denied, "{} was refused", to_string(request));
  return {};
}

Result<uint64_t> Frontend::ask(Request request) {
  if (Status sent = send(request, {}); !sent) return tl::unexpected(sent.error());
  const auto answer = receive(request);
  if (!answer) return tl::unexpected(answer.error());
  return std::get<vhost::NumberBody>(*answer).value;
}

}  // namespace vmferry::perf
