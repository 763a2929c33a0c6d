// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/estimator.h"

#include <gtest/gtest.h>

namespace vmferry {
namespace {

TEST(Estimator, LastRoundIsBytesOverTheBetterKnownRatePlusOneWay) {
  RoundProgress progress;
  progress.predicted_bytes = 1'000'000;
  progress.send_rate = 10'000'000;
  EXPECT_EQ(predicted_last_round(progress, 0, 40 * kMillisecond), 120 * kMillisecond);
  EXPECT_EQ(predicted_last_round(progress, 20'000'000, 0), 50 * kMillisecond);
}

// Without any rate a migration must not run into the switchover as if the link were infinitely fast.
TEST(Estimator, UnknownRateTakesForEverUnlessNothingIsDirty) {
  RoundProgress progress;
  progress.predicted_bytes = 1;
  EXPECT_GT(predicted_last_round(progress, 0, 0), 1000 * kSecond);
  progress.predicted_bytes = 0;
  EXPECT_EQ(predicted_last_round(progress, 0, 0), 0);
}

// An overflow here would release the brake with terabytes to go.
TEST(Estimator, HugeBacklogDoesNotOverflow) {
  RoundProgress progress;
  progress.predicted_bytes = UINT64_MAX;
  progress.send_rate = 1;
  EXPECT_GT(predicted_last_round(progress, 0, 0), 1000 * kSecond);
}

TEST(Estimator, SharesLeaveTimeForWhatHasNoBytes) {
  for (const Nanoseconds limit : {50 * kMillisecond, 300 * kMillisecond, 2 * kSecond}) {
    const DowntimeShares shares = downtime_shares(limit);
    EXPECT_LT(shares.disk + shares.memory, limit);
    EXPECT_GT(shares.disk, 0);
  }
}

BrakeFacts at_the_end() {
  return {.first_round_done = true,
          .ram_remaining = 1'000'000,
          .ram_total = 500'000'000,
          .memory_rate = 20'000'000,
          .predicted_last_round = 500 * kMillisecond,
          .poll_interval = 100 * kMillisecond,
          .shares = downtime_shares(300 * kMillisecond)};
}

TEST(Estimator, BrakeHoldsOnlyNearTheEndWhileTheDisksAreNotReady) {
  EXPECT_TRUE(brake_held(at_the_end()));
  BrakeFacts far = at_the_end();
  far.ram_remaining = 300'000'000;
  EXPECT_FALSE(brake_held(far)) << "memory flows while it has far to go";
  BrakeFacts ready = at_the_end();
  ready.predicted_last_round = 100 * kMillisecond;
  EXPECT_FALSE(brake_held(ready));
}

// An idle guest is at pre-switchover after 20 ms, before any poll.
TEST(Estimator, BrakeHoldsUntilSomethingIsKnown) {
  BrakeFacts unknown = at_the_end();
  unknown.ram_total = 0;
  unknown.ram_remaining = 0;
  EXPECT_TRUE(brake_held(unknown));
  BrakeFacts first = at_the_end();
  first.first_round_done = false;
  first.predicted_last_round = 0;
  EXPECT_TRUE(brake_held(first));
}

TEST(Estimator, TooEarlyIsTwiceTheLimitBecauseEstimatesErr) {
  EXPECT_FALSE(stopped_too_early(600 * kMillisecond, 300 * kMillisecond));
  EXPECT_TRUE(stopped_too_early(601 * kMillisecond, 300 * kMillisecond));
}

// QEMU takes the speed of compressible pages for that of the last ones, which are what the guest changes all the time:
// measured at 100 Mbit/s, 10 MiB were left for a pause of 120 ms, and it took 0.9 s.
TEST(Estimator, QemuCountsOnTheLinkForThePauseAndNotOnCompression) {
  constexpr uint64_t kLink = 12'500'000;
  const uint64_t told = switchover_bandwidth(kLink);
  EXPECT_GT(told, kLink);
  const DowntimeShares shares = downtime_shares(300 * kMillisecond);
  const double left = static_cast<double>(told) * static_cast<double>(shares.memory) / 1e9;
  EXPECT_LT(left / kLink, 0.25) << "what is left, when none of it compresses, fits beside the disks' last epoch";
  EXPECT_EQ(switchover_bandwidth(0), 0U) << "nothing measured: QEMU decides by itself";
  const auto fits = static_cast<uint64_t>(left);
  EXPECT_TRUE(near_switchover(fits, told, shares));
  EXPECT_TRUE(near_switchover(8 * fits - 8, told, shares));
  EXPECT_FALSE(near_switchover(9 * fits, told, shares)) << "a first pass is no reason to allow a longer pause";
}

}  // namespace
}  // namespace vmferry
