// SPDX-License-Identifier: Apache-2.0
#include "blockdev/vhost/vhost_session.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "blockdev/vhost/vhost_server.h"
#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

using vhost::Request;

namespace {

constexpr uint64_t kProtocolFeatures = vhost::kProtocolMq | vhost::kProtocolLogShmfd | vhost::kProtocolReplyAck |
                                       vhost::kProtocolBackendReq | vhost::kProtocolConfig |
                                       vhost::kProtocolInflightShmfd | vhost::kProtocolResetDevice |
                                       vhost::kProtocolConfigureMemSlots | vhost::kProtocolStatus;

// What we wait for and write to has to be an eventfd: epoll takes no file, and a write to a full pipe would stop the
// daemon. Non-blocking for the same reason.
Status check_eventfd(const UniqueFd& fd) {
  char target[64];
  const std::string link = fmt::format("/proc/self/fd/{}", fd.get());
  const ssize_t length = ::readlink(link.c_str(), target, sizeof target);
  if (length <= 0 || std::string_view(target, static_cast<size_t>(length)) != "anon_inode:[eventfd]")
    return fail(ErrorKind::InvalidArgument, "the descriptor is no eventfd");
  ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) | O_NONBLOCK);
  return {};
}

uint64_t number_of(const vhost::Message& message) {
  return std::get<vhost::NumberBody>(message.body).value;
}

}  // namespace

VhostSession::VhostSession(VhostServer& server, UniqueFd socket)
    : server_(server), memory_(std::make_shared<VhostMemory>()) {
  for (uint16_t i = 0; i < server.config_.queues; ++i)
    queues_.push_back(std::make_unique<VhostQueue>(*this, server, i));
  channel_ = std::make_unique<VhostChannel>(
      server.reactor_, std::move(socket), [this](VhostPacket packet) { received(std::move(packet)); },
      [this](const Error& why) { close(why.text); });
}

VhostSession::~VhostSession() = default;

void VhostSession::close(std::string_view why) {
  if (closed_) return;
  closed_ = true;
  log::info("vhost-user-blk volume={} connection closed: {}", server_.config_.name, why);
  channel_->pause(true);
  stop_queues([this] {
    // Later, because a queue or the channel may be on the stack.
    server_.reactor_.post([&server = server_, alive = alive_.token()] {
      if (alive()) server.session_over();
    });
  });
}

void VhostSession::fail_later(std::string_view why) {
  server_.reactor_.post([this, alive = alive_.token(), text = std::string(why)] {
    if (alive()) close(text);
  });
}

void VhostSession::stop_queues(std::function<void()> stopped) {
  // One more than there are, so that `stopped` does not run while the loop still goes.
  auto left = std::make_shared<size_t>(queues_.size() + 1);
  const auto one_less = [left, stopped = std::move(stopped)] {
    if (--*left == 0) stopped();
  };
  for (const auto& queue : queues_) queue->stop(one_less);
  one_less();
}

void VhostSession::received(VhostPacket packet) {
  if (closed_) return;
  auto message = vhost::decode(packet.header, packet.payload, packet.fds.size());
  if (!message) return close(message.error().text);
  log::debug("vhost-user-blk volume={} message={}", server_.config_.name, to_string(message->request));
  const auto outcome = handle(*message, packet);
  if (outcome) {
    if (*outcome == Outcome::Done) acknowledge(message->request, message->need_reply, true);
    return;
  }
  log::warn("vhost-user-blk volume={} message={} refused: {}", server_.config_.name, to_string(message->request),
            outcome.error().text);
  if (message->need_reply && (protocol_features_ & vhost::kProtocolReplyAck) != 0)
    return acknowledge(message->request, true, false);
  close(outcome.error().text);
}

void VhostSession::acknowledge(Request request, bool need_reply, bool success) {
  if (!need_reply || (protocol_features_ & vhost::kProtocolReplyAck) == 0) return;
  reply(request, vhost::NumberBody{success ? 0U : 1U});
}

