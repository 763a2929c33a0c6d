// SPDX-License-Identifier: Apache-2.0
#include "engine/track/dirty_map.h"

#include <algorithm>
#include <bit>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr uint64_t kWordBits = 64;
constexpr uint64_t kWordsPerSummaryBit = 64;  // one summary bit covers 4096 blocks, 16 MiB at 4 KiB

// Bits [first, last] of one word.
constexpr uint64_t mask(uint64_t first, uint64_t last) {
  return (~uint64_t{0} << first) & (~uint64_t{0} >> (kWordBits - 1 - last));
}

// Calls each(word_index, bits) for the words that blocks [first, last] touch.
template <typename Each>
void for_words(uint64_t first, uint64_t last, Each each) {
  const uint64_t first_word = first / kWordBits;
  const uint64_t last_word = last / kWordBits;
  for (uint64_t word = first_word; word <= last_word; ++word) {
    each(word, mask(word == first_word ? first % kWordBits : 0, word == last_word ? last % kWordBits : kWordBits - 1));
  }
}

}  // namespace

DirtyMap::DirtyMap(uint64_t device_size, uint32_t block_size)
    : device_size_(0),
      block_size_(block_size),
      block_shift_(static_cast<uint32_t>(std::countr_zero(block_size))),
      block_count_(0) {
  VF_ASSERT(std::has_single_bit(block_size) && block_size >= 4_KiB && block_size <= 1_MiB);
  grow(device_size);
}

void DirtyMap::grow(uint64_t device_size) {
  VF_ASSERT(device_size >= device_size_);
  device_size_ = device_size;
  block_count_ = div_up(device_size, block_size_);
  words_.resize(div_up(block_count_, kWordBits));
  summary_.resize(div_up(div_up(words_.size(), kWordsPerSummaryBit), kWordBits));
}

bool DirtyMap::mark(ByteRange range) noexcept {
  VF_ASSERT(fits_in(range.offset, range.length, device_size_));
  if (range.empty()) return false;
  const uint64_t before = dirty_blocks_;
  for_words(range.offset >> block_shift_, (range.end() - 1) >> block_shift_, [this](uint64_t word, uint64_t bits) {
    const uint64_t added = bits & ~words_[word];
    if (added == 0) return;
    words_[word] |= added;
    dirty_blocks_ += static_cast<uint64_t>(std::popcount(added));
    const uint64_t group = word / kWordsPerSummaryBit;
    summary_[group / kWordBits] |= uint64_t{1} << (group % kWordBits);
  });
  return dirty_blocks_ != before;
}

bool DirtyMap::clear(ByteRange range) noexcept {
  VF_ASSERT(fits_in(range.offset, range.length, device_size_));
  const uint64_t first = (range.offset + block_size_ - 1) >> block_shift_;
  const uint64_t end = range.end() == device_size_ ? block_count_ : range.end() >> block_shift_;
  if (first >= end) return false;
  const uint64_t before = dirty_blocks_;
  for_words(first, end - 1, [this](uint64_t word, uint64_t bits) {
    const uint64_t removed = bits & words_[word];
    words_[word] &= ~removed;
    dirty_blocks_ -= static_cast<uint64_t>(std::popcount(removed));
  });
  if (dirty_blocks_ == before) return false;
  refresh_summary(first / kWordBits, (end - 1) / kWordBits);
  return true;
}

void DirtyMap::refresh_summary(uint64_t first_word, uint64_t last_word) noexcept {
  for (uint64_t group = first_word / kWordsPerSummaryBit; group <= last_word / kWordsPerSummaryBit; ++group) {
    uint64_t any = 0;
    const uint64_t end = std::min<uint64_t>((group + 1) * kWordsPerSummaryBit, words_.size());
    for (uint64_t word = group * kWordsPerSummaryBit; word < end && any == 0; ++word) any |= words_[word];
    const uint64_t bit = uint64_t{1} << (group % kWordBits);
    if (any == 0) summary_[group / kWordBits] &= ~bit;
  }
}

