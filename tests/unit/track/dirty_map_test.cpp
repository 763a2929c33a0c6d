// SPDX-License-Identifier: Apache-2.0
#include "engine/track/dirty_map.h"

#include <gtest/gtest.h>

#include <set>

#include "engine/base/random.h"

namespace vmferry {
namespace {

constexpr uint32_t kBlock = 4096;

std::vector<uint64_t> walk(const DirtyMap& map, uint64_t length_max) {
  std::vector<uint64_t> blocks;
  for (uint64_t from = 0;;) {
    const auto run = map.next_run(from, length_max);
    if (!run) return blocks;
    EXPECT_LE(run->length, std::max<uint64_t>(length_max, kBlock));
    for (uint64_t at = run->offset; at < run->end(); at += kBlock) blocks.push_back(at / kBlock);
    from = run->end();
  }
}

// A block lost by the summary or the word arithmetic is never sent again.
TEST(DirtyMap, AgreesWithASetOfBlocksUnderRandomMarksAndClears) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Random random(seed);
    const uint64_t size = 40_MiB + random.below(3 * kBlock);
    DirtyMap map(size, kBlock);
    std::set<uint64_t> model;
    for (int step = 0; step < 300; ++step) {
      ByteRange range;
      range.offset = random.below(size);
      range.length = 1 + random.below(std::min<uint64_t>(size - range.offset, random.chance(1, 10) ? size : 70'000));
      if (random.chance(2, 3)) {
        map.mark(range);
        for (uint64_t block = range.offset / kBlock; block <= (range.end() - 1) / kBlock; ++block) model.insert(block);
      } else {
        map.clear(range);
        for (uint64_t block = div_up(range.offset, kBlock);
             block * kBlock < range.end() && ((block + 1) * kBlock <= range.end() || range.end() == size); ++block) {
          model.erase(block);
        }
      }
      ASSERT_EQ(map.dirty_blocks(), model.size()) << "seed=" << seed << " step=" << step;
    }
    ASSERT_EQ(walk(map, 64_KiB), std::vector<uint64_t>(model.begin(), model.end())) << "seed=" << seed;
    ASSERT_EQ(walk(map, 1), std::vector<uint64_t>(model.begin(), model.end())) << "seed=" << seed;
  }
}

// Forgetting a block of which only a part was acknowledged loses the other part.
TEST(DirtyMap, PartlyClearedBlockStaysDirty) {
  DirtyMap map(1_MiB, kBlock);
  map.mark({0, 3 * kBlock});
  EXPECT_TRUE(map.clear({1, 2 * kBlock}));
  EXPECT_EQ(walk(map, 1_MiB), (std::vector<uint64_t>{0, 2}));
  EXPECT_FALSE(map.clear({1, kBlock - 1}));
}

// The short last block of an odd-sized device must be found, clipped, and cleared by a range that ends at the device.
TEST(DirtyMap, ShortLastBlockIsClippedAndCleared) {
  DirtyMap map(10 * kBlock + 100, kBlock);
  map.mark({10 * kBlock + 99, 1});
  EXPECT_EQ(map.next_run(0, 1_MiB), (ByteRange{10 * kBlock, 100}));
  EXPECT_TRUE(map.clear({10 * kBlock, 100}));
  EXPECT_TRUE(map.empty());
}

// Growing must keep every mark and begin clean behind them.
TEST(DirtyMap, GrowthKeepsMarksAndAddsCleanBlocks) {
  DirtyMap map(5 * kBlock, kBlock);
  map.mark({4 * kBlock, kBlock});
  map.grow(500 * kBlock);
  EXPECT_EQ(map.dirty_blocks(), 1U);
  map.mark({499 * kBlock, kBlock});
  EXPECT_EQ(walk(map, 1_MiB), (std::vector<uint64_t>{4, 499}));
}

TEST(DirtyMap, MergeMovesEveryBitAndEmptiesTheOther) {
  DirtyMap a(64_MiB, kBlock);
  DirtyMap b(64_MiB, kBlock);
  a.mark({0, kBlock});
  b.mark({0, 2 * kBlock});
  b.mark({63_MiB, kBlock});
  a.merge_and_empty(b);
  EXPECT_TRUE(b.empty());
  EXPECT_EQ(walk(a, 1_MiB), (std::vector<uint64_t>{0, 1, 63_MiB / kBlock}));
  EXPECT_EQ(b.next_run(0, 1_MiB), std::nullopt);
}

// Bits of a saved page beyond the end of the device must not become blocks.
TEST(DirtyMap, WordsBeyondTheEndAreIgnored) {
  DirtyMap map(10 * kBlock, kBlock);
  map.mark_word(0, ~uint64_t{0});
  map.mark_word(1, ~uint64_t{0});
  EXPECT_EQ(map.dirty_blocks(), 10U);
}

// A range beyond the device is a bug above: it must stop, not mark a stray bit.
TEST(DirtyMapDeathTest, RangeOnePastTheEndIsRefused) {
  DirtyMap map(10 * kBlock, kBlock);
  EXPECT_DEATH(map.mark({9 * kBlock, kBlock + 1}), "");
}

}  // namespace
}  // namespace vmferry
