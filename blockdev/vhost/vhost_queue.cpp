// SPDX-License-Identifier: Apache-2.0
#include "blockdev/vhost/vhost_queue.h"

#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>

#include "blockdev/vhost/vhost_server.h"
#include "blockdev/vhost/vhost_session.h"
#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

void signal_event(const UniqueFd& fd) {
  if (!fd.valid()) return;
  // Looked at first, because the front-end shares the flag that makes the write non-blocking and can take it away.
  // A counter that is full needs no signal: whoever listens is awake already.
  pollfd room{.fd = fd.get(), .events = POLLOUT, .revents = 0};
  if (::poll(&room, 1, 0) != 1 || (room.revents & POLLOUT) == 0) return;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t ignored = ::write(fd.get(), &one, sizeof one);
}

bool aligned(const uint8_t* at, uint64_t alignment) {
  return reinterpret_cast<uintptr_t>(at) % alignment == 0;
}

}  // namespace

VhostQueue::VhostQueue(VhostSession& session, VhostServer& server, uint16_t index)
    : session_(session),
      server_(server),
      index_(index),
      flush_later_(server.reactor_, [this] { flush(); }),
      process_later_(server.reactor_, [this] { process(); }) {}

VhostQueue::~VhostQueue() {
  VF_ASSERT(inflight_ == 0);
  server_.reactor_.unwatch(watch_);
}

bool VhostQueue::write_through() const {
  return session_.write_through();
}

Result<virtio::RingMemory> VhostQueue::find_ring(const VhostMemory& memory) const {
  const bool packed = session_.ring_options().packed;
  if (!virtio::valid_queue_size(packed, config.size))
    return fail(ErrorKind::InvalidArgument, "queue {}: size {} is not one that a {} ring can have", index_, config.size,
                packed ? "packed" : "split");
  const virtio::RingSizes sizes = virtio::ring_sizes(packed, config.size);
  const virtio::RingSizes alignments = virtio::ring_alignments(packed);
  const virtio::GuestMemory& table = memory.table();
  const virtio::RingMemory ring{config.size, table.at_user(config.address.descriptor, sizes.descriptors),
                                table.at_user(config.address.available, sizes.driver),
                                table.at_user(config.address.used, sizes.device)};
  if (ring.descriptors == nullptr || ring.driver == nullptr || ring.device == nullptr)
    return fail(ErrorKind::InvalidArgument, "queue {}: the ring is not inside the guest's memory", index_);
  if (!aligned(ring.descriptors, alignments.descriptors) || !aligned(ring.driver, alignments.driver) ||
      !aligned(ring.device, alignments.device))
    return fail(ErrorKind::InvalidArgument, "queue {}: the ring is not aligned", index_);
  return ring;
}

Status VhostQueue::start(UniqueFd kick, VhostMemory::Ptr memory, MutableByteSpan inflight) {
  VF_ASSERT(ring_ == nullptr);
  if (!config.address_known) return fail(ErrorKind::InvalidArgument, "queue {}: a kick before its addresses", index_);
  const auto ring = find_ring(*memory);
  if (!ring) return tl::unexpected(ring.error());
  ring_ = virtio::Virtqueue::create(*ring, session_.ring_options(), config.base, memory->table(), inflight);
  memory_ = std::move(memory);
  keeps_inflight_ = !inflight.empty();
  broken_ = stopping_ = false;
  postponed_ = unpublished_ = 0;
  update_log();
  kick_ = std::move(kick);
  watch_kick();
  // Without a kick too: the ring may hold what an earlier back-end was not told of, or did not finish.
  process_later_.schedule();
  return {};
}

void VhostQueue::set_kick(UniqueFd kick) {
  server_.reactor_.unwatch(watch_);
  kick_ = std::move(kick);
  watch_kick();
  process_later_.schedule();
}

void VhostQueue::watch_kick() {
  // Edge-triggered and never read: every write to an eventfd is an edge.
  watch_ = server_.reactor_.watch(kick_.get(), EPOLLIN | EPOLLET, [this](uint32_t) { kicked(); });
}

void VhostQueue::set_enabled(bool enabled) {
  config.enabled = enabled;
  if (enabled && started()) process_later_.schedule();
}

Status VhostQueue::move(VhostMemory::Ptr memory) {
  if (!started()) return {};
  const auto ring = find_ring(*memory);
  if (!ring) {
    break_down(ring.error().text);
    return tl::unexpected(ring.error());
  }
  ring_->move(*ring, memory->table());
  memory_ = std::move(memory);
  update_log();
  return {};
}

