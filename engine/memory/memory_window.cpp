// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/memory_window.h"

#include <algorithm>

namespace vmferry {

namespace {

// QEMU itself plans to send for up to downtime_limit after the stop, and the tail follows: ours is a third on top.
constexpr Nanoseconds kPauseShare = 3;
constexpr Nanoseconds kSampleMin = 50 * kMillisecond;

// bytes = rate x time without overflow: rates are below 2^40, times below 2^40 ns.
uint64_t bytes_in(uint64_t rate, Nanoseconds time) {
  const double bytes = static_cast<double>(rate) * static_cast<double>(time) / static_cast<double>(kSecond);
  return bytes >= static_cast<double>(MemoryWindow::kLimitMax) ? MemoryWindow::kLimitMax : static_cast<uint64_t>(bytes);
}

}  // namespace

void MemoryWindow::acknowledged(uint64_t delivered, Nanoseconds now) {
  const Nanoseconds elapsed = now - sample_start_;
  if (elapsed < kSampleMin || delivered <= sample_delivered_) return;
  const double measured =
      static_cast<double>(delivered - sample_delivered_) * static_cast<double>(kSecond) / static_cast<double>(elapsed);
  // Half of each new sample: a stream that turns from zero pages into data changes its rate by a factor of 100.
  const double smoothed = rate_ == 0 ? measured : (static_cast<double>(rate_) + measured) / 2;
  rate_ = static_cast<uint64_t>(std::min(smoothed, static_cast<double>(1ULL << 40)));
  restart(delivered, now);
}

uint64_t MemoryWindow::limit() const {
  if (rate_ == 0) return kLimitAtStart;
  const uint64_t pause = bytes_in(rate_, downtime_limit_ / kPauseShare);
  const uint64_t pipe = bytes_in(rate_, rtt_min_ + rtt_min_ / 2);
  return std::clamp(std::max(pause, pipe), kLimitMin, kLimitMax);
}

}  // namespace vmferry
