// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/estimator.h"

#include <algorithm>

namespace vmferry {

Nanoseconds predicted_last_round(const RoundProgress& progress, uint64_t figures_rate, Nanoseconds rtt) {
  const uint64_t rate = std::max(progress.send_rate, figures_rate);
  constexpr double kForEver = 3600;
  double seconds = 0;
  if (progress.predicted_bytes > 0)
    seconds = rate == 0 ? kForEver
                        : std::min(kForEver, static_cast<double>(progress.predicted_bytes) / static_cast<double>(rate));
  return static_cast<Nanoseconds>(seconds * static_cast<double>(kSecond)) + rtt / 2;
}

DowntimeShares downtime_shares(Nanoseconds downtime_limit) {
  const Nanoseconds part = std::max(downtime_limit * 2 / 5, 20 * kMillisecond);
  return {.disk = part, .memory = part};
}

bool brake_held(const BrakeFacts& facts) {
  // An idle guest is at pre-switchover 20 ms after `migrate`: nothing is read before the first round beside it ended.
  if (!facts.first_round_done) return true;
  if (facts.predicted_last_round <= facts.shares.disk) return false;
  if (facts.ram_total == 0) return true;
  // QEMU stops at rate * limit. Until we look again it moves on by rate * interval; twice that, because rates jump.
  const double seconds =
      static_cast<double>(facts.shares.memory + 2 * facts.poll_interval) / static_cast<double>(kSecond);
  return static_cast<double>(facts.ram_remaining) <= 2 * static_cast<double>(facts.memory_rate) * seconds;
}

uint64_t switchover_bandwidth(uint64_t link_rate) {
  return link_rate + link_rate / 2;  // half of it again: few guests change nothing but what does not compress
}

bool near_switchover(uint64_t ram_remaining, uint64_t bandwidth, const DowntimeShares& shares) {
  constexpr double kNear = 8;
  const double fits =
      static_cast<double>(bandwidth) * static_cast<double>(shares.memory) / static_cast<double>(kSecond);
  return static_cast<double>(ram_remaining) <= kNear * fits;
}

bool stopped_too_early(Nanoseconds predicted, Nanoseconds downtime_limit) {
  return predicted > 2 * downtime_limit;
}

}  // namespace vmferry
