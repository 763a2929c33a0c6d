// SPDX-License-Identifier: Apache-2.0
//
// Dirty blocks of one device, one bit per block, with a one-level summary so that a walk skips clean gigabytes.
//
// Flow: EpochTracker holds one map for the open and one for the sealed epoch; SavedBitmap writes their union to disk.
// Threads: one; the device's home executor.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/base/units.h"

namespace vmferry {

// block_size   bytes, power of two, 4 KiB..1 MiB; default and reason: docs/decisions/0001-dirty-block-size.md.
// Memory       device_size / block_size / 8 bytes (32 MiB for 1 TiB at 4 KiB), allocated at construction and resize.
class DirtyMap {
 public:
  DirtyMap(uint64_t device_size, uint32_t block_size);

  uint64_t device_size() const { return device_size_; }
  uint32_t block_size() const { return block_size_; }
  uint64_t block_count() const { return block_count_; }

  // Marks every block that `range` touches, partial ones included. True when a bit changed.
  bool mark(ByteRange range) noexcept;
  // Clears the blocks that lie wholly inside `range` (the device's short last block counts as whole at its end):
  // a block of which only a part was acknowledged stays dirty. True when a bit changed.
  bool clear(ByteRange range) noexcept;
  bool contains(ByteRange range) const noexcept;  // some touched block is dirty

  // First run of dirty blocks at or after byte `from` (rounded down to its block), at most `length_max` bytes long
  // (at least one block), clipped to the device size.
  std::optional<ByteRange> next_run(uint64_t from, uint64_t length_max) const noexcept;

  uint64_t dirty_blocks() const { return dirty_blocks_; }
  uint64_t dirty_bytes() const { return dirty_blocks_ * block_size_; }  // a short last block counts as a whole one
  bool empty() const { return dirty_blocks_ == 0; }

  void merge_and_empty(DirtyMap& other) noexcept;  // this |= other, other = 0; same geometry
  void grow(uint64_t device_size);                 // new blocks are clean
  // 64 blocks from block `word * 64`; 0 beyond the end. For saving and loading.
  uint64_t word(uint64_t word_index) const noexcept { return word_index < words_.size() ? words_[word_index] : 0; }
  void mark_word(uint64_t word_index, uint64_t bits) noexcept;  // bits beyond the last block are ignored

 private:
  void refresh_summary(uint64_t first_word, uint64_t last_word) noexcept;
  uint64_t valid_bits(uint64_t word_index) const noexcept;

  uint64_t device_size_;
  uint32_t block_size_;
  uint32_t block_shift_;
  uint64_t block_count_;
  uint64_t dirty_blocks_ = 0;
  std::vector<uint64_t> words_;
  std::vector<uint64_t> summary_;  // bit i: words_[i * kWordsPerSummaryBit ...] may hold a dirty bit
};

}  // namespace vmferry
