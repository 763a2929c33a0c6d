// SPDX-License-Identifier: Apache-2.0
//
// Messages about memory that is shared with the front-end: the guest's, the dirty log, the in-flight region.
#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>

#include "blockdev/vhost/vhost_server.h"
#include "blockdev/vhost/vhost_session.h"
#include "engine/base/log.h"

namespace vmferry {

using vhost::Request;

namespace {

constexpr uint64_t kInflightAlignment = 64;  // of each queue's part
constexpr uint64_t kLogSizeMax = 512_MiB;    // a bit per 4 KiB: 16 TiB of guest addresses

uint64_t inflight_stride(bool packed, uint16_t queue_size) {
  return round_up(virtio::inflight_size(packed, queue_size), kInflightAlignment);
}

}  // namespace

Result<VhostSession::Outcome> VhostSession::handle_memory(const vhost::Message& message, VhostPacket& packet) {
  switch (message.request) {
    case Request::SetMemTable:
      return install(VhostMemory::create(std::get<vhost::MemoryTable>(message.body).regions, packet.fds));
    case Request::GetMaxMemSlots:
      reply(message.request, vhost::NumberBody{vhost::kMemSlotsMax});
      return Outcome::Replied;
    case Request::AddMemReg:
      if (memory_->table().regions().size() >= vhost::kMemSlotsMax)
        return fail(ErrorKind::LimitExceeded, "all {} memory slots are in use", vhost::kMemSlotsMax);
      return install(memory_->with(std::get<vhost::MemoryRegion>(message.body), packet.fds.front()));
    case Request::RemMemReg:
      return install(memory_->without(std::get<vhost::MemoryRegion>(message.body)));
    case Request::SetLogBase:
      return set_log(std::get<vhost::LogArea>(message.body), packet.fds.front());
    case Request::GetInflightFd:
      return make_inflight(std::get<vhost::Inflight>(message.body));
    default:
      return take_inflight(std::get<vhost::Inflight>(message.body), packet.fds.front());
  }
}

// Requests in flight keep the memory that they were read with; running rings move over at once or stop.
Result<VhostSession::Outcome> VhostSession::install(Result<VhostMemory::Ptr> memory) {
  if (!memory) return tl::unexpected(memory.error());
  memory_ = std::move(*memory);
  Status first;
  for (const auto& queue : queues_)
    if (Status moved = queue->move(memory_); !moved && first) first = moved;
  if (!first) return tl::unexpected(first.error());
  return Outcome::Done;
}

Result<VhostSession::Outcome> VhostSession::set_log(const vhost::LogArea& area, const UniqueFd& fd) {
  if ((protocol_features_ & vhost::kProtocolLogShmfd) == 0)
    return fail(ErrorKind::InvalidArgument, "a log without shared memory was not agreed");
  if (area.size > kLogSizeMax)
    return fail(ErrorKind::LimitExceeded, "a dirty log of {} bytes, the limit is {}", area.size, kLogSizeMax);
  auto mapping = SharedMapping::map(fd.get(), area.offset, area.size);
  if (!mapping) return fail_with(mapping.error(), "dirty log");
  log_ = virtio::DirtyLog(mapping->data(), mapping->size());
  log_mapping_ = std::move(*mapping);
  update_logs();
  reply(Request::SetLogBase, vhost::NumberBody{0});
  return Outcome::Replied;
}

const virtio::DirtyLog* VhostSession::dirty_log() const {
  return (features_ & vhost::kFeatureLogAll) != 0 && log_.active() ? &log_ : nullptr;
}

void VhostSession::update_logs() {
  for (const auto& queue : queues_) queue->update_log();
}

// A running ring writes to the region that it was started with: that one must stay mapped.
Status VhostSession::no_queue_uses_inflight() const {
  for (const auto& queue : queues_)
    if (queue->started()) return fail(ErrorKind::InvalidArgument, "in-flight region while a queue is running");
  return {};
}

Result<VhostSession::Outcome> VhostSession::make_inflight(const vhost::Inflight& wanted) {
  const bool packed = ring_options().packed;
  if (wanted.queues == 0 || wanted.queues > queues_.size() || !virtio::valid_queue_size(packed, wanted.queue_size))
    return fail(ErrorKind::InvalidArgument, "in-flight region for {} queues of {}", wanted.queues, wanted.queue_size);
  if (Status idle = no_queue_uses_inflight(); !idle) return tl::unexpected(idle.error());
  vhost::Inflight shape = wanted;
  shape.mmap_size = round_up(wanted.queues * inflight_stride(packed, wanted.queue_size), 4096);
  shape.mmap_offset = 0;
  const UniqueFd fd(::memfd_create("vhost-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return fail(ErrorKind::LimitExceeded, "memfd_create: {}", errno_text(errno));
  if (::ftruncate(fd.get(), static_cast<off_t>(shape.mmap_size)) != 0)
    return fail(ErrorKind::LimitExceeded, "in-flight region of {} bytes: {}", shape.mmap_size, errno_text(errno));
  ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  auto mapping = SharedMapping::map(fd.get(), 0, shape.mmap_size);
  if (!mapping) return tl::unexpected(mapping.error());
  inflight_ = std::move(*mapping);
  inflight_shape_ = shape;
  reply(Request::GetInflightFd, shape, fd.get());
  return Outcome::Replied;
}

Result<VhostSession::Outcome> VhostSession::take_inflight(const vhost::Inflight& given, const UniqueFd& fd) {
  const bool packed = ring_options().packed;
  if (given.queues == 0 || given.queues > queues_.size() || !virtio::valid_queue_size(packed, given.queue_size) ||
      given.mmap_size < given.queues * inflight_stride(packed, given.queue_size))
    return fail(ErrorKind::InvalidArgument, "in-flight region of {} bytes for {} queues of {}", given.mmap_size,
                given.queues, given.queue_size);
  if (Status idle = no_queue_uses_inflight(); !idle) return tl::unexpected(idle.error());
  auto mapping =
      SharedMapping::map(fd.get(), given.mmap_offset, given.queues * inflight_stride(packed, given.queue_size));
  if (!mapping) return fail_with(mapping.error(), "in-flight region");
  inflight_ = std::move(*mapping);
  inflight_shape_ = given;
  return Outcome::Done;
}

MutableByteSpan VhostSession::inflight_of(const VhostQueue& queue, uint32_t index) const {
  if (!inflight_ || index >= inflight_shape_.queues || queue.config.size != inflight_shape_.queue_size) return {};
  const bool packed = ring_options().packed;
  const uint64_t size = virtio::inflight_size(packed, queue.config.size);
  const uint64_t offset = index * inflight_stride(packed, queue.config.size);
  // The features may have changed since the region was shaped.
  if (!fits_in(offset, size, inflight_.size())) return {};
  return inflight_.span().subspan(offset, size);
}

}  // namespace vmferry
