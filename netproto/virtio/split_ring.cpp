// SPDX-License-Identifier: Apache-2.0
//
// Order of stores in publish(), so that a back-end killed between any two of them loses and repeats nothing: the list
// of the batch, the used index, the in-flight marks, the region's copy of the used index.
#include "netproto/virtio/split_ring.h"

#include <algorithm>
#include <utility>

#include "engine/base/assert.h"

namespace vmferry::virtio {

namespace {

constexpr uint16_t kNoNotify = 1;     // used.flags: we poll
constexpr uint16_t kNoInterrupt = 1;  // avail.flags: the driver polls

}  // namespace

void SplitInflight::begin(uint16_t queue_size, uint16_t used_index) {
  std::memset(at_, 0, size(queue_size));
  store_shared(at_ + 10, queue_size);
  set_used_index(used_index);
  store_shared(at_ + 8, kVersion, std::memory_order_release);
}

SplitRing::SplitRing(const RingMemory& ring, const RingOptions& options, uint32_t base, const GuestMemory& memory,
                     MutableByteSpan inflight)
    : Virtqueue(ring, options, memory), inflight_(inflight) {
  available_next_ = static_cast<uint16_t>(base);
  // The used index is the guest's word for how far we were; with nothing in flight it equals the base.
  used_next_ = used_published_ = load_shared<uint16_t>(ring_.device + 2);
  batch_.reserve(ring_.size);
  if (inflight_.present()) recover();
}

void SplitRing::recover() {
  if (inflight_.version() == 0) return inflight_.begin(ring_.size, used_next_);
  if (inflight_.version() != SplitInflight::kVersion || inflight_.entries() != ring_.size) {
    failed(ChainFault::RegionDamaged);
    return;
  }
  // A batch that was published, but whose marks were perhaps not all cleared.
  const auto unmarked = static_cast<uint16_t>(used_next_ - inflight_.used_index());
  if (unmarked > ring_.size) {
    failed(ChainFault::RegionDamaged);
    return;
  }
  uint16_t head = inflight_.last_batch();
  for (uint16_t i = 0; i < unmarked; ++i) {
    if (head >= ring_.size) {
      failed(ChainFault::RegionDamaged);
      return;
    }
    inflight_.set_inflight(head, false);
    head = inflight_.next(head);
  }
  inflight_.set_used_index(used_next_);
  std::vector<std::pair<uint64_t, uint16_t>> found;
  for (uint16_t i = 0; i < ring_.size; ++i) {
    if (!inflight_.inflight(i)) continue;
    found.emplace_back(inflight_.counter(i), i);
    counter_ = std::max(counter_, inflight_.counter(i) + 1);
  }
  std::sort(found.begin(), found.end(), std::greater<>());
  for (const auto& [counter, index] : found) resubmit_.push_back(index);
  // Everything that was ever taken is used or in flight: the front-end's idea of the base may be older.
  available_next_ = static_cast<uint16_t>(used_next_ + resubmit_.size());
}

Virtqueue::Descriptor SplitRing::descriptor(uint16_t index) const {
  Descriptor result;
  std::memcpy(&result, ring_.descriptors + kDescriptorSize * index, sizeof result);
  return result;
}

Virtqueue::Take SplitRing::take(Chain& chain) {
  if (fault_ != ChainFault::None) return Take::Broken;
  chain.clear();
  uint16_t head = 0;
  if (!resubmit_.empty()) {
    head = resubmit_.back();
    if (!read_chain(head, chain)) return Take::Broken;
    resubmit_.pop_back();
    return Take::Taken;
  }
  const uint16_t available = available_index(std::memory_order_acquire);
  if (available == available_next_) return Take::Empty;
  if (static_cast<uint16_t>(available - available_next_) > ring_.size) {
    failed(ChainFault::RingIndex);
    return Take::Broken;
  }
  head = load_shared<uint16_t>(ring_.driver + 4 + 2 * (available_next_ & (ring_.size - 1)));
  if (!read_chain(head, chain)) return Take::Broken;
  ++available_next_;
  if (inflight_.present()) {
    inflight_.set_counter(head, counter_++);
    inflight_.set_inflight(head, true);
  }
  return Take::Taken;
}

bool SplitRing::read_chain(uint16_t head, Chain& chain) {
  if (head >= ring_.size) return failed(ChainFault::DescriptorIndex);
  chain.id = head;
  uint16_t index = head;
  for (uint16_t count = 0;; ++count) {
    if (count == ring_.size) return failed(ChainFault::Loop);
    const Descriptor current = descriptor(index);
    if ((current.flags & kIndirect) != 0) {
      if ((current.flags & kNext) != 0) return failed(ChainFault::IndirectChained);
      return read_indirect_chain(current, chain);
    }
    if (!add_buffer(chain, current)) return false;
    if ((current.flags & kNext) == 0) return true;
    index = current.link;
    if (index >= ring_.size) return failed(ChainFault::DescriptorIndex);
  }
}

bool SplitRing::read_indirect_chain(const Descriptor& first, Chain& chain) {
  const size_t entries = read_indirect(first, indirect_);
  if (entries == 0) return false;
  size_t index = 0;
  for (size_t count = 0;; ++count) {
    if (count == entries) return failed(ChainFault::Loop);
    const Descriptor current = indirect_[index];
    if ((current.flags & kIndirect) != 0) return failed(ChainFault::IndirectInIndirect);
    if (!add_buffer(chain, current)) return false;
    if ((current.flags & kNext) == 0) return true;
    index = current.link;
    if (index >= entries) return failed(ChainFault::DescriptorIndex);
  }
}

void SplitRing::put(const Chain& chain, uint32_t written) {
  VF_ASSERT(batch_.size() < ring_.size);
  const uint64_t offset = 4 + 8 * uint64_t{static_cast<uint16_t>(used_next_ & (ring_.size - 1))};
  store_shared<uint32_t>(ring_.device + offset, chain.id);
  store_shared<uint32_t>(ring_.device + offset + 4, written);
  log_device(offset, 8);
  ++used_next_;
  batch_.push_back(chain.id);
}

bool SplitRing::publish() {
  if (batch_.empty()) return false;
  if (inflight_.present()) {
    for (const uint16_t head : batch_) {
      inflight_.set_next(head, inflight_.last_batch());
      inflight_.set_last_batch(head);
    }
  }
  store_shared(ring_.device + 2, used_next_, std::memory_order_release);
  log_device(2, 2);
  if (inflight_.present()) {
    for (const uint16_t head : batch_) inflight_.set_inflight(head, false);
    inflight_.set_used_index(used_next_);
  }
  batch_.clear();
  const uint16_t before = std::exchange(used_published_, used_next_);
  // The driver's wish is read only after it can see the index; it stores and loads in the opposite order.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (options_.event_idx)
    return event_passed(load_shared<uint16_t>(ring_.driver + 4 + 2 * ring_.size), used_next_, before);
  return (load_shared<uint16_t>(ring_.driver) & kNoInterrupt) == 0;
}

void SplitRing::stop_notifications() {
  if (options_.event_idx) return;  // an event index that is behind asks for nothing
  store_shared(ring_.device, kNoNotify);
  log_device(0, 2);
}

bool SplitRing::want_notifications() {
  if (fault_ != ChainFault::None) return false;
  if (!resubmit_.empty()) return true;
  if (options_.event_idx) {
    const uint64_t offset = 4 + 8 * uint64_t{ring_.size};
    store_shared(ring_.device + offset, available_next_);
    log_device(offset, 2);
  } else {
    store_shared<uint16_t>(ring_.device, 0);
    log_device(0, 2);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return available_index(std::memory_order_acquire) != available_next_;
}

}  // namespace vmferry::virtio