void VhostSession::reply(Request request, const vhost::Body& body, int fd) {
  Bytes out;
  vhost::encode(out, request, vhost::kFlagReply, body);
  channel_->send(out, fd);
}

Result<VhostSession::Outcome> VhostSession::handle(const vhost::Message& message, VhostPacket& packet) {
  const auto answer = [&](uint64_t value) {
    reply(message.request, vhost::NumberBody{value});
    return Outcome::Replied;
  };
  switch (message.request) {
    case Request::GetFeatures:
      return answer(offered_features());
    case Request::SetFeatures:
      return set_features(number_of(message));
    case Request::GetProtocolFeatures:
      return answer(kProtocolFeatures);
    case Request::SetProtocolFeatures:
      if ((number_of(message) & ~kProtocolFeatures) != 0)
        return fail(ErrorKind::InvalidArgument, "protocol features {:#x} were not offered",
                    number_of(message) & ~kProtocolFeatures);
      protocol_features_ = number_of(message);
      return Outcome::Done;
    case Request::SetOwner:
    case Request::SetLogFd:  // a notification about the log that nobody needs
      return Outcome::Done;
    case Request::ResetOwner:
      for (const auto& queue : queues_) queue->set_enabled(false);
      return Outcome::Done;
    case Request::GetQueueNum:
      return answer(queues_.size());
    case Request::SetBackendReqFd:
      backend_requests_ = std::move(packet.fds.front());
      return Outcome::Done;
    case Request::GetConfig:
      return get_config(std::get<vhost::ConfigAccess>(message.body));
    case Request::SetConfig:
      return set_config(std::get<vhost::ConfigAccess>(message.body));
    case Request::ResetDevice:
      return reset_device(message.need_reply);
    case Request::SetStatus:
      status_ = static_cast<uint8_t>(number_of(message));
      return Outcome::Done;
    case Request::GetStatus:
      return answer(status_);
    case Request::SetMemTable:
    case Request::GetMaxMemSlots:
    case Request::AddMemReg:
    case Request::RemMemReg:
    case Request::SetLogBase:
    case Request::GetInflightFd:
    case Request::SetInflightFd:
      return handle_memory(message, packet);
    default:
      return handle_ring(message, packet);
  }
}

Result<VhostSession::Outcome> VhostSession::handle_ring(const vhost::Message& message, VhostPacket& packet) {
  if (const auto* address = std::get_if<vhost::VringAddress>(&message.body)) return set_address(*address);
  if (const auto* given = std::get_if<vhost::VringFd>(&message.body)) {
    const auto queue = queue_at(given->index);
    if (!queue) return tl::unexpected(queue.error());
    UniqueFd fd = given->has_fd ? std::move(packet.fds.front()) : UniqueFd{};
    if (fd.valid())
      if (Status checked = check_eventfd(fd); !checked) return tl::unexpected(checked.error());
    if (message.request == Request::SetVringKick) return start_queue(given->index, std::move(fd));
    if (message.request == Request::SetVringCall) {
      (*queue)->set_call(std::move(fd));
    } else {
      (*queue)->set_error(std::move(fd));
    }
    return Outcome::Done;
  }
  const auto& state = std::get<vhost::VringState>(message.body);
  if (message.request == Request::GetVringBase) return get_base(state.index);
  if (message.request == Request::SetVringEnable) {
    const auto queue = queue_at(state.index);
    if (!queue) return tl::unexpected(queue.error());
    (*queue)->set_enabled(state.number != 0);
    return Outcome::Done;
  }
  const auto queue = stopped_queue_at(state.index);
  if (!queue) return tl::unexpected(queue.error());
  if (message.request == Request::SetVringBase) {
    (*queue)->config.base = state.number;
    return Outcome::Done;
  }
  if (!virtio::valid_queue_size(true, state.number))
    return fail(ErrorKind::InvalidArgument, "queue {}: size {}, the limit is {}", state.index, state.number,
                virtio::kQueueSizeMax);
  (*queue)->config.size = static_cast<uint16_t>(state.number);
  return Outcome::Done;
}

