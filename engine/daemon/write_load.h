// SPDX-License-Identifier: Apache-2.0
//
// What a guest's writes would take to send, per second: for the preflight of a migration, which refuses one that never
// ends.
//
// Flow: Daemon feeds WriteRate from the exports' counters all the time, which costs nothing per write. Only when that
// is more than the link carries, measure_write_load() looks closer for a few seconds: which distinct blocks are
// written, and how far their content compresses. A guest that overwrites one block, or writes text, is not refused.
// Threads: the reactor's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/base/units.h"

namespace vmferry {

class Daemon;

// Bytes per second over the last ten seconds.
class WriteRate {
 public:
  void add(uint64_t total, Nanoseconds now) {
    if (!samples_.empty() && now - samples_.back().at < kSecond) return;
    samples_.push_back({total, now});
    if (samples_.size() > kSamples) samples_.pop_front();
  }
  std::optional<uint64_t> rate() const {  // nullopt: not watched long enough
    if (samples_.size() < 2) return std::nullopt;
    const Sample& first = samples_.front();
    const Sample& last = samples_.back();
    const uint64_t bytes = last.total - std::min(last.total, first.total);
    return static_cast<uint64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(last.at - first.at));
  }

 private:
  static constexpr size_t kSamples = 11;
  struct Sample {
    uint64_t total = 0;
    Nanoseconds at = 0;
  };
  std::deque<Sample> samples_;
};

// Bytes on the wire per second, after compression; 0: below `link_rate` (bytes per second), or not known. At once in
// most cases, else after kLookTime.
constexpr Nanoseconds kWriteLookTime = 4 * kSecond;
void measure_write_load(Daemon& daemon, const std::vector<std::string>& volumes, uint64_t link_rate,
                        std::function<void(uint64_t wire_rate)> done);

}  // namespace vmferry
