// SPDX-License-Identifier: Apache-2.0
//
// Used descriptors become visible one by one, each with its own change of the in-flight region. Making a batch visible
// at once, by writing the first flags last, would leave used flags of the later ones in the ring when we are killed
// half way; the next back-end then answers the first request alone, and the driver takes the stale ones for answers.
#include "netproto/virtio/packed_ring.h"

#include <algorithm>
#include <utility>

#include "engine/base/assert.h"

namespace vmferry::virtio {

namespace {

constexpr uint16_t kAvailable = 1U << 7;
constexpr uint16_t kUsed = 1U << 15;

// Event suppression areas: offset and wrap counter, then flags.
constexpr uint16_t kEventEnable = 0;
constexpr uint16_t kEventDisable = 1;
constexpr uint16_t kEventDescriptor = 2;

}  // namespace

void PackedInflight::begin(uint16_t queue_size, uint16_t used_index, bool used_wrap) {
  std::memset(at_, 0, size(queue_size));
  store_shared(at_ + 10, queue_size);
  for (uint16_t i = 0; i < queue_size; ++i) set_next(i, static_cast<uint16_t>(i + 1));  // the last: end of the list
  set_current({0, used_index, used_wrap});
  set_old({0, used_index, used_wrap});
  store_shared(at_ + 8, kVersion, std::memory_order_release);
}

void PackedInflight::set_current(const Position& position) {
  store_shared(at_ + 12, position.free_head);
  store_shared(at_ + 16, position.used_index);
  store_shared<uint8_t>(at_ + 20, position.used_wrap ? 1 : 0);
}

void PackedInflight::set_old(const Position& position) {
  store_shared(at_ + 14, position.free_head, std::memory_order_release);
  store_shared(at_ + 18, position.used_index);
  store_shared<uint8_t>(at_ + 21, position.used_wrap ? 1 : 0);
}

void PackedInflight::set_descriptor(uint16_t i, uint16_t id, uint16_t flags, uint32_t length, uint64_t address) {
  uint8_t* at = entry(i);
  store_shared(at + 16, id);
  store_shared(at + 18, flags);
  store_shared(at + 20, length);
  store_shared(at + 24, address);
}

void PackedRing::Place::advance(uint16_t count, uint16_t size) {
  const uint32_t next = uint32_t{index} + count;
  if (next >= size) wrap = !wrap;
  index = static_cast<uint16_t>(next >= size ? next - size : next);
}

PackedRing::PackedRing(const RingMemory& ring, const RingOptions& options, uint32_t base, const GuestMemory& memory,
                       MutableByteSpan inflight)
    : Virtqueue(ring, options, memory), inflight_(inflight) {
  available_ = {static_cast<uint16_t>((base & 0x7fff) % ring.size), (base & 0x8000) != 0};
  used_ = {static_cast<uint16_t>((base >> 16 & 0x7fff) % ring.size), (base >> 31) != 0};
  batch_.reserve(ring.size);
  if (inflight_.present()) recover();
}

uint32_t PackedRing::base() const {
  return available_.packed() | uint32_t{used_.packed()} << 16;
}

uint16_t PackedRing::flags_at(uint16_t index, std::memory_order order) const {
  return load_shared<uint16_t>(descriptor_at(index) + 14, order);
}

bool PackedRing::available(const Place& place) const {
  const uint16_t flags = flags_at(place.index, std::memory_order_acquire);
  return ((flags & kAvailable) != 0) == place.wrap && ((flags & kUsed) != 0) != place.wrap;
}

void PackedRing::recover() {
  if (inflight_.version() == 0) return inflight_.begin(ring_.size, used_.index, used_.wrap);
  const auto repaired = repair_region();
  if (!repaired) {
    failed(ChainFault::RegionDamaged);
    return;
  }
  // The front-end cannot know how far a killed back-end was; the region does.
  const PackedInflight::Position& position = *repaired;
  used_ = available_ = {position.used_index, position.used_wrap};
  std::vector<std::pair<uint64_t, uint16_t>> found;
  uint32_t slots = 0;
  for (uint16_t i = 0; i < ring_.size; ++i) {
    if (!inflight_.inflight(i)) continue;
    found.emplace_back(inflight_.counter(i), i);
    slots += inflight_.count(i);
    counter_ = std::max(counter_, inflight_.counter(i) + 1);
  }
  if (slots > ring_.size) {
    failed(ChainFault::RegionDamaged);
    return;
  }
  available_.advance(static_cast<uint16_t>(slots), ring_.size);
  std::sort(found.begin(), found.end(), std::greater<>());
  for (const auto& [counter, index] : found) resubmit_.push_back(index);
}

// Completes or takes back the change that was under way when the last back-end ended. What holds now, as it was
// checked: the front-end can change the region at any moment, so nothing is read from it twice.
std::optional<PackedInflight::Position> PackedRing::repair_region() {
  if (inflight_.version() != PackedInflight::kVersion || inflight_.entries() != ring_.size) return std::nullopt;
  auto position = inflight_.old();
  const auto current = inflight_.current();
  if (position.used_index >= ring_.size || current.used_index >= ring_.size) return std::nullopt;
  if (position.used_index != current.used_index || position.used_wrap != current.used_wrap) {
    const uint16_t flags = flags_at(position.used_index, std::memory_order_acquire) & (kAvailable | kUsed);
    const uint16_t still_available = position.used_wrap ? kAvailable : kUsed;
    if (flags != still_available) position = current;  // the driver could see it
  }
  inflight_.set_old(position);
  inflight_.set_current(position);
  uint16_t free = position.free_head;
  for (uint16_t i = 0; i < ring_.size && free < ring_.size; ++i) {
    inflight_.set_inflight(free, false);
    free = inflight_.next(free);
  }
  return position;
}

Virtqueue::Take PackedRing::take(Chain& chain) {
  if (fault_ != ChainFault::None) return Take::Broken;
  chain.clear();
  if (!resubmit_.empty()) {
    if (!read_saved(resubmit_.back(), chain)) return Take::Broken;
    resubmit_.pop_back();
    return Take::Taken;
  }
  if (!available(available_)) return Take::Empty;
  if (!read_chain(chain)) return Take::Broken;
  if (inflight_.present() && !note_taken(chain)) return Take::Broken;
  available_.advance(chain.slots, ring_.size);
  return Take::Taken;
}

bool PackedRing::read_chain(Chain& chain) {
  taken_.clear();
  Place place = available_;
  for (;;) {
    if (taken_.size() == ring_.size) return failed(ChainFault::Loop);
    const uint8_t* at = descriptor_at(place.index);
    Descriptor current;
    current.flags = flags_at(place.index, std::memory_order_acquire);
    current.address = load_shared<uint64_t>(at);
    current.length = load_shared<uint32_t>(at + 8);
    current.link = load_shared<uint16_t>(at + 12);
    taken_.push_back(current);
    if ((current.flags & kIndirect) != 0) {
      if (taken_.size() > 1 || (current.flags & kNext) != 0) return failed(ChainFault::IndirectChained);
      if (!add_indirect(current, chain)) return false;
    } else if (!add_buffer(chain, current)) {
      return false;
    }
    if ((current.flags & kNext) == 0) break;
    place.advance(1, ring_.size);
  }
  chain.id = taken_.back().link;  // the id of a chain is in its last descriptor
  chain.slots = static_cast<uint16_t>(taken_.size());
  // An id is the driver's own number, but it names a buffer of this ring.
  return chain.id < ring_.size || failed(ChainFault::DescriptorIndex);
}

// The table of a packed ring is in order: no links, NEXT has no meaning (virtio 1.2, 2.8.7).
bool PackedRing::add_indirect(const Descriptor& descriptor, Chain& chain) {
  const size_t entries = read_indirect(descriptor, indirect_);
  for (size_t i = 0; i < entries; ++i) {
    Descriptor current = indirect_[i];
    std::swap(current.flags, current.link);  // the packed layout has them in the other order
    if ((current.flags & kIndirect) != 0) return failed(ChainFault::IndirectInIndirect);
    if (!add_buffer(chain, current)) return false;
  }
  return entries > 0;
}

bool PackedRing::note_taken(Chain& chain) {
  const uint16_t head = inflight_.current().free_head;
  uint16_t free = head;
  if (head >= ring_.size) return failed(ChainFault::RegionDamaged);
  chain.state = head;
  inflight_.set_counter(head, counter_++);
  inflight_.set_count(head, chain.slots);
  inflight_.set_inflight(head, true);
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (free >= ring_.size) return failed(ChainFault::RegionDamaged);
    const Descriptor& entry = taken_[i];
    inflight_.set_descriptor(free, entry.link, entry.flags, entry.length, entry.address);
    if (i + 1 == taken_.size()) inflight_.set_last(head, free);
    free = inflight_.next(free);
  }
  inflight_.set_free_head(free);
  std::atomic_thread_fence(std::memory_order_release);
  inflight_.set_old_free_head(free);
  return true;
}