Result<VhostQueue*> VhostSession::queue_at(uint32_t index) {
  if (index >= queues_.size()) return fail(ErrorKind::InvalidArgument, "queue {} of {}", index, queues_.size());
  return queues_[index].get();
}

Result<VhostQueue*> VhostSession::stopped_queue_at(uint32_t index) {
  auto queue = queue_at(index);
  if (queue && (*queue)->started()) return fail(ErrorKind::InvalidArgument, "queue {} is running", index);
  return queue;
}

Result<VhostSession::Outcome> VhostSession::set_features(uint64_t features) {
  if (const uint64_t unknown = features & ~offered_features(); unknown != 0)
    return fail(ErrorKind::InvalidArgument, "features {:#x} were not offered", unknown);
  // What the rings were started with cannot change under them; logging can, that is how a migration begins.
  const uint64_t changed = features ^ features_;
  for (const auto& queue : queues_)
    if (queue->started() && (changed & (virtio::kRingPacked | virtio::kRingIndirect | virtio::kRingEventIdx)) != 0)
      return fail(ErrorKind::InvalidArgument, "features {:#x} change while rings are running", changed);
  features_ = features;
  if ((features & vhost::kFeatureProtocolFeatures) == 0)
    for (const auto& queue : queues_) queue->set_enabled(true);
  update_logs();
  return Outcome::Done;
}

Result<VhostSession::Outcome> VhostSession::set_address(const vhost::VringAddress& address) {
  const auto queue = queue_at(address.index);
  if (!queue) return tl::unexpected(queue.error());
  VhostRingConfig& config = (*queue)->config;
  // A running ring may have its logging changed, not its place.
  if ((*queue)->started() && (config.address.descriptor != address.descriptor || config.address.used != address.used ||
                              config.address.available != address.available))
    return fail(ErrorKind::InvalidArgument, "queue {} is running", address.index);
  config.address = address;
  config.address_known = true;
  (*queue)->update_log();
  return Outcome::Done;
}

Result<VhostSession::Outcome> VhostSession::start_queue(uint32_t index, UniqueFd kick) {
  VhostQueue& queue = *queues_[index];
  if (!kick.valid())
    return fail(ErrorKind::InvalidArgument, "queue {}: polling without a kick is not supported", index);
  if (queue.started()) {
    queue.set_kick(std::move(kick));
    return Outcome::Done;
  }
  if (Status started = queue.start(std::move(kick), memory_, inflight_of(queue, index)); !started)
    return tl::unexpected(started.error());
  return Outcome::Done;
}

Result<VhostSession::Outcome> VhostSession::get_base(uint32_t index) {
  const auto queue = queue_at(index);
  if (!queue) return tl::unexpected(queue.error());
  // The answer says that nothing is in flight any more: however long that takes.
  channel_->pause(true);
  (*queue)->stop([this, index, stopped = *queue] {
    reply(Request::GetVringBase, vhost::VringState{index, stopped->base()});
    channel_->pause(false);
  });
  return Outcome::Waits;
}

Result<VhostSession::Outcome> VhostSession::get_config(const vhost::ConfigAccess& access) {
  const Bytes space = config_space();
  vhost::ConfigAccess answer{.offset = access.offset, .size = access.size, .flags = access.flags, .data = {}};
  const auto begin = space.begin() + static_cast<ptrdiff_t>(access.offset);  // inside: the decoder checked
  answer.data.assign(begin, begin + static_cast<ptrdiff_t>(access.size));
  reply(Request::GetConfig, answer);
  return Outcome::Replied;
}

Result<VhostSession::Outcome> VhostSession::set_config(const vhost::ConfigAccess& access) {
  const bool migrated = (access.flags & vhost::kConfigFlagMigration) != 0;
  const bool has_writeback =
      access.offset <= virtio::kBlkConfigWriteback && virtio::kBlkConfigWriteback - access.offset < access.size;
  if (!has_writeback || (!migrated && access.size != 1))
    return fail(ErrorKind::InvalidArgument, "{} bytes of configuration at {} are read-only", access.size,
                access.offset);
  writeback_ = access.data[virtio::kBlkConfigWriteback - access.offset] != 0;
  return Outcome::Done;
}

