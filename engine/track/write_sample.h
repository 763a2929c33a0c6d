// SPDX-License-Identifier: Apache-2.0
//
// Where a guest writes within a few seconds: a bounded list, for an estimate of what its writes would take to send.
//
// Flow: a preflight gives one to each TrackedDevice, which notes every write that passes its gate; taken back after the
// time. Without one a write costs a test of a pointer. Threads: the device's executor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/base/units.h"

namespace vmferry {

class WriteSample {
 public:
  static constexpr size_t kRangesMax = 16384;  // 256 KiB, allocated once; what comes later is only counted

  WriteSample() { ranges_.reserve(kRangesMax); }

  void note(const ByteRange& range) noexcept {
    written_bytes_ += range.length;
    if (ranges_.size() == kRangesMax) return;
    ranges_.push_back(range);
    noted_bytes_ += range.length;
  }

  uint64_t written_bytes() const { return written_bytes_; }  // all
  uint64_t noted_bytes() const { return noted_bytes_; }      // of these the places are known

  // The blocks that were touched, in order, each once.
  std::vector<uint64_t> blocks(uint64_t block_size) const {
    std::vector<ByteRange> sorted = ranges_;
    std::sort(sorted.begin(), sorted.end(), [](const ByteRange& a, const ByteRange& b) { return a.offset < b.offset; });
    std::vector<uint64_t> found;
    for (const ByteRange& range : sorted) {
      uint64_t block = range.offset / block_size;
      if (!found.empty()) block = std::max(block, found.back() + 1);
      for (; block * block_size < range.end(); ++block) found.push_back(block);
    }
    return found;
  }

 private:
  std::vector<ByteRange> ranges_;
  uint64_t written_bytes_ = 0;
  uint64_t noted_bytes_ = 0;
};

}  // namespace vmferry
