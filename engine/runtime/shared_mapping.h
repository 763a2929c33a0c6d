// SPDX-License-Identifier: Apache-2.0
//
// Memory that another process gave us by a descriptor, mapped for reading and writing.
//
// Its owner may shrink the file behind it at any time; touching what is gone is SIGBUS, which would end the daemon and
// with it every other guest. So a fault inside a mapping replaces all of it with zeroes and marks it damaged; whoever
// uses it looks and gives up on that owner. Faults elsewhere end the process as always. (The kernel's own accesses,
// from io_uring, fail with EFAULT.) Threads: map and destroy from any; a fault may come on any.
#pragma once

#include <atomic>
#include <cstdint>

#include "engine/base/bytes.h"
#include "engine/base/result.h"

namespace vmferry {

class SharedMapping {
 public:
  static constexpr size_t kMappingsMax = 16384;  // of the process

  SharedMapping() = default;
  // Bytes [offset, offset + size) of the file. Mismatch when the file is shorter, LimitExceeded at kMappingsMax.
  static Result<SharedMapping> map(int fd, uint64_t offset, uint64_t size);
  SharedMapping(SharedMapping&& other) noexcept;
  SharedMapping& operator=(SharedMapping&& other) noexcept;
  ~SharedMapping() { unmap(); }

  uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }
  MutableByteSpan span() const { return {data_, size_}; }
  explicit operator bool() const { return data_ != nullptr; }
  bool damaged() const;

 private:
  void unmap();

  uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
  size_t slot_ = 0;
};

}  // namespace vmferry
