// SPDX-License-Identifier: Apache-2.0
//
// Keeps a loop at a rate, and lets it know when it was told to stop. One per process, single-threaded.
#pragma once

#include <cstdint>

namespace vmferry::guest {

std::uint64_t now_ns();

// Work that was held up is caught up only for this long: a guest that stood still for seconds shows a lower rate
// afterwards, not a burst that hides it.
inline constexpr std::uint64_t kCatchUpNs = 500'000'000;

class Pacer {
 public:
  // unit: bytes of one step; rate 0: no pause.
  Pacer(std::uint64_t rate, std::uint64_t unit);
  // Sleeps until the next step is due.
  void wait();

 private:
  std::uint64_t interval_ns_;
  std::uint64_t due_ns_;
};

}  // namespace vmferry::guest
