// SPDX-License-Identifier: Apache-2.0
//
// A virtio-blk driver on one queue of a Frontend: slots with header, data and status in the guest's memory.
// Threads: one per queue; blocking only in wait().
#pragma once

#include <optional>
#include <vector>

#include "perf/vhost/driver/frontend.h"

namespace vmferry::perf {

class BlkQueue {
 public:
  // `slots` requests of at most `data_bytes` each, whose memory begins `offset` bytes into the frontend's data.
  BlkQueue(Frontend& frontend, uint16_t index, uint16_t slots, uint32_t data_bytes, uint64_t offset = 0);
  static uint64_t memory_needed(uint16_t slots, uint32_t data_bytes);

  uint8_t* data(uint16_t slot) const { return frontend_.data() + data_offset(slot); }
  uint64_t data_address(uint16_t slot) const { return frontend_.data_address() + data_offset(slot); }
  uint64_t status_address(uint16_t slot) const { return frontend_.data_address() + status_offset(slot); }
  uint16_t slots() const { return slots_; }

  // `bytes` of the slot's data; in pieces of at most `piece` bytes when that is not 0. Shown to the device by flush().
  // False: the ring is full.
  [[nodiscard]] bool add(uint16_t slot, uint32_t type, uint64_t sector, uint32_t bytes, uint32_t piece = 0);
  void flush();

  struct Done {
    uint16_t slot;
    virtio::BlkStatus status;
    uint32_t written;
  };
  std::optional<Done> reap();
  // Waits until something can be reaped; false after `timeout_ms`.
  bool wait(int timeout_ms);
  // One request from start to end; nullopt after the timeout.
  std::optional<Done> run(uint32_t type, uint64_t sector, uint32_t bytes, uint32_t piece = 0, int timeout_ms = 10000);
  // Again after the back-end was replaced: it may have missed a kick.
  void kick() { frontend_.kick(index_); }

 private:
  uint64_t slot_offset(uint16_t slot) const { return offset_ + slot * stride_; }
  uint64_t data_offset(uint16_t slot) const { return slot_offset(slot) + kHeaderRoom; }
  uint64_t status_offset(uint16_t slot) const { return slot_offset(slot) + virtio::kBlkHeaderSize; }

  static constexpr uint64_t kHeaderRoom = 4096;  // so that data is aligned

  Frontend& frontend_;
  const uint16_t index_;
  const uint16_t slots_;
  const uint64_t stride_;
  const uint64_t offset_;
  std::vector<virtio::Buffer> readable_;  // reused
  std::vector<virtio::Buffer> writable_;
};

}  // namespace vmferry::perf
