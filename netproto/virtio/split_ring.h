// SPDX-License-Identifier: Apache-2.0
//
// A split virtqueue, device's side. Source of truth: virtio 1.2, 2.7; vhost-user.rst for the in-flight region.
// Threads: as Virtqueue.
#pragma once

#include "netproto/virtio/virtqueue.h"

namespace vmferry::virtio {

// One queue's part of the in-flight region: a header, then one entry per descriptor.
class SplitInflight {
 public:
  static constexpr size_t kHeaderSize = 16;
  static constexpr size_t kEntrySize = 16;
  static constexpr uint16_t kVersion = 1;
  static uint64_t size(uint16_t queue_size) { return kHeaderSize + kEntrySize * uint64_t{queue_size}; }

  explicit SplitInflight(MutableByteSpan region) : at_(region.data()) {}
  bool present() const { return at_ != nullptr; }

  uint16_t version() const { return load_shared<uint16_t>(at_ + 8); }
  uint16_t entries() const { return load_shared<uint16_t>(at_ + 10); }
  uint16_t last_batch() const { return load_shared<uint16_t>(at_ + 12); }
  uint16_t used_index() const { return load_shared<uint16_t>(at_ + 14); }
  void begin(uint16_t queue_size, uint16_t used_index);
  void set_last_batch(uint16_t value) { store_shared(at_ + 12, value); }
  void set_used_index(uint16_t value) { store_shared(at_ + 14, value, std::memory_order_release); }

  bool inflight(uint16_t i) const { return load_shared<uint8_t>(entry(i)) != 0; }
  uint16_t next(uint16_t i) const { return load_shared<uint16_t>(entry(i) + 6); }
  uint64_t counter(uint16_t i) const { return load_shared<uint64_t>(entry(i) + 8); }
  void set_inflight(uint16_t i, bool on) { store_shared<uint8_t>(entry(i), on ? 1 : 0, std::memory_order_release); }
  void set_next(uint16_t i, uint16_t value) { store_shared(entry(i) + 6, value); }
  void set_counter(uint16_t i, uint64_t value) { store_shared(entry(i) + 8, value); }

 private:
  uint8_t* entry(uint16_t i) const { return at_ + kHeaderSize + kEntrySize * i; }
  uint8_t* at_;
};

class SplitRing final : public Virtqueue {
 public:
  SplitRing(const RingMemory& ring, const RingOptions& options, uint32_t base, const GuestMemory& memory,
            MutableByteSpan inflight);

  Take take(Chain& chain) override;
  void put(const Chain& chain, uint32_t written) override;
  bool publish() override;
  void stop_notifications() override;
  bool want_notifications() override;
  uint32_t base() const override { return available_next_; }

 private:
  uint16_t available_index(std::memory_order order) const { return load_shared<uint16_t>(ring_.driver + 2, order); }
  Descriptor descriptor(uint16_t index) const;
  bool read_chain(uint16_t head, Chain& chain);
  bool read_indirect_chain(const Descriptor& first, Chain& chain);
  void recover();
  void set_available_event();

  SplitInflight inflight_;
  uint16_t available_next_ = 0;  // of the driver's ring: the next to take
  uint16_t used_next_ = 0;       // of our ring: the next to write
  uint16_t used_published_ = 0;
  uint64_t counter_ = 0;
  std::vector<uint16_t> resubmit_;  // heads, last one first
  std::vector<uint16_t> batch_;     // heads put since the last publish
};

}  // namespace vmferry::virtio