// Rings and negotiation go; the memory stays, because front-ends with memory slots send only what changed.
Result<VhostSession::Outcome> VhostSession::reset_device(bool need_reply) {
  channel_->pause(true);
  stop_queues([this, need_reply] {
    features_ = 0;
    status_ = 0;
    writeback_ = true;
    log_ = {};
    log_mapping_ = {};
    inflight_ = {};
    inflight_shape_ = {};
    for (const auto& queue : queues_) {
      queue->config = {};
      queue->set_call({});
      queue->set_error({});
    }
    acknowledge(Request::ResetDevice, need_reply, true);
    channel_->pause(false);
  });
  return Outcome::Waits;
}

uint64_t VhostSession::offered_features() const {
  uint64_t features = virtio::kBlkSegMax | virtio::kBlkBlockSize | virtio::kBlkFlush | virtio::kBlkTopology |
                      virtio::kBlkConfigWce | virtio::kBlkMq | virtio::kRingIndirect | virtio::kRingEventIdx |
                      virtio::kVersion1 | virtio::kRingPacked | vhost::kFeatureLogAll | vhost::kFeatureProtocolFeatures;
  if (server_.config_.read_only) return features | virtio::kBlkReadOnly;
  return features | virtio::kBlkDiscard | virtio::kBlkWriteZeroes;
}

Bytes VhostSession::config_space() const {
  const BlockDevice& device = *server_.config_.device;
  const VhostLimits& limits = server_.limits_;
  const bool writable = !server_.config_.read_only;
  const auto config = virtio::encode_blk_config(
      {.size = device.size(),
       .segments_max = limits.segments_max,
       // The stores read, modify and write by themselves where their blocks are larger.
       .block_size = virtio::kSectorSize,
       .physical_block = std::clamp<uint32_t>(device.limits().block_size_preferred, virtio::kSectorSize, 64_KiB),
       .optimal_io = 0,
       .writeback = writeback_,
       .queues = server_.config_.queues,
       .discard_sectors_max = writable ? limits.discard_sectors_max : 0,
       .discard_ranges_max = writable ? limits.discard_ranges_max : 0,
       .discard_alignment = std::clamp<uint32_t>(device.limits().block_size_preferred, virtio::kSectorSize, 64_KiB)});
  Bytes space(config.begin(), config.end());
  space.resize(vhost::kConfigSizeMax);
  return space;
}

virtio::RingOptions VhostSession::ring_options() const {
  return {.packed = (features_ & virtio::kRingPacked) != 0,
          .indirect = (features_ & virtio::kRingIndirect) != 0,
          .event_idx = (features_ & virtio::kRingEventIdx) != 0};
}

// virtio 1.2, 5.2.6.2: a driver that cannot flush must not need to.
bool VhostSession::write_through() const {
  if ((features_ & virtio::kBlkFlush) == 0) return true;
  return (features_ & virtio::kBlkConfigWce) != 0 && !writeback_;
}

void VhostSession::notify_config_change() {
  if (closed_ || !backend_requests_.valid()) return;
  Bytes message;
  vhost::append_header(message, static_cast<uint32_t>(vhost::BackendRequest::ConfigChange), 0, 0);
  if (::send(backend_requests_.get(), message.data(), message.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
    log::warn("vhost-user-blk volume={} config change not delivered: {}", server_.config_.name, errno_text(errno));
}

std::vector<uint64_t> VhostSession::requests_of_queues() const {
  std::vector<uint64_t> counts;
  for (const auto& queue : queues_) counts.push_back(queue->requests());
  while (!counts.empty() && counts.back() == 0) counts.pop_back();
  return counts;
}

}  // namespace vmferry
