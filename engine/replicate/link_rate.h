// SPDX-License-Identifier: Apache-2.0
//
// The cap on what the link sends (`--bandwidth`, a token bucket), and the measurement of what it really sent and of its
// round trip.
// Threads: the executor's thread.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "engine/base/units.h"

namespace vmferry {

// Token bucket with debt: a chunk may go while there are tokens, and is charged in full afterwards. Charging adds
// 1/40 for what the kernel wraps around TLS bytes (52 of each 1500 are TCP and IP headers), so that the rate stays
// within 5 % of the cap whether it is counted as TLS bytes (2.4 % below) or as IP bytes (about 1 % above).
class RateLimiter {
 public:
  void set_rate(uint64_t bytes_per_s, Nanoseconds now) {
    rate_ = bytes_per_s;
    tokens_ = 0;
    refilled_at_ = now;
  }
  uint64_t rate() const { return rate_; }

  bool may_send(Nanoseconds now) {
    if (rate_ == 0) return true;
    refill(now);
    return tokens_ > 0;
  }
  // 5 ms worth, so that a slow link is not handed long chunks; records of 4 KiB cost 0.5 % in TLS overhead.
  size_t chunk_size() const { return rate_ == 0 ? kChunkMax : std::clamp<size_t>(rate_ / 200, kChunkMin, kChunkMax); }
  void charge(uint64_t tls_bytes) {
    if (rate_ != 0) tokens_ -= static_cast<double>(tls_bytes) * (1.0 + 1.0 / 40);
  }
  // Until may_send() holds again.
  Nanoseconds wait(Nanoseconds now) {
    if (may_send(now)) return 0;
    return static_cast<Nanoseconds>((1.0 - tokens_) / static_cast<double>(rate_) * 1e9) + 1;
  }

 private:
  static constexpr size_t kChunkMin = 4096;
  static constexpr size_t kChunkMax = 65536;

  void refill(Nanoseconds now) {
    const double elapsed_s = static_cast<double>(now - refilled_at_) / 1e9;
    refilled_at_ = now;
    const double rate = static_cast<double>(rate_);
    // 50 ms may be caught up after a late timer; more would be a burst.
    tokens_ = std::min(tokens_ + rate * elapsed_s, std::max(rate * 0.05, static_cast<double>(kChunkMin)));
  }

  uint64_t rate_ = 0;  // bytes per second; 0 = no cap
  double tokens_ = 0;  // bytes; negative: debt
  Nanoseconds refilled_at_ = 0;
};

// Bytes per second while there was something to send: an idle link says nothing about its rate.
class RateMeter {
 public:
  void busy(Nanoseconds now) {
    if (busy_since_ < 0) busy_since_ = now;
  }
  void sent(uint64_t bytes, Nanoseconds now) {
    bytes_ += bytes;
    if (busy_since_ >= 0 && busy_time_ + (now - busy_since_) >= kWindow) close_window(now);
  }
  void idle(Nanoseconds now) {
    if (busy_since_ < 0) return;
    busy_time_ += now - busy_since_;
    busy_since_ = -1;
    if (busy_time_ >= kWindow) close_window(now);
  }
  uint64_t rate() const { return rate_; }

 private:
  static constexpr Nanoseconds kWindow = 200 * kMillisecond;

  void close_window(Nanoseconds now) {
    if (busy_since_ >= 0) {
      busy_time_ += now - busy_since_;
      busy_since_ = now;
    }
    const auto sample = static_cast<uint64_t>(static_cast<double>(bytes_) / (static_cast<double>(busy_time_) / 1e9));
    rate_ = rate_ == 0 ? sample : (rate_ * 3 + sample) / 4;
    bytes_ = 0;
    busy_time_ = 0;
  }

  Nanoseconds busy_since_ = -1;
  Nanoseconds busy_time_ = 0;
  uint64_t bytes_ = 0;
  uint64_t rate_ = 0;
};

// Round trip of the link itself: the shortest of the last pings. The others stood behind our own queue or in a cut; an
// average of them would say for half a minute after a cut of 5 s that nothing can be handed over within 300 ms.
class RttMeter {
 public:
  void saw(Nanoseconds rtt) {
    samples_[next_] = rtt;
    next_ = (next_ + 1) % samples_.size();
    count_ = std::min(count_ + 1, samples_.size());
  }
  Nanoseconds rtt() const {  // 0: not measured yet
    return count_ == 0 ? 0
                       : *std::min_element(samples_.begin(), samples_.begin() + static_cast<std::ptrdiff_t>(count_));
  }

 private:
  static constexpr size_t kSamples = 8;  // 16 s of pings: until a path that became longer is believed

  std::array<Nanoseconds, kSamples> samples_{};
  size_t next_ = 0;
  size_t count_ = 0;
};

}  // namespace vmferry
