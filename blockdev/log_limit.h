// SPDX-License-Identifier: Apache-2.0
//
// One log line per ten seconds for a failure that may come with every request.
// Threads: one executor.
#pragma once

#include <optional>

#include "engine/base/units.h"

namespace vmferry {

class LogLimit {
 public:
  // How many were suppressed since the last line, when a line is due now; nullopt otherwise.
  std::optional<uint64_t> allow(Nanoseconds now) {
    if (written_ && now - last_ < kInterval) {
      ++suppressed_;
      return std::nullopt;
    }
    written_ = true;
    last_ = now;
    const uint64_t count = suppressed_;
    suppressed_ = 0;
    return count;
  }

 private:
  static constexpr Nanoseconds kInterval = 10 * kSecond;
  bool written_ = false;
  Nanoseconds last_ = 0;
  uint64_t suppressed_ = 0;
};

}  // namespace vmferry
