// SPDX-License-Identifier: Apache-2.0
//
// The driver's side of one virtqueue, split or packed: what a guest does, for the load generator and the tests.
//
// Flow: add() chains, publish() shows them to the device and says whether it wants a kick, reap() takes what came
// back. The device is trusted here no more than a driver trusts its device: ids are checked. Source of truth: virtio
// 1.2, 2.7 and 2.8. Threads: one owner; the device writes at the same time.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "netproto/virtio/virtqueue.h"

namespace vmferry::virtio {

class DriverRing {
 public:
  // Bytes of memory that a ring takes, with its indirect tables; 4096-aligned.
  static uint64_t memory_size(const RingOptions& options, uint16_t size);
  static constexpr size_t kIndirectLengthMax = 128;

  // `memory`: memory_size() zeroed bytes at `guest_address` of the guest.
  DriverRing(const RingOptions& options, uint16_t size, uint8_t* memory, uint64_t guest_address);

  // Offsets of the parts from the start of the memory, for SET_VRING_ADDR.
  uint64_t driver_offset() const { return driver_offset_; }
  uint64_t device_offset() const { return device_offset_; }
  // What SET_VRING_BASE takes for a fresh ring.
  uint32_t base() const { return options_.packed ? 0x80008000U : 0U; }
  const RingMemory& memory() const { return ring_; }

  // `id` < size, not in use. In an indirect table when that was agreed and there is more than one buffer. False: the
  // ring is full.
  [[nodiscard]] bool add(uint16_t id, std::span<const Buffer> readable, std::span<const Buffer> writable);
  [[nodiscard]] bool publish();

  struct Used {
    uint16_t id = 0;
    uint32_t written = 0;
  };
  // nullopt: nothing came back.
  std::optional<Used> reap();
  bool broken() const { return broken_; }  // the device gave back what it did not have

  void stop_calls();
  // True when something came back meanwhile.
  [[nodiscard]] bool want_calls();

 private:
  void write_descriptor(uint8_t* at, const Buffer& buffer, uint16_t flags, uint16_t link, bool table) const;
  bool add_split(uint16_t id, std::span<const Buffer> buffers, size_t readable);
  bool add_packed(uint16_t id, std::span<const Buffer> buffers, size_t readable);
  Buffer make_table(uint16_t id, std::span<const Buffer> buffers, size_t readable) const;
  bool packed_used_ready() const;

  RingOptions options_;
  RingMemory ring_;
  uint64_t guest_address_;
  uint64_t driver_offset_;
  uint64_t device_offset_;
  uint64_t tables_offset_;

  std::vector<Buffer> buffers_;  // reused
  std::vector<uint16_t> slots_;  // of each id; 0: not in use
  uint16_t free_count_;
  bool broken_ = false;

  // Split: links of free descriptors; the id that a head belongs to.
  std::vector<uint16_t> free_next_;
  std::vector<uint16_t> id_of_head_;  // kNoId: not the head of a chain that is with the device
  uint16_t free_head_ = 0;
  uint16_t available_ = 0;
  uint16_t published_ = 0;
  uint16_t used_ = 0;

  // Packed: where the next chain and the next answer are.
  uint16_t available_at_ = 0;
  bool available_wrap_ = true;
  uint16_t used_at_ = 0;
  bool used_wrap_ = true;
  uint16_t added_ = 0;  // descriptors since the last publish
};

}  // namespace vmferry::virtio
