// SPDX-License-Identifier: Apache-2.0
//
// Data buffers of an export's requests by size class, kept for reuse, so that steady traffic allocates nothing.
//
// Layout: the data is aligned to a page for O_DIRECT; before it lies room for the reply header, so that header and data
// of a read leave as one run of bytes.
// Reuse: a buffer keeps what its last user left in it. That never reaches a client: a read is answered only after the
// device has filled all of it (BlockDevice contract), a write only goes to the device once its payload is complete.
// Threads: the server's executor.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "engine/base/units.h"

namespace vmferry {

class TransferBuffers;

// One buffer; goes back to its pool when it dies. Empty after a failed allocation.
class TransferBuffer {
 public:
  TransferBuffer() = default;
  TransferBuffer(TransferBuffer&& other) noexcept
      : pool_(other.pool_), data_(std::exchange(other.data_, nullptr)), size_class_(other.size_class_) {}
  TransferBuffer& operator=(TransferBuffer&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(data_, other.data_);
    std::swap(size_class_, other.size_class_);
    return *this;
  }
  ~TransferBuffer() { reset(); }

  uint8_t* data() const { return data_; }  // kHeadroom bytes before it may be written too
  explicit operator bool() const { return data_ != nullptr; }
  void reset();

 private:
  friend class TransferBuffers;
  TransferBuffer(TransferBuffers* pool, uint8_t* data, unsigned size_class)
      : pool_(pool), data_(data), size_class_(size_class) {}
  TransferBuffers* pool_ = nullptr;
  uint8_t* data_ = nullptr;
  unsigned size_class_ = 0;
};

class TransferBuffers {
 public:
  static constexpr size_t kAlignment = 4096;
  static constexpr size_t kHeadroom = kAlignment;
  static constexpr size_t kSizeMin = 4096;
  static constexpr unsigned kClassCount = 14;  // 4 KiB..32 MiB, powers of two
  static constexpr size_t kSizeMax = kSizeMin << (kClassCount - 1);

  explicit TransferBuffers(uint64_t cached_bytes_max) : cached_bytes_max_(cached_bytes_max) {}
  TransferBuffers(const TransferBuffers&) = delete;
  TransferBuffers& operator=(const TransferBuffers&) = delete;
  ~TransferBuffers();  // every buffer is back

  // At least `size` bytes, 1..kSizeMax. Empty when the machine has no memory.
  TransferBuffer take(size_t size);

  uint64_t cached_bytes() const { return cached_bytes_; }
  size_t in_use() const { return in_use_; }

 private:
  friend class TransferBuffer;
  void give_back(uint8_t* data, unsigned size_class);
  static constexpr size_t class_size(unsigned size_class) { return kSizeMin << size_class; }

  const uint64_t cached_bytes_max_;
  uint64_t cached_bytes_ = 0;
  size_t in_use_ = 0;
  std::array<std::vector<uint8_t*>, kClassCount> free_;
};

inline void TransferBuffer::reset() {
  if (data_ != nullptr) pool_->give_back(std::exchange(data_, nullptr), size_class_);
}

}  // namespace vmferry
