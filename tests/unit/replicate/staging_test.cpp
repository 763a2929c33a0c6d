// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/staging.h"

#include <gtest/gtest.h>

#include "tests/unit/replicate/test_world.h"

namespace vmferry::testing {
namespace {

constexpr uint64_t kBase = 64 * 1024;

class Staging : public ::testing::Test {
 protected:
  Id128 session() {
    Id128 id;
    id.bytes[0] = 7;
    return id;
  }
  EpochBegin epoch(uint64_t number) {
    EpochBegin begin;
    begin.epoch = number;
    begin.session = begin.lineage = session();
    begin.first_frame = 10;
    return begin;
  }
  static FrameBody body(const Bytes& literals) {
    FrameBody out;
    out.runs = {{.kind = RunKind::Literal, .volume = 0, .range = {0, literals.size()}}};
    out.literals = literals;
    return out;
  }
  Errno wait(const std::function<void(StagingArea::Done)>& start) {
    std::optional<Errno> result;
    start([&](Errno error) { result = error; });
    EXPECT_TRUE(executor.run_until([&] { return result.has_value(); }));
    return result.value_or(-1);
  }
  // Frames 10.. of the given sizes.
  void stage(uint64_t number, const std::vector<size_t>& sizes, bool commit) {
    ASSERT_EQ(wait([&](auto done) { area->begin(epoch(number), done); }), 0);
    uint64_t frame = 10;
    for (const size_t size : sizes) {
      append({.frame = frame}, size, number);
      ++frame;
    }
    if (!commit) return;
    ASSERT_EQ(wait([&](auto done) { area->commit(true, done); }), 0);
  }
  void append(const StagedFrame& frame, size_t size, uint64_t number, uint64_t seed = 0) {
    const Bytes literals = pattern(size, frame.frame + seed);
    Bytes image = StagingArea::prepare_frame(number, session(), frame, body(literals));
    ASSERT_EQ(wait([&](auto done) { area->append(frame, std::move(image), done); }), 0);
  }
  // What a new daemon finds on the same disk.
  std::optional<StagingArea::Found> find(uint64_t applied = 0) {
    area = std::make_unique<StagingArea>(executor, disk, kBase);
    std::optional<Result<std::optional<StagingArea::Found>>> found;
    area->scan(applied, [&](auto result) { found = std::move(result); });
    EXPECT_TRUE(executor.run_until([&] { return found.has_value(); }));
    EXPECT_TRUE(found && *found);
    return **found;
  }

