// SPDX-License-Identifier: Apache-2.0
//
// Byte ranges, sizes and durations. All offsets and lengths are bytes in uint64_t unless the name says otherwise.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vmferry {

constexpr uint64_t operator""_KiB(unsigned long long n) {
  return n << 10;
}
constexpr uint64_t operator""_MiB(unsigned long long n) {
  return n << 20;
}
constexpr uint64_t operator""_GiB(unsigned long long n) {
  return n << 30;
}
constexpr uint64_t operator""_TiB(unsigned long long n) {
  return n << 40;
}

constexpr uint64_t round_down(uint64_t value, uint64_t multiple) {
  return value - value % multiple;
}
constexpr uint64_t round_up(uint64_t value, uint64_t multiple) {
  return round_down(value + multiple - 1, multiple);
}
constexpr uint64_t div_up(uint64_t value, uint64_t divisor) {
  return value / divisor + (value % divisor != 0 ? 1 : 0);
}

// [offset, offset + length) in bytes. offset + length does not overflow (checked where ranges enter: the exports and
// codecs).
struct ByteRange {
  uint64_t offset = 0;
  uint64_t length = 0;

  constexpr uint64_t end() const { return offset + length; }
  constexpr bool empty() const { return length == 0; }
  constexpr bool overlaps(const ByteRange& other) const { return offset < other.end() && other.offset < end(); }
  constexpr bool contains(const ByteRange& other) const { return offset <= other.offset && other.end() <= end(); }
  friend constexpr bool operator==(const ByteRange&, const ByteRange&) = default;
};

// True when [offset, offset + length) lies within `size` bytes, without overflow.
constexpr bool fits_in(uint64_t offset, uint64_t length, uint64_t size) {
  return offset <= size && length <= size - offset;
}

// Durations and monotonic instants are nanoseconds in int64_t; 292 years fit.
using Nanoseconds = int64_t;
constexpr Nanoseconds kMicrosecond = 1'000;
constexpr Nanoseconds kMillisecond = 1'000'000;
constexpr Nanoseconds kSecond = 1'000'000'000;

}  // namespace vmferry
