// SPDX-License-Identifier: Apache-2.0
//
// A guest of 256 KiB with one ring, its driver and its device.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "netproto/virtio/driver_ring.h"
#include "netproto/virtio/virtqueue.h"

namespace vmferry::virtio {

class RingFixture {
 public:
  enum class Inflight : uint8_t { No, Yes };
  static constexpr uint64_t kGuestBase = 0x100000;
  static constexpr uint64_t kMemorySize = 256_KiB;
  static constexpr uint64_t kDataOffset = 192_KiB;

  RingFixture(const RingOptions& options, uint16_t size, Inflight inflight = Inflight::No)
      : options_(options), memory_bytes_(kMemorySize + 4096) {
    const auto raw = reinterpret_cast<uintptr_t>(memory_bytes_.data());
    host_ = memory_bytes_.data() + (4096 - raw % 4096) % 4096;
    added_ = table_.add({kGuestBase, kMemorySize, 0x7f0000000000, host_});
    driver_.emplace(options, size, host_, kGuestBase);
    if (inflight == Inflight::Yes) region_.resize(inflight_size(options.packed, size) / 8 + 1);
    restart_device(driver_->base());
  }

  DriverRing& driver() { return *driver_; }
  Virtqueue& device() { return *device_; }
  uint8_t* host() { return host_; }
  uint8_t* at(uint64_t guest_address) { return host_ + (guest_address - kGuestBase); }
  const GuestMemory& table() const { return table_; }
  uint64_t data_address() const { return kGuestBase + kDataOffset; }
  std::span<const Buffer> one_buffer() {
    one_ = {data_address(), 16};
    return {&one_, 1};
  }
  MutableByteSpan region() { return {reinterpret_cast<uint8_t*>(region_.data()), region_.size() * 8}; }

  // A device that knows nothing but the shared memory; the base is as old as a front-end's that missed the end.
  void restart_device() { restart_device(driver_->base()); }
  void restart_device(uint32_t base) {
    device_ =
        Virtqueue::create(driver_->memory(), options_, base, table_, region_.empty() ? MutableByteSpan{} : region());
  }

 private:
  RingOptions options_;
  std::vector<uint8_t> memory_bytes_;
  uint8_t* host_ = nullptr;
  GuestMemory table_;
  bool added_ = false;
  std::vector<uint64_t> region_;
  std::optional<DriverRing> driver_;
  std::unique_ptr<Virtqueue> device_;
  Buffer one_;
};

}  // namespace vmferry::virtio
