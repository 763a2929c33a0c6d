// SPDX-License-Identifier: Apache-2.0
//
// The guest-memory dirty log of a live migration: one bit for each 4 KiB page of guest physical memory, shared with
// QEMU, which copies and clears it meanwhile. Mark after the bytes were written: a bit that is seen, cleared and the
// page copied before the bytes arrive would leave the destination with the old ones.
// Source of truth: vhost-user.rst "Migration". Threads: any; bits are set atomically.
#pragma once

#include <atomic>
#include <cstdint>

namespace vmferry::virtio {

class DirtyLog {
 public:
  static constexpr uint64_t kPageSize = 4096;

  DirtyLog() = default;
  // `size` bytes, one bit per page.
  DirtyLog(uint8_t* bits, uint64_t size) : bits_(bits), size_(size) {}

  bool active() const { return bits_ != nullptr; }

  // Marks every page of [guest_address, guest_address + length). False when some of it is beyond the log: then the
  // migration would lose bytes, and the caller must not go on as if nothing had happened.
  [[nodiscard]] bool mark(uint64_t guest_address, uint64_t length) const noexcept {
    if (bits_ == nullptr || length == 0) return true;
    if (length - 1 > UINT64_MAX - guest_address) return false;
    const uint64_t last = (guest_address + length - 1) / kPageSize;
    bool within = true;
    for (uint64_t page = guest_address / kPageSize; page <= last; ++page) {
      if (page / 8 >= size_) {
        within = false;
        break;
      }
      const auto bit = static_cast<uint8_t>(1U << (page % 8));
      std::atomic_ref<uint8_t>(bits_[page / 8]).fetch_or(bit, std::memory_order_release);
    }
    return within;
  }

 private:
  uint8_t* bits_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace vmferry::virtio
