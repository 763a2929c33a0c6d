// SPDX-License-Identifier: Apache-2.0
#include "engine/delta/session_index.h"

#include <gtest/gtest.h>

#include "engine/base/random.h"

namespace vmferry::delta {
namespace {

constexpr uint64_t kBlock = kDedupBlockSize;

TEST(BlockScan, ZeroIsSeenWhateverTheSizeAndWhereverTheOnlyByteIs) {
  // A missed byte would turn data into a hole at the copy.
  for (const size_t size : {1U, 15U, 16U, 17U, 31U, 33U, 4095U, 4096U}) {
    Bytes block(size, 0);
    EXPECT_TRUE(is_zero(block)) << size;
    EXPECT_EQ(fingerprint(block), kZeroFingerprint);
    for (size_t at = 0; at < size; ++at) {
      block[at] = 1;
      ASSERT_FALSE(is_zero(block)) << size << " " << at;
      block[at] = 0;
    }
  }
}

TEST(BlockScan, OneFingerprintPerBlockAndOneForTheRest) {
  // A shifted fingerprint would refer to the wrong block.
  Bytes data(3 * kBlock + 100, 0);
  data[kBlock] = 1;
  data[3 * kBlock] = 2;
  std::vector<Fingerprint> out{99};
  scan_blocks(data, out);
  ASSERT_EQ(out.size(), 4U);
  EXPECT_EQ(out[0], kZeroFingerprint);
  EXPECT_NE(out[1], kZeroFingerprint);
  EXPECT_EQ(out[2], kZeroFingerprint);
  EXPECT_NE(out[3], kZeroFingerprint);
}

TEST(SessionIndex, OverwrittenBlockIsNoLongerOffered) {
  // A stale offer would cost a round trip for every block that changed.
  SessionIndex index(1 << 20, 1 << 30);
  index.record({0, 5 * kBlock}, 77, 1);
  ASSERT_TRUE(index.find(77));
  EXPECT_EQ(index.find(77)->place, BlockPlace(0, 5 * kBlock));
  EXPECT_EQ(index.find(77)->frame, 1U);
  index.record({0, 5 * kBlock}, 78, 2);
  EXPECT_FALSE(index.find(77));
  ASSERT_TRUE(index.find(78));
  index.record({0, 5 * kBlock}, kZeroFingerprint, 3);
  EXPECT_FALSE(index.find(78));
}

TEST(SessionIndex, LostFramesAreForgottenEarlierOnesKept) {
  // After a cut, references to frames that never arrived would all fail.
  SessionIndex index(1 << 20, 1 << 30);
  index.record({0, 0}, 1, 10);
  index.record({0, kBlock}, 2, 11);
  index.drop_after(10);
  EXPECT_TRUE(index.find(1));
  EXPECT_FALSE(index.find(2));
}

TEST(SessionIndex, WhatIsLearntTakesFreeRoomOnlyAndOutlivesACut) {
  // A pass over a large volume must not push out what was just sent, nor speak against it.
  SessionIndex index(1, kBlock);  // one set
  index.record({0, 0}, 1, 10);
  EXPECT_FALSE(index.learn({0, 0}, 2)) << "what was sent is newer";
  EXPECT_FALSE(index.learn({0, 2 * kBlock}, kZeroFingerprint));
  for (uint64_t i = 1; i < index.blocks_max(); ++i) EXPECT_TRUE(index.learn({0, i * kBlock}, 100 + i)) << i;
  EXPECT_FALSE(index.learn({0, 50 * kBlock}, 150)) << "full";
  index.drop_after(0);
  EXPECT_FALSE(index.find(1));
  ASSERT_TRUE(index.find(101));
  EXPECT_EQ(index.find(101)->frame, 0U);
  EXPECT_EQ(index.find(101)->place, BlockPlace(0, kBlock));
  EXPECT_TRUE(index.learn({0, 50 * kBlock}, 150)) << "there is room again";
  index.record({0, kBlock}, 7, 11);
  EXPECT_FALSE(index.find(101)) << "overwritten";
}

TEST(SessionIndex, ForgetsExactlyTheRange) {
  // A hole punched by the guest takes away its blocks, and nothing one past either end.
  for (const uint64_t group_bytes : {uint64_t{1} << 20, uint64_t{1} << 40}) {
    SessionIndex index(1 << 20, group_bytes);
    for (uint64_t i = 0; i < 6; ++i) index.record({1, i * kBlock}, 100 + i, 1);
    index.record({0, 2 * kBlock}, 200, 1);
    index.forget(1, {2 * kBlock, 2 * kBlock});
    EXPECT_TRUE(index.find(101));
    EXPECT_FALSE(index.find(102));
    EXPECT_FALSE(index.find(103));
    EXPECT_TRUE(index.find(104));
    EXPECT_TRUE(index.find(200));
    index.forget(1, {0, uint64_t{1} << 39});
    EXPECT_FALSE(index.find(104));
    EXPECT_TRUE(index.find(200));
  }
}

TEST(SessionIndex, MemoryStaysAtTheLimitAndAnswersStayTrue) {
  // An index that grows with the guest's writes would be unbounded; one that answers wrongly after eviction, useless.
  SessionIndex index(100'000, uint64_t{1} << 40);
  const size_t before = index.memory_bytes();
  EXPECT_LE(before, 100'000U);
  std::vector<Fingerprint> truth(20'000, 0);
  Random random(1);
  for (int i = 0; i < 100'000; ++i) {
    const uint64_t block = random.below(truth.size());
    truth[block] = 1 + random.below(5'000);
    index.record({0, block * kBlock}, truth[block], static_cast<uint64_t>(i));
  }
  size_t found = 0;
  for (Fingerprint content = 1; content <= 5'000; ++content) {
    const auto hit = index.find(content);
    if (!hit) continue;
    ++found;
    ASSERT_EQ(truth[hit->place.offset() / kBlock], content);
  }
  EXPECT_GT(found, 200U);
  EXPECT_EQ(index.memory_bytes(), before);
}

TEST(SessionIndex, TableAsLargeAsTheGroupForgetsNoBlock) {
  // Sequential blocks must not collide, or a full copy would forget its own beginning.
  SessionIndex index(64 << 20, 1000 * kBlock);
  for (uint64_t i = 0; i < 1000; ++i) index.record({0, i * kBlock}, i * 0x9e3779b97f4a7c15U + 1, 1);
  size_t held = 0;
  for (uint64_t i = 0; i < 1000; ++i) held += index.sent({0, i * kBlock}) ? 1U : 0U;
  EXPECT_EQ(held, 1000U);
}

}  // namespace
}  // namespace vmferry::delta