void VhostQueue::update_log() {
  if (!started()) return;
  const virtio::DirtyLog* log = session_.dirty_log();
  if (log == nullptr || (config.address.flags & vhost::kVringFlagLog) == 0) return ring_->set_log({});
  const bool packed = session_.ring_options().packed;
  // A packed ring is written in the descriptor ring too, for which the message has no log address.
  const auto descriptors = memory_->table().guest_of_user(config.address.descriptor);
  const auto device = memory_->table().guest_of_user(config.address.used);
  ring_->set_log(
      {.log = log, .device = packed ? device.value_or(0) : config.address.log, .descriptors = descriptors.value_or(0)});
  ring_->log_all();
}

void VhostQueue::kicked() {
  ++server_.totals_.kicks_total;
  process();
}

void VhostQueue::process() {
  if (!started() || stopping_ || broken_ || !config.enabled || processing_ || session_.closed()) return;
  processing_ = true;
  ring_->stop_notifications();
  unsigned taken = 0;
  for (;;) {
    // More than the ring can hold is a driver that lies; goes on when something is done.
    if (inflight_ + unpublished_ + postponed_ >= ring_->size()) break;
    if (taken == server_.limits_.chains_per_turn) {
      process_later_.schedule();
      break;
    }
    VhostRequest& request = server_.take_request();
    const virtio::Virtqueue::Take take = ring_->take(request.chain);
    if (take != virtio::Virtqueue::Take::Taken) {
      server_.give_back(request);
      if (take == virtio::Virtqueue::Take::Broken) {
        break_down(to_string(ring_->fault()));
        break;
      }
      if (!ring_->want_notifications()) break;
      continue;
    }
    ++taken;
    ++requests_;
    ++inflight_;
    ++server_.totals_.requests_total;
    if (request.start(server_, *this, memory_)) continue;
    --inflight_;
    server_.give_back(request);
    break_down("a chain without a status byte in the guest's memory");
    break;
  }
  processing_ = false;
}

void VhostQueue::request_done(VhostRequest& request) {
  if (request.postponed()) {
    ++postponed_;
    --inflight_;
    server_.give_back(request);
    return check_stopped();
  }
  answer(request);
  server_.give_back(request);
  flush_later_.schedule();
}

void VhostQueue::answer(VhostRequest& request) {
  if (request.status() != virtio::BlkStatus::Ok) ++server_.totals_.errors_total;
  server_.totals_.read_bytes_total += request.read_bytes();
  server_.totals_.written_bytes_total += request.written_bytes();
  if (const virtio::DirtyLog* log = session_.dirty_log(); log != nullptr) {
    bool within = true;
    request.for_each_written([&](uint64_t address, uint64_t length) { within = log->mark(address, length) && within; });
    if (!within) session_.fail_later("the dirty log is smaller than the guest's memory");
  }
  ring_->put(request.chain, request.used_length());
  --inflight_;
  ++unpublished_;
}

// Once per round of the reactor: shows what was done, then looks for more, which is cheaper than waiting for a kick.
void VhostQueue::flush() {
  if (!started()) return;
  if (memory_->damaged()) {
    session_.fail_later("the front-end took away the guest's memory");
    return check_stopped();
  }
  publish();
  if (ring_->log_failed()) session_.fail_later("the dirty log is smaller than the ring's address");
  process();
  check_stopped();
}

void VhostQueue::publish() {
  unpublished_ = 0;
  if (!ring_->publish()) return;
  ++server_.totals_.calls_total;
  signal_event(call_);
}

void VhostQueue::break_down(std::string_view why) {
  if (broken_) return;
  broken_ = true;
  ++server_.totals_.broken_queues_total;
  log::warn("vhost-user-blk volume={} queue={} stopped: {}", server_.config_.name, index_, why);
  signal_event(error_);
}

void VhostQueue::stop(std::function<void()> stopped) {
  stopping_ = true;
  stopped_ = std::move(stopped);
  server_.reactor_.unwatch(std::exchange(watch_, 0));
  process_later_.cancel();
  check_stopped();
}

void VhostQueue::check_stopped() {
  if (!stopping_ || inflight_ > 0 || stopped_ == nullptr) return;
  if (ring_ != nullptr) {
    flush_later_.cancel();
    if (!memory_->damaged()) publish();
    base_ = ring_->base();
  } else {
    base_ = config.base;
  }
  ring_.reset();
  memory_.reset();
  kick_.reset();
  config.base = base_;
  std::exchange(stopped_, nullptr)();
}

}  // namespace vmferry
