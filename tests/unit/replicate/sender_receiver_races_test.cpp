// SPDX-License-Identifier: Apache-2.0
//
// Sender and Receiver when an answer comes late: of a store that was asked in an earlier epoch, of a flush while its
// epoch is being committed, of a disk that stays full.
#include <gtest/gtest.h>

#include <cerrno>

#include "tests/unit/replicate/test_world.h"

namespace vmferry::testing {
namespace {

TEST(ReplicationRaces, AnswerAboutHolesOfAnAbandonedEpochIsNotUsedForTheNext) {
  // The store looked before the guest's last write: its block would travel as zeroes, and be called clean.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  TestWorld world(options);
  start(world);
  world.write(0, 0, pattern(4U << 20, 1));
  ASSERT_TRUE(world.sync());
  world.zero(0, {0, 4U << 20});
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.a.stores[0]->query_delay = 100 * kMillisecond;
  world.a.sender->sync_now();
  world.executor.run_for(20 * kMillisecond);  // sealed, and the store was asked
  world.write(0, 8192, pattern(4096, 2));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  for (auto& device : world.a.devices) device->set_gate(WriteGate::Parked);
  std::optional<Result<uint64_t>> final_epoch;
  world.a.sender->send_final_epoch(world.executor.new_id(), TrafficClass::Urgent,
                                   [&](Result<uint64_t> done) { final_epoch = std::move(done); });
  ASSERT_TRUE(world.executor.run_until([&] { return final_epoch.has_value(); }));
  ASSERT_TRUE(final_epoch->has_value());
  EXPECT_GT(world.a.sender->status().epochs_abandoned, 0U) << "otherwise this test proves nothing";
  EXPECT_TRUE(world.equal());
}

TEST(ReplicationRaces, EpochWhoseFlushFailedIsNotCommitted) {
  // A failed flush is reported once: the commit's own flush succeeds, although the frames are lost.
  auto options = small_world();
  options.receiver.segment_bytes = 4096;
  TestWorld world(options);
  start(world);
  ASSERT_TRUE(world.sync());
  const uint64_t before = world.b.receiver->status().epoch;
  world.write(0, 0, pattern(100'000, 3));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.b.staging->flush_error_once = EIO;
  world.a.sender->sync_now();
  ASSERT_TRUE(world.executor.run_until([&] { return world.b.staging->flush_error_once == 0; }));
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_FALSE(world.applied.contains(before + 1)) << "its frames were not all durable";
  EXPECT_TRUE(world.applied.contains(world.b.receiver->status().epoch));
}

TEST(ReplicationRaces, FramesOfAnEpochThatWasGivenUpReturnTheirCredit) {
  // A staging area that stays full for minutes would otherwise use the credit up, and replication would stand still
  // for ever when there is space again.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  options.receiver.credit_window_min = options.receiver.credit_window_max = 3U << 20;
  TestWorld world(options);
  world.link.bytes_per_second = 10'000'000'000;  // the next frame is there before the first one has failed
  start(world);
  ASSERT_TRUE(world.sync());
  world.write(0, 0, pattern(4U << 20, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.b.staging->write_error = ENOSPC;
  world.b.staging->write_error_from = 256 * 1024;
  world.a.sender->sync_now();
  world.executor.run_for(900 * kSecond);
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::Degraded);
  world.b.staging->write_error = 0;
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
}

TEST(ReplicationRaces, AnAppliedEpochThatCannotBeRecordedIsNotReplacedByTheNext) {
  // With its frames gone and the record still naming the epoch before, a power cut leaves a copy that calls its image
  // by the wrong epoch (I6).
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  const uint64_t before = world.b.receiver->status().epoch;
  world.b.staging->write_error = EIO;
  world.b.staging->write_error_to = ReplicaState::kReservedSize;
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.a.sender->sync_now();
  ASSERT_TRUE(world.executor.run_until([&] { return !world.b.receiver->status().reason.empty(); }));
  EXPECT_EQ(world.b.receiver->status().epoch, before) << "what is not recorded is not told";
  world.executor.run_for(60 * kSecond);
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::Degraded);
  EXPECT_EQ(world.a.sender->status().epoch, before);

  world.crash_copy();
  world.b.staging->write_error = 0;
  world.b.boot();
  world.start_copy(world.b);
  ASSERT_TRUE(world.executor.run_until([&] { return world.b.receiver->status().epoch > before; }));
  EXPECT_EQ(world.b.receiver->status().epoch, before + 1);
  EXPECT_TRUE(world.equal());
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
}

TEST(ReplicationRaces, ARecordThatCannotBeWrittenIsTriedAgainWithoutACrash) {
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  world.b.staging->write_error = ENOSPC;
  world.b.staging->write_error_to = ReplicaState::kReservedSize;
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.a.sender->sync_now();
  ASSERT_TRUE(world.executor.run_until([&] { return !world.b.receiver->status().reason.empty(); }));
  world.b.staging->write_error = 0;
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_EQ(world.b.receiver->status().reason, "");
  EXPECT_FALSE(world.b.receiver->status().half_applied);
}

TEST(ReplicationRaces, CopyThatHoldsHalfAnEpochDoesNotCloseWithSuccess) {
  // Who closes it to make it the primary would give the guest a mix of two epochs (I6).
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.b.stores[0]->write_error = EIO;
  world.a.sender->sync_now();
  ASSERT_TRUE(world.executor.run_until([&] { return !world.b.receiver->status().reason.empty(); }));
  EXPECT_TRUE(world.b.receiver->status().half_applied);
  std::optional<Status> closed;
  world.b.receiver->close([&](Status status) { closed = std::move(status); });
  ASSERT_TRUE(world.executor.run_until([&] { return closed.has_value(); }));
  EXPECT_FALSE(closed->has_value());

  // The epoch is still staged: opened again, the copy is whole.
  world.cut();
  world.b.stores[0]->write_error = 0;
  world.b.receiver.reset();
  world.start_copy(world.b);
  EXPECT_TRUE(world.equal());
  EXPECT_FALSE(world.b.receiver->status().half_applied);
}

}  // namespace
}  // namespace vmferry::testing
