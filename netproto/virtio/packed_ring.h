// SPDX-License-Identifier: Apache-2.0
//
// A packed virtqueue, device's side. Source of truth: virtio 1.2, 2.8; vhost-user.rst for the in-flight region.
//
// A chain is read from consecutive descriptors; its used descriptor later overwrites the ring at another place, so the
// in-flight region keeps copies of the descriptors, linked from a free list. Threads: as Virtqueue.
#pragma once

#include <optional>

#include "netproto/virtio/virtqueue.h"

namespace vmferry::virtio {

// One queue's part of the in-flight region. The accessors check nothing; PackedRing checks every index it reads here.
class PackedInflight {
 public:
  static constexpr size_t kHeaderSize = 32;
  static constexpr size_t kEntrySize = 32;
  static constexpr uint16_t kVersion = 1;
  static uint64_t size(uint16_t queue_size) { return kHeaderSize + kEntrySize * uint64_t{queue_size}; }

  explicit PackedInflight(MutableByteSpan region) : at_(region.data()) {}
  bool present() const { return at_ != nullptr; }
  void begin(uint16_t queue_size, uint16_t used_index, bool used_wrap);

  uint16_t version() const { return load_shared<uint16_t>(at_ + 8); }
  uint16_t entries() const { return load_shared<uint16_t>(at_ + 10); }
  // Header fields come in pairs: what is being changed, and what holds while it is.
  struct Position {
    uint16_t free_head = 0;
    uint16_t used_index = 0;
    bool used_wrap = false;
  };
  Position current() const { return {number(12), number(16), load_shared<uint8_t>(at_ + 20) != 0}; }
  Position old() const { return {number(14), number(18), load_shared<uint8_t>(at_ + 21) != 0}; }
  void set_current(const Position& position);
  void set_old(const Position& position);
  void set_free_head(uint16_t value) { store_shared(at_ + 12, value); }
  void set_old_free_head(uint16_t value) { store_shared(at_ + 14, value); }

  bool inflight(uint16_t i) const { return load_shared<uint8_t>(entry(i)) != 0; }
  void set_inflight(uint16_t i, bool on) { store_shared<uint8_t>(entry(i), on ? 1 : 0, std::memory_order_release); }
  uint16_t next(uint16_t i) const { return field16(i, 2); }
  uint16_t last(uint16_t i) const { return field16(i, 4); }
  uint16_t count(uint16_t i) const { return field16(i, 6); }
  uint64_t counter(uint16_t i) const { return load_shared<uint64_t>(entry(i) + 8); }
  uint16_t id(uint16_t i) const { return field16(i, 16); }
  uint16_t flags(uint16_t i) const { return field16(i, 18); }
  uint32_t length(uint16_t i) const { return load_shared<uint32_t>(entry(i) + 20); }
  uint64_t address(uint16_t i) const { return load_shared<uint64_t>(entry(i) + 24); }
  void set_next(uint16_t i, uint16_t value) { store_shared(entry(i) + 2, value); }
  void set_last(uint16_t i, uint16_t value) { store_shared(entry(i) + 4, value); }
  void set_count(uint16_t i, uint16_t value) { store_shared(entry(i) + 6, value); }
  void set_counter(uint16_t i, uint64_t value) { store_shared(entry(i) + 8, value); }
  void set_descriptor(uint16_t i, uint16_t id, uint16_t flags, uint32_t length, uint64_t address);

 private:
  uint16_t number(size_t offset) const { return load_shared<uint16_t>(at_ + offset); }
  uint16_t field16(uint16_t i, size_t offset) const { return load_shared<uint16_t>(entry(i) + offset); }
  uint8_t* entry(uint16_t i) const { return at_ + kHeaderSize + kEntrySize * i; }
  uint8_t* at_;
};

class PackedRing final : public Virtqueue {
 public:
  PackedRing(const RingMemory& ring, const RingOptions& options, uint32_t base, const GuestMemory& memory,
             MutableByteSpan inflight);

  Take take(Chain& chain) override;
  void put(const Chain& chain, uint32_t written) override;
  bool publish() override;
  void stop_notifications() override;
  bool want_notifications() override;
  uint32_t base() const override;

 private:
  struct Place {
    uint16_t index = 0;
    bool wrap = true;
    void advance(uint16_t count, uint16_t size);
    uint16_t packed() const { return static_cast<uint16_t>(index | (wrap ? 0x8000U : 0U)); }
  };
  struct Done {
    uint16_t id;
    uint16_t slots;
    uint16_t state;
    uint32_t written;
  };

  uint8_t* descriptor_at(uint16_t index) const { return ring_.descriptors + kDescriptorSize * index; }
  uint16_t flags_at(uint16_t index, std::memory_order order) const;
  bool available(const Place& place) const;
  bool read_chain(Chain& chain);
  bool add_indirect(const Descriptor& descriptor, Chain& chain);
  bool note_taken(Chain& chain);
  bool read_saved(uint16_t head, Chain& chain);
  void recover();
  std::optional<PackedInflight::Position> repair_region();

  PackedInflight inflight_;
  Place available_;
  Place used_;
  uint64_t counter_ = 0;
  std::vector<uint16_t> resubmit_;  // head entries in the region, last one first
  std::vector<Descriptor> taken_;   // of the chain being read; reused
  std::vector<Done> batch_;
};

}  // namespace vmferry::virtio
