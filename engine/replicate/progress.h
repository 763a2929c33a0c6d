// SPDX-License-Identifier: Apache-2.0
//
// Rates for status and estimates: bytes per second over the last few seconds, from counters sampled once a second.
//
// Threads: values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/base/units.h"

namespace vmferry {

// Exponentially weighted; a sample of one second weighs a fifth, so a change shows after a few seconds and a stall of
// one second does not make an estimate jump. Samples of less than kElapsedMin are taken together: a few bytes in a few
// microseconds are no rate.
class SampledRate {
 public:
  static constexpr Nanoseconds kElapsedMin = 100 * kMillisecond;

  void add(uint64_t bytes, Nanoseconds elapsed) {
    bytes_ += bytes;
    elapsed_ += std::max<Nanoseconds>(elapsed, 0);
    if (elapsed_ < kElapsedMin) return;
    const double rate = static_cast<double>(bytes_) * 1e9 / static_cast<double>(elapsed_);
    const double weight = std::min(1.0, 0.2 * static_cast<double>(elapsed_) / 1e9);
    rate_ = started_ ? rate_ + weight * (rate - rate_) : rate;
    started_ = true;
    bytes_ = 0;
    elapsed_ = 0;
  }
  uint64_t bytes_per_second() const { return static_cast<uint64_t>(rate_); }
  double value() const { return rate_; }

 private:
  uint64_t bytes_ = 0;  // not yet in the rate
  Nanoseconds elapsed_ = 0;
  double rate_ = 0;
  bool started_ = false;
};

}  // namespace vmferry
