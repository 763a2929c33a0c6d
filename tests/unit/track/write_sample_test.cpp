// SPDX-License-Identifier: Apache-2.0
#include "engine/track/write_sample.h"

#include <gmock/gmock.h>

namespace vmferry {
namespace {

using testing::ElementsAre;

// A block that is counted twice makes an overwriting guest look like one that fills its disk, and refuses its
// migration.
TEST(WriteSample, EveryBlockCountsOnceHoweverItWasWritten) {
  WriteSample sample;
  sample.note({8192, 4096});
  sample.note({0, 1});
  sample.note({4095, 2});  // the end of one block and the start of the next
  sample.note({8192, 4096});
  sample.note({8192 + 512, 512});
  sample.note({40'960, 12'288});
  sample.note({45'056, 4096});
  EXPECT_THAT(sample.blocks(4096), ElementsAre(0, 1, 2, 10, 11, 12));
  EXPECT_EQ(sample.written_bytes(), 4096U + 1 + 2 + 4096 + 512 + 12'288 + 4096);
  EXPECT_EQ(sample.noted_bytes(), sample.written_bytes());
  EXPECT_TRUE(WriteSample().blocks(4096).empty());
}

// I9: a guest that writes as fast as it can costs no more than the list.
TEST(WriteSample, BeyondItsListWritesAreCountedOnly) {
  WriteSample sample;
  for (uint64_t i = 0; i < WriteSample::kRangesMax + 100; ++i) sample.note({i * 4096, 4096});
  EXPECT_EQ(sample.blocks(4096).size(), WriteSample::kRangesMax);
  EXPECT_EQ(sample.noted_bytes(), WriteSample::kRangesMax * 4096);
  EXPECT_EQ(sample.written_bytes(), (WriteSample::kRangesMax + 100) * 4096);
}

}  // namespace
}  // namespace vmferry