  TestExecutor executor{1};
  TestDisk disk{executor, 2U << 20};
  std::unique_ptr<StagingArea> area = std::make_unique<StagingArea>(executor, disk, kBase);
};

TEST_F(Staging, EmptyDiskHoldsNothing) {
  // A new volume must not find an epoch in its zeroes.
  EXPECT_FALSE(find());
}

TEST_F(Staging, CommittedEpochIsFoundWithItsContent) {
  // After the commit the epoch belongs to the copy, whatever happens to the daemon.
  stage(5, {4096, 100'000, 512}, true);
  const auto found = find();
  ASSERT_TRUE(found);
  EXPECT_TRUE(found->committed);
  EXPECT_TRUE(found->consistent);
  EXPECT_EQ(found->begin, epoch(5));
  ASSERT_EQ(area->records().size(), 3U);
  std::shared_ptr<StagingArea::Content> content;
  area->read(area->records()[1], [&](auto read) { content = read.value_or(nullptr); });
  ASSERT_TRUE(executor.run_until([&] { return content != nullptr; }));
  const Bytes expected = pattern(100'000, 11);
  EXPECT_TRUE(
      std::equal(content->body.literals.begin(), content->body.literals.end(), expected.begin(), expected.end()));
}

TEST_F(Staging, EpochThatWasAppliedIsNotFoundAgain) {
  // Applying an old epoch over newer ones would take the copy back.
  stage(5, {4096}, true);
  EXPECT_TRUE(find(4));
  EXPECT_FALSE(find(5));
  EXPECT_FALSE(find(6));
}

TEST_F(Staging, UncommittedEpochIsResumableUpToTheLastIntactRecord) {
  // A cut must not cost what is already here, and a torn record must not count.
  stage(5, {4096, 100'000, 512}, false);
  auto found = find();
  ASSERT_TRUE(found);
  EXPECT_FALSE(found->committed);
  EXPECT_EQ(found->contiguous, 12U);
  const StagedRecord last = area->records()[2];
  disk.data[last.offset + 200] ^= 1;
  found = find();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->contiguous, 11U);
}

TEST_F(Staging, DamageAnywhereBeforeTheCommitMakesItUncommitted) {
  // Torn or lost at every record boundary, and one byte of every block: an epoch is applied whole or not at all.
  stage(5, {4096, 20'000, 512, 9000}, true);
  const Bytes intact = disk.data;
  ASSERT_TRUE(find()->committed);
  const auto records = area->records();
  const uint64_t end = records.back().offset + records.back().size + StagingArea::kAlignment;
  for (uint64_t at = kBase; at < end; at += 512) {
    for (const bool torn : {false, true}) {
      disk.data = intact;
      bool changed = false;
      for (uint64_t i = at; i < at + 512; ++i) {
        if (torn) {
          changed = changed || disk.data[i] != 0;
          disk.data[i] = 0;
        }
      }
      if (!torn) {
        disk.data[at] ^= 0x10;
        changed = true;
      }
      const auto found = find();
      // Padding behind a record carries nothing.
      bool in_padding = false;
      for (const auto& record : records) {
        const uint64_t payload = 96 + 4 + 19 +
                                 (record.frame.frame == 10   ? 4096U
                                  : record.frame.frame == 11 ? 20'000U
                                  : record.frame.frame == 12 ? 512U
                                                             : 9000U);
        in_padding = in_padding || (at >= record.offset + payload && at < record.offset + record.size);
      }
      in_padding = in_padding || (at >= kBase + 512 && at < kBase + StagingArea::kAlignment) ||
                   at >= end - StagingArea::kAlignment + 512;
      EXPECT_EQ(found && found->committed, in_padding || !changed) << at << (torn ? " torn" : " flipped");
    }
  }
}

TEST_F(Staging, StaleRecordsOfAnEarlierAttemptDoNotContinueANewerOne) {
  // After a truncation, frames are cut differently: an old frame behind a new one would leave a gap between them.
  stage(5, {4096, 4096, 4096, 4096}, false);
  area->truncate_after(10);
  append({.frame = 11}, 4096, 5, 1000);
  const auto found = find();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->contiguous, 11U) << "frames 12 and 13 belong to the earlier attempt";
}

TEST_F(Staging, FrameThatWasNeverHealedIsNotCounted) {
  // Its references did not match: without the healing frame its blocks are missing.
  ASSERT_EQ(wait([&](auto done) { area->begin(epoch(5), done); }), 0);
  append({.frame = 10}, 4096, 5);
  append({.frame = 11, .unresolved = true}, 4096, 5);
  append({.frame = 12}, 4096, 5);
  EXPECT_EQ(find()->contiguous, 10U);

  ASSERT_EQ(wait([&](auto done) { area->begin(epoch(6), done); }), 0);
  append({.frame = 10}, 4096, 6);
  append({.frame = 11, .unresolved = true}, 4096, 6);
  append({.frame = 12, .heals = 11}, 4096, 6);
  EXPECT_EQ(find()->contiguous, 12U);
}

TEST_F(Staging, EndOfTheAreaIsNoSpaceNotAnOverrun) {
  // The device's end is the configured limit (I9).
  ASSERT_EQ(wait([&](auto done) { area->begin(epoch(5), done); }), 0);
  const Bytes literals = pattern(900'000, 1);
  Errno last = 0;
  for (uint64_t frame = 10; frame < 20 && last == 0; ++frame) {
    const StagedFrame staged{.frame = frame};
    Bytes image = StagingArea::prepare_frame(5, session(), staged, body(literals));
    last = wait([&](auto done) { area->append(staged, std::move(image), done); });
  }
  EXPECT_EQ(last, ENOSPC);
  EXPECT_LE(area->used_bytes(), area->capacity());
}

TEST_F(Staging, ForgettingGivesSpaceBackAndReservationNeverTouchesRecords) {
  // Reserving zeroes a range; over a record it would destroy the epoch.
  stage(5, {300'000, 300'000}, false);
  ASSERT_EQ(wait([&](auto done) { area->reserve(1U << 20, done); }), 0);
  EXPECT_EQ(find()->contiguous, 11U);
  ASSERT_EQ(wait([&](auto done) { area->reserve(1U << 20, done); }), 0);
  EXPECT_EQ(find()->contiguous, 11U);
  ASSERT_EQ(wait([&](auto done) { area->forget(8192, done); }), 0);
  EXPECT_EQ(area->used_bytes(), 0U);
  for (uint64_t at = kBase + 8192; at < disk.size(); ++at) ASSERT_EQ(disk.data[at], 0) << at;
}

}  // namespace
}  // namespace vmferry::testing
