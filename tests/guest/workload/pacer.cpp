// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/workload/pacer.h"

#include <algorithm>
#include <ctime>

namespace vmferry::guest {

namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;
// Shorter sleeps cost more in wake-ups than they smooth: at 4 MB/s this runs four pages at a time.
constexpr std::uint64_t kSleepMinNs = 4'000'000;

}  // namespace

std::uint64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * kSecond + static_cast<std::uint64_t>(now.tv_nsec);
}

Pacer::Pacer(std::uint64_t rate, std::uint64_t unit)
    : interval_ns_(rate == 0 ? 0 : unit * kSecond / rate), due_ns_(now_ns()) {}

void Pacer::wait() {
  if (interval_ns_ == 0) return;
  due_ns_ += interval_ns_;
  const std::uint64_t now = now_ns();
  if (due_ns_ >= now + kSleepMinNs) {
    const timespec until{.tv_sec = static_cast<time_t>(due_ns_ / kSecond),
                         .tv_nsec = static_cast<long>(due_ns_ % kSecond)};
    ::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
  }
  due_ns_ = std::max(due_ns_, now > kCatchUpNs ? now - kCatchUpNs : 0);
}

}  // namespace vmferry::guest