bool DirtyMap::contains(ByteRange range) const noexcept {
  VF_ASSERT(fits_in(range.offset, range.length, device_size_));
  if (range.empty()) return false;
  uint64_t found = 0;
  for_words(range.offset >> block_shift_, (range.end() - 1) >> block_shift_,
            [&](uint64_t word, uint64_t bits) { found |= words_[word] & bits; });
  return found != 0;
}

std::optional<ByteRange> DirtyMap::next_run(uint64_t from, uint64_t length_max) const noexcept {
  // By bytes, not blocks: a walk goes on at the end of its last run, which may lie inside the block count of a device
  // with a short last block.
  if (from >= device_size_ || dirty_blocks_ == 0) return std::nullopt;
  uint64_t block = from >> block_shift_;
  // Find the first dirty block: first within the starting word, then word by word, whole groups by their summary bit.
  uint64_t word = block / kWordBits;
  uint64_t bits = words_[word] & (~uint64_t{0} << (block % kWordBits));
  while (bits == 0) {
    ++word;
    while (word < words_.size() && word % kWordsPerSummaryBit == 0) {
      const uint64_t group = word / kWordsPerSummaryBit;
      if ((summary_[group / kWordBits] >> (group % kWordBits) & 1) != 0) break;
      word += kWordsPerSummaryBit;
    }
    if (word >= words_.size()) return std::nullopt;
    bits = words_[word];
  }
  block = word * kWordBits + static_cast<uint64_t>(std::countr_zero(bits));
  // Then count dirty blocks from there.
  const uint64_t count_max = std::max<uint64_t>(1, length_max >> block_shift_);
  uint64_t end = block;
  while (end < block_count_ && end - block < count_max) {
    const uint64_t clean = ~words_[end / kWordBits] & (~uint64_t{0} << (end % kWordBits));
    if (clean != 0) {
      end = end / kWordBits * kWordBits + static_cast<uint64_t>(std::countr_zero(clean));
      break;
    }
    end = (end / kWordBits + 1) * kWordBits;
  }
  end = std::min({end, block_count_, block + count_max});
  const uint64_t offset = block << block_shift_;
  return ByteRange{offset, std::min(end << block_shift_, device_size_) - offset};
}

void DirtyMap::merge_and_empty(DirtyMap& other) noexcept {
  VF_ASSERT(other.words_.size() == words_.size() && other.block_size_ == block_size_);
  for (uint64_t group = 0; group * kWordsPerSummaryBit < words_.size(); ++group) {
    const uint64_t bit = uint64_t{1} << (group % kWordBits);
    if ((other.summary_[group / kWordBits] & bit) == 0) continue;
    const uint64_t end = std::min<uint64_t>((group + 1) * kWordsPerSummaryBit, words_.size());
    for (uint64_t word = group * kWordsPerSummaryBit; word < end; ++word) {
      mark_word(word, other.words_[word]);
      other.words_[word] = 0;
    }
    other.summary_[group / kWordBits] &= ~bit;
  }
  other.dirty_blocks_ = 0;
}

uint64_t DirtyMap::valid_bits(uint64_t word_index) const noexcept {
  const uint64_t first = word_index * kWordBits;
  if (first >= block_count_) return 0;
  const uint64_t left = block_count_ - first;
  return left >= kWordBits ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
}

void DirtyMap::mark_word(uint64_t word_index, uint64_t bits) noexcept {
  if (word_index >= words_.size()) return;
  const uint64_t added = bits & valid_bits(word_index) & ~words_[word_index];
  if (added == 0) return;
  words_[word_index] |= added;
  dirty_blocks_ += static_cast<uint64_t>(std::popcount(added));
  const uint64_t group = word_index / kWordsPerSummaryBit;
  summary_[group / kWordBits] |= uint64_t{1} << (group % kWordBits);
}

}  // namespace vmferry
