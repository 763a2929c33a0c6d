// SPDX-License-Identifier: Apache-2.0
//
// How much of QEMU's stream may be under way: the brake of design section 7.
//
// QEMU decides from the speed of its socket when to stop the guest, so what is queued behind the socket is paid again
// during the pause: at most a third of downtime_limit x measured rate. But with less than the bandwidth-delay product
// under way the link runs dry: at least 1.5 times that, with the smallest round trip seen (the present one includes our
// own queue, and a limit that follows it would grow for ever). Threads: one executor.
#pragma once

#include <cstdint>

#include "engine/base/units.h"

namespace vmferry {

class MemoryWindow {
 public:
  static constexpr uint64_t kLimitMin = 256_KiB;
  static constexpr uint64_t kLimitMax = 16_MiB;
  static constexpr uint64_t kLimitAtStart = 1_MiB;  // nothing is measured yet

  explicit MemoryWindow(Nanoseconds downtime_limit) : downtime_limit_(downtime_limit) {}

  // `delivered`: raw bytes that the destination QEMU has been given so far.
  void acknowledged(uint64_t delivered, Nanoseconds now);
  void saw_round_trip(Nanoseconds rtt) {
    if (rtt > 0 && (rtt_min_ == 0 || rtt < rtt_min_)) rtt_min_ = rtt;
  }
  // After a pause of our own making (held, disconnected) the rate would be measured too low.
  void restart(uint64_t delivered, Nanoseconds now) {
    sample_delivered_ = delivered;
    sample_start_ = now;
  }
  uint64_t limit() const;
  uint64_t rate() const { return rate_; }  // raw bytes per second, smoothed; 0 = not measured

 private:
  Nanoseconds downtime_limit_;
  Nanoseconds rtt_min_ = 0;
  Nanoseconds sample_start_ = 0;
  uint64_t sample_delivered_ = 0;
  uint64_t rate_ = 0;
};

}  // namespace vmferry