// A chain that an earlier back-end had taken, from the region's copy.
bool PackedRing::read_saved(uint16_t head, Chain& chain) {
  const uint16_t count = inflight_.count(head);
  if (count == 0 || count > ring_.size) return failed(ChainFault::RegionDamaged);
  uint16_t entry = head;
  for (uint16_t i = 0; i < count; ++i) {
    if (entry >= ring_.size) return failed(ChainFault::RegionDamaged);
    const Descriptor current{inflight_.address(entry), inflight_.length(entry), inflight_.flags(entry), 0};
    chain.id = inflight_.id(entry);
    if ((current.flags & kIndirect) != 0) {
      if (count != 1) return failed(ChainFault::IndirectChained);
      if (!add_indirect(current, chain)) return false;
    } else if (!add_buffer(chain, current)) {
      return false;
    }
    entry = inflight_.next(entry);
  }
  chain.slots = count;
  chain.state = head;
  return chain.id < ring_.size || failed(ChainFault::RegionDamaged);
}

void PackedRing::put(const Chain& chain, uint32_t written) {
  VF_ASSERT(batch_.size() < ring_.size);
  batch_.push_back({chain.id, chain.slots, chain.state, written});
}

bool PackedRing::publish() {
  if (batch_.empty()) return false;
  uint16_t advanced = 0;
  for (const Done& done : batch_) {
    const Place place = used_;
    used_.advance(done.slots, ring_.size);
    advanced = static_cast<uint16_t>(advanced + done.slots);
    if (inflight_.present()) {
      const uint16_t last = inflight_.last(done.state);
      if (last < ring_.size) inflight_.set_next(last, inflight_.current().free_head);
      inflight_.set_current({done.state, used_.index, used_.wrap});
    }
    uint8_t* at = descriptor_at(place.index);
    store_shared<uint32_t>(at + 8, done.written);
    store_shared<uint16_t>(at + 12, done.id);
    const auto flags = static_cast<uint16_t>((place.wrap ? kAvailable | kUsed : 0) | (done.written > 0 ? kWrite : 0));
    store_shared(at + 14, flags, std::memory_order_release);
    log_descriptors(kDescriptorSize * uint64_t{place.index}, kDescriptorSize);
    if (inflight_.present()) {
      inflight_.set_inflight(done.state, false);
      inflight_.set_old(inflight_.current());
    }
  }
  batch_.clear();
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const uint16_t wish = load_shared<uint16_t>(ring_.driver + 2);
  if (wish == kEventDisable) return false;
  if (wish != kEventDescriptor || !options_.event_idx) return true;
  const uint16_t event = load_shared<uint16_t>(ring_.driver);
  auto offset = static_cast<uint16_t>(event & 0x7fff);
  if (((event & 0x8000) != 0) != used_.wrap) offset = static_cast<uint16_t>(offset - ring_.size);
  return event_passed(offset, used_.index, static_cast<uint16_t>(used_.index - advanced));
}

void PackedRing::stop_notifications() {
  store_shared(ring_.device + 2, kEventDisable);
  log_device(0, 4);
}

bool PackedRing::want_notifications() {
  if (fault_ != ChainFault::None) return false;
  if (!resubmit_.empty()) return true;
  if (options_.event_idx) {
    store_shared(ring_.device, available_.packed());
    store_shared(ring_.device + 2, kEventDescriptor, std::memory_order_release);
  } else {
    store_shared(ring_.device + 2, kEventEnable);
  }
  log_device(0, 4);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return available(available_);
}

}  // namespace vmferry::virtio
