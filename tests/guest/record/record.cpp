// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/record/record.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>

namespace vmferry::guest {

namespace {

constexpr std::size_t kTextPercent = 60;

constexpr std::array<std::string_view, 32> kWords = {
    "the ",    "of ",      "volume ", "and ",     "migrate ", "to ",      "in ",    "block ",
    "that ",   "request ", "is ",     "written ", "before ",  "for ",     "epoch ", "it ",
    "return ", "static ",  "with ",   "as ",      "channel ", "on ",      "be ",    "configuration ",
    "by ",     "not ",     "size\n",  "this ",    "from ",    "buffer\n", "which ", "a ",
};

std::uint64_t checksum_of(RecordView record) {
  static constexpr std::array<std::byte, sizeof(std::uint64_t)> kNothing{};
  constexpr std::size_t kBefore = offsetof(RecordHeader, checksum);
  constexpr std::size_t kAfter = kBefore + sizeof(std::uint64_t);
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, record.data(), kBefore);
  XXH3_64bits_update(&state, kNothing.data(), kNothing.size());
  XXH3_64bits_update(&state, record.data() + kAfter, record.size() - kAfter);
  return XXH3_64bits_digest(&state);
}

}  // namespace

std::uint64_t splitmix64(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

void fill_text(std::span<std::byte> out, std::uint64_t seed) {
  std::uint64_t bits = 0;
  unsigned bits_left = 0;
  while (!out.empty()) {
    if (bits_left < 5) {
      bits = seed = splitmix64(seed);
      bits_left = 64;
    }
    const std::string_view word = kWords[bits & 31];
    bits >>= 5;
    bits_left -= 5;
    const std::size_t size = std::min(word.size(), out.size());
    std::memcpy(out.data(), word.data(), size);
    out = out.subspan(size);
  }
}

void fill_noise(std::span<std::byte> out, std::uint64_t seed) {
  while (!out.empty()) {
    seed = splitmix64(seed);
    const std::size_t size = std::min(sizeof(seed), out.size());
    std::memcpy(out.data(), &seed, size);
    out = out.subspan(size);
  }
}

void make_record(RecordBuffer out, std::uint64_t run, std::uint64_t seq, std::uint64_t slot, std::uint64_t time_ns) {
  RecordHeader header{.magic = kRecordMagic, .run = run, .seq = seq, .slot = slot, .time_ns = time_ns, .checksum = 0};
  const auto body = out.subspan(sizeof(header));
  const std::size_t text_size = body.size() * kTextPercent / 100;
  const std::uint64_t seed = splitmix64(run ^ splitmix64(seq));
  fill_text(body.first(text_size), seed);
  fill_noise(body.subspan(text_size), ~seed);
  std::memcpy(out.data(), &header, sizeof(header));
  header.checksum = checksum_of(out);
  std::memcpy(out.data(), &header, sizeof(header));
}

RecordState check_record(RecordView record, RecordHeader& header) {
  std::memcpy(&header, record.data(), sizeof(header));
  if (header.magic == kRecordMagic) {
    return header.checksum == checksum_of(record) ? RecordState::Valid : RecordState::Torn;
  }
  const bool zero = std::ranges::all_of(record, [](std::byte byte) { return byte == std::byte{0}; });
  return zero ? RecordState::Zero : RecordState::Foreign;
}

std::uint64_t SlotSequence::next() {
  const std::uint64_t choice = splitmix64(pattern_.seed ^ splitmix64(seq_++));
  const std::uint64_t place = splitmix64(choice);
  if (choice % 100 >= pattern_.random_percent) {
    const std::uint64_t slot = cursor_;
    cursor_ = (cursor_ + 1) % pattern_.slot_count;
    return slot;
  }
  if ((choice >> 32) % 100 < pattern_.hot_percent && pattern_.hot_slot_count != 0) {
    return (pattern_.slot_count / 4 + place % pattern_.hot_slot_count) % pattern_.slot_count;
  }
  return place % pattern_.slot_count;
}

}  // namespace vmferry::guest
