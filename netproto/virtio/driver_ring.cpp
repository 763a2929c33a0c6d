// SPDX-License-Identifier: Apache-2.0
#include "netproto/virtio/driver_ring.h"

#include <utility>

#include "engine/base/assert.h"

namespace vmferry::virtio {

namespace {

constexpr uint64_t kDescriptor = 16;
constexpr uint16_t kNext = 1;
constexpr uint16_t kWrite = 2;
constexpr uint16_t kIndirect = 4;
constexpr uint16_t kAvailable = 1U << 7;
constexpr uint16_t kUsed = 1U << 15;
constexpr uint16_t kDisable = 1;
constexpr uint16_t kEventDescriptor = 2;
constexpr uint16_t kNoId = 0xffff;

}  // namespace

uint64_t DriverRing::memory_size(const RingOptions& options, uint16_t size) {
  const RingSizes sizes = ring_sizes(options.packed, size);
  const uint64_t rings = round_up(sizes.descriptors, 64) + round_up(sizes.driver, 64) + round_up(sizes.device, 64);
  const uint64_t tables = options.indirect ? kDescriptor * kIndirectLengthMax * size : 0;
  return round_up(round_up(rings, 64) + tables, 4096);
}

DriverRing::DriverRing(const RingOptions& options, uint16_t size, uint8_t* memory, uint64_t guest_address)
    : options_(options), guest_address_(guest_address), slots_(size), free_count_(size) {
  const RingSizes sizes = ring_sizes(options.packed, size);
  driver_offset_ = round_up(sizes.descriptors, 64);
  device_offset_ = driver_offset_ + round_up(sizes.driver, 64);
  tables_offset_ = device_offset_ + round_up(sizes.device, 64);
  ring_ = {size, memory, memory + driver_offset_, memory + device_offset_};
  free_next_.resize(size);
  id_of_head_.resize(size, kNoId);
  for (uint16_t i = 0; i < size; ++i) free_next_[i] = static_cast<uint16_t>(i + 1);
}

void DriverRing::write_descriptor(uint8_t* at, const Buffer& buffer, uint16_t flags, uint16_t link, bool table) const {
  store_shared(at, buffer.address);
  store_shared(at + 8, buffer.length);
  // Packed: id, then flags; within a table the id has no meaning.
  store_shared(at + (options_.packed ? 12 : 14), link);
  if (!options_.packed || table) store_shared(at + (options_.packed ? 14 : 12), flags);
}

Buffer DriverRing::make_table(uint16_t id, std::span<const Buffer> buffers, size_t readable) const {
  const uint64_t offset = tables_offset_ + kDescriptor * kIndirectLengthMax * id;
  for (size_t i = 0; i < buffers.size(); ++i) {
    const bool more = !options_.packed && i + 1 < buffers.size();
    const auto flags = static_cast<uint16_t>((more ? kNext : 0) | (i >= readable ? kWrite : 0));
    const auto link = static_cast<uint16_t>(more ? i + 1 : 0);
    write_descriptor(ring_.descriptors + offset + kDescriptor * i, buffers[i], flags, link, true);
  }
  return {guest_address_ + offset, static_cast<uint32_t>(kDescriptor * buffers.size())};
}

bool DriverRing::add(uint16_t id, std::span<const Buffer> readable, std::span<const Buffer> writable) {
  VF_ASSERT(id < ring_.size && slots_[id] == 0 && readable.size() + writable.size() > 0);
  buffers_.assign(readable.begin(), readable.end());
  buffers_.insert(buffers_.end(), writable.begin(), writable.end());
  return options_.packed ? add_packed(id, buffers_, readable.size()) : add_split(id, buffers_, readable.size());
}

bool DriverRing::add_split(uint16_t id, std::span<const Buffer> buffers, size_t readable) {
  const bool indirect = options_.indirect && buffers.size() > 1 && buffers.size() <= kIndirectLengthMax;
  const size_t slots = indirect ? 1 : buffers.size();
  if (slots > free_count_) return false;
  const uint16_t head = free_head_;
  if (indirect) {
    write_descriptor(ring_.descriptors + kDescriptor * head, make_table(id, buffers, readable), kIndirect, 0, false);
    free_head_ = free_next_[head];
  } else {
    for (size_t i = 0; i < buffers.size(); ++i) {
      const uint16_t at = free_head_;
      free_head_ = free_next_[at];
      const bool more = i + 1 < buffers.size();
      const auto flags = static_cast<uint16_t>((more ? kNext : 0) | (i >= readable ? kWrite : 0));
      write_descriptor(ring_.descriptors + kDescriptor * at, buffers[i], flags, more ? free_head_ : uint16_t{0}, false);
    }
  }
  free_count_ = static_cast<uint16_t>(free_count_ - slots);
  slots_[id] = static_cast<uint16_t>(slots);
  id_of_head_[head] = id;
  store_shared(ring_.driver + 4 + 2 * (available_ & (ring_.size - 1)), head);
  ++available_;
  return true;
}

bool DriverRing::add_packed(uint16_t id, std::span<const Buffer> buffers, size_t readable) {
  const bool indirect = options_.indirect && buffers.size() > 1 && buffers.size() <= kIndirectLengthMax;
  const size_t slots = indirect ? 1 : buffers.size();
  if (slots > free_count_) return false;
  const uint16_t head = available_at_;
  uint16_t head_flags = 0;
  for (size_t i = 0; i < slots; ++i) {
    const bool more = i + 1 < slots;
    auto flags = static_cast<uint16_t>(available_wrap_ ? kAvailable : kUsed);
    if (indirect) {
      flags |= kIndirect;
    } else {
      flags = static_cast<uint16_t>(flags | (more ? kNext : 0) | (i >= readable ? kWrite : 0));
    }
    uint8_t* at = ring_.descriptors + kDescriptor * available_at_;
    write_descriptor(at, indirect ? make_table(id, buffers, readable) : buffers[i], 0, id, false);
    // The device looks at the first one: its flags are written last.
    if (i == 0) {
      head_flags = flags;
    } else {
      store_shared(at + 14, flags);
    }
    if (++available_at_ == ring_.size) {
      available_at_ = 0;
      available_wrap_ = !available_wrap_;
    }
  }
  store_shared(ring_.descriptors + kDescriptor * head + 14, head_flags, std::memory_order_release);
  free_count_ = static_cast<uint16_t>(free_count_ - slots);
  slots_[id] = static_cast<uint16_t>(slots);
  added_ = static_cast<uint16_t>(added_ + slots);
  return true;
}

bool DriverRing::publish() {
  if (!options_.packed) {
    store_shared(ring_.driver + 2, available_, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const uint16_t before = std::exchange(published_, available_);
    if (before == available_) return false;
    if (options_.event_idx)
      return event_passed(load_shared<uint16_t>(ring_.device + 4 + 8 * ring_.size), available_, before);
    return (load_shared<uint16_t>(ring_.device) & kDisable) == 0;
  }
  const uint16_t added = std::exchange(added_, uint16_t{0});
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (added == 0) return false;
  const uint16_t wish = load_shared<uint16_t>(ring_.device + 2);
  if (wish == kDisable) return false;
  if (wish != kEventDescriptor) return true;
  const uint16_t event = load_shared<uint16_t>(ring_.device);
  auto offset = static_cast<uint16_t>(event & 0x7fff);
  if (((event & 0x8000) != 0) != available_wrap_) offset = static_cast<uint16_t>(offset - ring_.size);
  return event_passed(offset, available_at_, static_cast<uint16_t>(available_at_ - added));
}

bool DriverRing::packed_used_ready() const {
  const auto flags = load_shared<uint16_t>(ring_.descriptors + kDescriptor * used_at_ + 14, std::memory_order_acquire);
  return ((flags & kAvailable) != 0) == used_wrap_ && ((flags & kUsed) != 0) == used_wrap_;
}

std::optional<DriverRing::Used> DriverRing::reap() {
  Used used;
  if (broken_) return std::nullopt;
  if (options_.packed) {
    if (!packed_used_ready()) return std::nullopt;
    const uint8_t* at = ring_.descriptors + kDescriptor * used_at_;
    used = {load_shared<uint16_t>(at + 12), load_shared<uint32_t>(at + 8)};
    if (used.id >= ring_.size || slots_[used.id] == 0) return broken_ = true, std::nullopt;
    used_at_ = static_cast<uint16_t>(used_at_ + slots_[used.id]);
    if (used_at_ >= ring_.size) {
      used_at_ = static_cast<uint16_t>(used_at_ - ring_.size);
      used_wrap_ = !used_wrap_;
    }
  } else {
    if (load_shared<uint16_t>(ring_.device + 2, std::memory_order_acquire) == used_) return std::nullopt;
    const uint8_t* at = ring_.device + 4 + 8 * (used_ & (ring_.size - 1));
    const uint32_t head = load_shared<uint32_t>(at);
    if (head >= ring_.size || id_of_head_[head] == kNoId) return broken_ = true, std::nullopt;
    used = {std::exchange(id_of_head_[head], kNoId), load_shared<uint32_t>(at + 4)};
    ++used_;
    uint16_t tail = static_cast<uint16_t>(head);
    for (uint16_t i = 1; i < slots_[used.id]; ++i) tail = free_next_[tail];
    free_next_[tail] = free_head_;
    free_head_ = static_cast<uint16_t>(head);
  }
  free_count_ = static_cast<uint16_t>(free_count_ + std::exchange(slots_[used.id], uint16_t{0}));
  return used;
}

void DriverRing::stop_calls() {
  if (options_.packed) return store_shared(ring_.driver + 2, kDisable);
  if (!options_.event_idx) store_shared(ring_.driver, kDisable);
}

bool DriverRing::want_calls() {
  if (options_.packed) {
    if (options_.event_idx) {
      store_shared(ring_.driver, static_cast<uint16_t>(used_at_ | (used_wrap_ ? 0x8000U : 0U)));
      store_shared(ring_.driver + 2, kEventDescriptor, std::memory_order_release);
    } else {
      store_shared<uint16_t>(ring_.driver + 2, 0);
    }
  } else if (options_.event_idx) {
    store_shared(ring_.driver + 4 + 2 * ring_.size, used_);
  } else {
    store_shared<uint16_t>(ring_.driver, 0);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (options_.packed) return packed_used_ready();
  return load_shared<uint16_t>(ring_.device + 2, std::memory_order_acquire) != used_;
}

}  // namespace vmferry::virtio
