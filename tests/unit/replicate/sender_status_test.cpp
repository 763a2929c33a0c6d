// SPDX-License-Identifier: Apache-2.0
//
// Figures and reasons of a Sender, and the ends of a verification that does not get on.
#include <algorithm>
#include <cerrno>

#include <gtest/gtest.h>

#include "engine/replicate/progress.h"
#include "tests/unit/replicate/test_world.h"

namespace vmferry::testing {
namespace {

TEST(SampledRate, SamplesOfMicrosecondsAreTakenTogether) {
  // Four blocks in the microsecond after the start would be shown as gigabytes per second, and decay for half a minute.
  SampledRate rate;
  rate.add(1U << 30, 1'000);
  EXPECT_EQ(rate.bytes_per_second(), 0U);
  SampledRate slow;
  for (int i = 0; i < 1000; ++i) slow.add(1000, kMillisecond);
  EXPECT_NEAR(slow.value(), 1e6, 1e3);
  slow.add(5, 0);
  slow.add(5, -kSecond);
  EXPECT_NEAR(slow.value(), 1e6, 1e3);
}

TEST(SampledRate, FollowsAChangeWithinSecondsAndAStallOfOneDoesNotJump) {
  // An estimate that jumps with each sample is ignored, one that never moves is wrong.
  SampledRate rate;
  for (int i = 0; i < 5; ++i) rate.add(1000, kSecond);
  EXPECT_NEAR(rate.value(), 1000, 1);
  rate.add(0, kSecond);
  EXPECT_NEAR(rate.value(), 800, 1);
  for (int i = 0; i < 20; ++i) rate.add(0, kSecond);
  EXPECT_LT(rate.value(), 20);
}

TEST(SenderStatus, BlocksMarkedForAFullCopyOrReturnedByACutAreNoWritesOfTheGuest) {
  // The first estimate of every copy would be "never", because the guest seems to write faster than any link.
  auto options = small_world();
  options.host.volume_sizes = {16U << 20};
  TestWorld world(options);
  world.link.bytes_per_second = 1'000'000;
  world.start_source(world.a);
  world.write(0, 0, pattern(12U << 20, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.executor.run_for(60 * kSecond);  // until the write itself is out of the rate
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  double estimate = -1;
  for (int i = 0; i < 6; ++i) {
    world.executor.run_for(kSecond);
    estimate = std::max(estimate, world.a.sender->status().estimate_s);
    EXPECT_LT(world.a.sender->status().dirty_rate, 1000U) << i;
    if (i == 3) {
      world.cut();
      ASSERT_TRUE(world.connect());
    }
  }
  EXPECT_GT(estimate, 0);
}

TEST(SenderStatus, PausedNamesTheWayOut) {
  // "paused" alone does not tell whether somebody did it or something is wrong.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  EXPECT_EQ(world.a.sender->status().reason, "");
  world.a.sender->pause();
  EXPECT_NE(world.a.sender->status().reason.find("replicate resume"), std::string::npos);
}

TEST(ReceiverStatus, TellsThatTheSourceIsPausedAsLongAsItIs) {
  // The copy would call itself in sync for the week in which nobody resumes.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  const auto paused = [&world] {
    world.executor.run_for(kSecond);
    return world.b.receiver->status().source_paused;
  };
  EXPECT_FALSE(paused());
  const Nanoseconds at = world.executor.now();
  world.a.sender->pause();
  EXPECT_TRUE(paused());
  EXPECT_NEAR(static_cast<double>(world.b.receiver->status().source_paused_since), static_cast<double>(at), 1e8);
  // A new connection says it again, and since when.
  world.executor.run_for(60 * kSecond);
  world.cut();
  EXPECT_FALSE(paused()) << "without a connection nobody knows";
  ASSERT_TRUE(world.connect());
  EXPECT_TRUE(paused());
  EXPECT_NEAR(static_cast<double>(world.b.receiver->status().source_paused_since), static_cast<double>(at), 1e8);
  world.a.sender->resume();
  EXPECT_FALSE(paused());
  ASSERT_TRUE(world.sync());
}

TEST(ReceiverStatus, IsNotToldOfAPauseByAMessageThatAnOlderPeerWouldRefuse) {
  // Pausing after an upgrade of one side would end the replication.
  TestWorld world(small_world());
  world.link.a.features = kFeatureEpochs | kFeatureHandover | kFeatureMemoryStream;
  start(world);
  ASSERT_TRUE(world.sync());
  bool told = false;
  world.link.a.tamper = [&told](MessageType type, Bytes&) { told = told || type == MessageType::SourceState; };
  world.a.sender->pause();
  world.cut();
  ASSERT_TRUE(world.connect());
  world.executor.run_for(kSecond);
  world.a.sender->resume();
  ASSERT_TRUE(world.sync());
  EXPECT_FALSE(told);
}

class Verifying : public ::testing::Test {
 protected:
  Verifying() : world(small_world()) { start(world); }

  Result<std::vector<VerifyDifference>> result_within(Nanoseconds limit) {
    const Nanoseconds until = world.executor.now() + limit;
    world.executor.run_until([&] { return result.has_value() || world.executor.now() > until; });
    if (!result) return fail(ErrorKind::Internal, "it hangs");
    return *result;
  }
  void verify() {
    world.a.sender->verify([this](auto found) { result = std::move(found); });
  }

  TestWorld world;
  std::optional<Result<std::vector<VerifyDifference>>> result;
};

TEST_F(Verifying, WhilePausedNeedsACopyThatLacksNothing) {
  // It would wait for the resume that nobody connects with it.
  ASSERT_TRUE(world.sync());
  world.a.sender->pause();
  verify();
  EXPECT_TRUE(result_within(30 * kSecond));
  result.reset();
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  verify();
  const auto refused = result_within(30 * kSecond);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::Unavailable);
  EXPECT_NE(refused.error().text.find("4096 bytes"), std::string::npos) << refused.error().text;
}

TEST_F(Verifying, EndsWhenTheCopyCannotTakeWhatItLacks) {
  // A full disk over there may stay full for a week.
  ASSERT_TRUE(world.sync());
  world.b.staging->write_error = ENOSPC;
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  verify();
  const auto refused = result_within(120 * kSecond);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().text.find("No space left"), std::string::npos) << refused.error().text;
}

TEST_F(Verifying, EndsWhenThePeerDoesNotAnswer) {
  // A peer may hang without its connection breaking.
  ASSERT_TRUE(world.sync());
  world.link.delay = 3600 * kSecond;
  verify();
  const auto refused = result_within(300 * kSecond);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::Timeout);
}

TEST_F(Verifying, CancelledMakesRoomForTheNext) {
  // A killed client would otherwise hold the only place until the next connection.
  ASSERT_TRUE(world.sync());
  verify();
  world.a.sender->cancel_verify({ErrorKind::Unavailable, "its client left"});
  const auto cancelled = result_within(30 * kSecond);
  ASSERT_FALSE(cancelled);
  EXPECT_EQ(cancelled.error().text, "its client left");
  result.reset();
  verify();
  EXPECT_TRUE(result_within(30 * kSecond));
  world.a.sender->cancel_verify({ErrorKind::Unavailable, "nothing is there to cancel"});
}

TEST(ReceiverStatus, SaysWhyNothingIsTakenUntilAnEpochIsApplied) {
  // Between two attempts it would look well.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  EXPECT_EQ(world.b.receiver->status().reason, "");
  world.b.staging->write_error = ENOSPC;
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return !world.b.receiver->status().reason.empty(); }));
  const Nanoseconds since = world.b.receiver->status().reason_since;
  for (int i = 0; i < 100; ++i) {
    world.executor.run_for(100 * kMillisecond);
    ASSERT_NE(world.b.receiver->status().reason, "") << i;
    ASSERT_EQ(world.b.receiver->status().reason_since, since) << "one trouble, whatever the attempts say";
  }
  world.b.staging->write_error = 0;
  ASSERT_TRUE(world.sync());
  EXPECT_EQ(world.b.receiver->status().reason, "");
}

TEST(FullCopy, ItsEndIsDurableBeforeAnybodyHearsOfIt) {
  // A power cut a second later would send the whole disk again.
  auto options = small_world();
  options.host.volume_sizes = {32U << 20};
  TestWorld world(options);
  world.start_source(world.a);
  world.write(0, 0, pattern(64U << 10, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  world.crash_source();
  world.a.boot();
  EXPECT_LE(world.a.devices[0]->dirty_bytes(), 4U << 20) << "the activity log still names one region";
}

}  // namespace
}  // namespace vmferry::testing
