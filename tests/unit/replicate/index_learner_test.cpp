// SPDX-License-Identifier: Apache-2.0
//
// What the sender learns by reading while it has nothing to do.
#include <gtest/gtest.h>

#include "tests/unit/replicate/test_world.h"

namespace vmferry::testing {
namespace {

// As after a restart of the source's daemon: tracking and record stay, the session is new.
void new_session(TestWorld& world) {
  world.cut();
  world.a.sender.reset();
  world.start_source(world.a);
  ASSERT_TRUE(world.connect());
}

bool learnt(TestWorld& world) {
  return world.executor.run_until([&] { return world.a.sender->status().index_complete; }, 60 * kSecond);
}

TEST(IndexLearner, BlocksOfAnEarlierSessionTravelAsReferencesOnceTheyAreLearnt) {
  // A guest that copies a file of last week must not send it again.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20, 64U << 10};
  TestWorld world(options);
  start(world);
  world.write(0, 0, pattern(1U << 20, 1));
  world.write(1, 0, pattern(8192, 2));
  ASSERT_TRUE(world.sync());
  new_session(world);
  ASSERT_TRUE(world.sync());
  ASSERT_TRUE(learnt(world));
  EXPECT_EQ(world.a.sender->status().index_blocks, (1U << 20) / 4096 + 2);
  EXPECT_LT(world.a.stores[0]->read_bytes, (2U << 20) + (512U << 10)) << "holes are not read";
  const uint64_t before = world.link.a.sent_bytes;
  world.write(0, 2U << 20, pattern(1U << 20, 1));
  world.write(0, 3U << 20, pattern(8192, 2));
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_EQ(world.a.sender->status().reference_bytes, (1U << 20) + 8192U);
  EXPECT_LT(world.link.a.sent_bytes - before, 3'000U);
  EXPECT_EQ(world.b.receiver->status().reference_mismatches, 0U);
}

TEST(IndexLearner, WhatThisSessionSentIsNotReadAgain) {
  // After a first copy of a terabyte there is nothing to learn: reading it all once more would be for nothing.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  TestWorld world(options);
  start(world);
  world.write(0, 0, pattern(3U << 20, 1));
  ASSERT_TRUE(world.sync());
  const uint64_t before = world.a.stores[0]->read_bytes;
  ASSERT_TRUE(learnt(world));
  EXPECT_LE(world.a.stores[0]->read_bytes - before, 256U << 10);
  EXPECT_EQ(world.a.sender->status().index_blocks, 0U);
}

TEST(IndexLearner, NothingIsLearntWhileTheGuestWorksOrTheCopyLacksIt) {
  // Background reads beside a working guest would cost it (I12); what the copy does not have is no reference.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  TestWorld world(options);
  start(world);
  world.write(0, 0, pattern(1U << 20, 1));
  ASSERT_TRUE(world.sync());
  new_session(world);
  ASSERT_TRUE(world.sync());
  const uint64_t read_before = world.a.stores[0]->read_bytes;
  for (uint64_t i = 0; i < 2000; ++i) {  // 1000 writes per second, to one place
    world.write(0, 3U << 20, pattern(4096, i));
    world.executor.run_for(kMillisecond);
  }
  EXPECT_LT(world.a.stores[0]->read_bytes - read_before, 128U << 10) << "epochs only";
  EXPECT_EQ(world.a.sender->status().index_blocks, 0U);
  ASSERT_TRUE(world.sync());
  world.cut();
  world.write(0, 0, pattern(256U << 10, 5));
  world.executor.run_for(5 * kSecond);
  EXPECT_EQ(world.a.sender->status().index_blocks, 0U) << "learnt without a peer";
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  ASSERT_TRUE(learnt(world));
  EXPECT_TRUE(world.equal());
}

TEST(IndexLearner, LearntBlocksThatTheCopyLostAreHealedAndNotOfferedAgain) {
  // What was read here says nothing about a disk that rots there: the reference fails its proof, once (I8).
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  TestWorld world(options);
  start(world);
  world.write(0, 0, pattern(64U << 10, 1));
  ASSERT_TRUE(world.sync());
  new_session(world);
  ASSERT_TRUE(world.sync());
  ASSERT_TRUE(learnt(world));
  world.b.stores[0]->data[10'000] ^= 1;
  for (uint64_t copy = 1; copy <= 3; ++copy) {
    world.write(0, copy << 20, pattern(64U << 10, 1));
    ASSERT_TRUE(world.sync());
  }
  EXPECT_EQ(world.b.receiver->status().reference_mismatches, 1U);
  EXPECT_EQ(world.a.sender->status().resent_references, 1U);
  world.b.stores[0]->data[10'000] ^= 1;
  EXPECT_TRUE(world.equal());
  EXPECT_FALSE(world.protocol_error);
}

}  // namespace
}  // namespace vmferry::testing
