// SPDX-License-Identifier: Apache-2.0
#include "engine/track/tracked_device.h"

#include <cerrno>

#include "blockdev/durable_record.h"
#include "engine/track/metadata_layout.h"
#include "tests/unit/track/track_fixture.h"

namespace vmferry {
namespace {

class TrackedDeviceTest : public TrackTest {
 protected:
  void SetUp() override {
    TrackTest::SetUp();
    start_world(1);
    ASSERT_TRUE(open_device());
  }
};

// A volume without a peer must not pay for tracking: no mark, no write to the metadata.
TEST_F(TrackedDeviceTest, InactiveTrackingWritesNothing) {
  EXPECT_EQ(device->opened_as(), OpenOutcome::New);
  uint64_t metadata_requests = 0;
  metadata->on_submit = [&](const BlockRequest&) {
    ++metadata_requests;
    return 0;
  };
  EXPECT_EQ(write(0, kBlock, 1), 0);
  EXPECT_EQ(device->dirty_bytes(), 0U);
  EXPECT_EQ(metadata_requests, 0U);
  EXPECT_EQ(device->mutation_counter(), 1U);
  ASSERT_TRUE(close_device());
  ASSERT_TRUE(open_device());
  EXPECT_FALSE(device->tracking());
}

// The record of a region must be durable before its first write reaches the store, or a crash forgets the write.
TEST_F(TrackedDeviceTest, FirstWriteToARegionFollowsItsLogRecord) {
  ASSERT_TRUE(activate(Baseline::Clean));
  bool log_durable = false;
  metadata->on_submit = [&](const BlockRequest& request) {
    if (request.op == BlockOp::Write && request.range.offset >= track::kLogOffset) {
      EXPECT_TRUE(request.fua);
      log_durable = true;
    }
    return 0;
  };
  store->on_submit = [&](const BlockRequest& request) {
    if (request.op == BlockOp::Write) {
      EXPECT_TRUE(log_durable);
    }
    return 0;
  };
  EXPECT_EQ(write(5 * kRegion, kBlock, 1), 0);
  EXPECT_EQ(open_blocks(), (std::set<uint64_t>{5 * kRegion / kBlock}));
}

// Without a durable record the guest must get an error and the store must stay as it was.
TEST_F(TrackedDeviceTest, FailedLogWriteFailsTheRequestAndLaterOnesRecover) {
  ASSERT_TRUE(activate(Baseline::Clean));
  bool failing = true;
  metadata->on_submit = [&](const BlockRequest& request) {
    return failing && request.op == BlockOp::Write && request.range.offset < track::kBitmapOffset ? EIO : 0;
  };
  for (int i = 0; i < 20; ++i) EXPECT_EQ(write(static_cast<uint64_t>(i) * kRegion, kBlock, 1), EIO);
  EXPECT_EQ(store->content()[0], 0);
  failing = false;
  for (int i = 0; i < 60; ++i) EXPECT_EQ(write(static_cast<uint64_t>(i) * kRegion, kBlock, 2), 0) << i;
  EXPECT_EQ(open_blocks().size(), 60U);
}

// A failed write may have changed the store, so its blocks have to be sent as well.
TEST_F(TrackedDeviceTest, FailedWriteStaysDirty) {
  ASSERT_TRUE(activate(Baseline::Clean));
  store->on_submit = [](const BlockRequest& request) { return request.op == BlockOp::Write ? EIO : 0; };
  EXPECT_EQ(write(0, kBlock, 1), EIO);
  EXPECT_EQ(open_blocks(), (std::set<uint64_t>{0}));
}

// Discarding a whole disk touches more regions than the log has slots.
TEST_F(TrackedDeviceTest, RequestLargerThanTheLogIsCarriedOutInPieces) {
  ASSERT_TRUE(activate(Baseline::Clean));
  EXPECT_EQ(write(kSize - 10 * kBlock, 10 * kBlock, 7), 0);
  EXPECT_EQ(run(*TestRequest::make(BlockOp::WriteZeroes, 1, kSize - 1)), 0);
  EXPECT_EQ(device->dirty_bytes(), kSize);
  EXPECT_EQ(store->content(), Bytes(kSize));
  auto big = TestRequest::make(BlockOp::Write, kBlock + 1, 40 * kRegion);
  for (size_t i = 0; i < big->data.size(); ++i) big->data[i] = static_cast<uint8_t>(i * 7 >> 3);
  EXPECT_EQ(run(*big), 0);
  EXPECT_TRUE(std::equal(big->data.begin(), big->data.end(), store->content().begin() + kBlock + 1));
}

// One guest that keeps every slot busy must not hang the others, nor itself.
TEST_F(TrackedDeviceTest, ManyConcurrentWritesOverAllRegionsFinish) {
  ASSERT_TRUE(activate(Baseline::Clean));
  for (int round = 0; round < 20; ++round) {
    std::vector<std::unique_ptr<TestRequest>> requests;
    for (int i = 0; i < 100; ++i) {
      const uint64_t length = 1 + world->random().below(6 * kRegion);
      requests.push_back(TestRequest::make(BlockOp::Write, world->random().below(kSize - length), length, 3));
      device->submit(requests.back()->request);
    }
    ASSERT_TRUE(world->run_until([&] {
      return std::all_of(requests.begin(), requests.end(), [](const auto& r) { return r->error.has_value(); });
    }));
    for (const auto& request : requests) EXPECT_EQ(*request->error, 0);
  }
  EXPECT_EQ(device->mutations_in_flight(), 0U);
}

// The order at the store is the order of submission, or the peer and the store end with different bytes.
TEST_F(TrackedDeviceTest, OverlappingWritesReachTheStoreInOrder) {
  ASSERT_TRUE(activate(Baseline::Clean));
  for (int round = 0; round < 50; ++round) {
    auto first = TestRequest::make(BlockOp::Write, 100, 600, 1);
    auto second = TestRequest::make(BlockOp::Write, 300, 5000, 2);
    device->submit(first->request);
    device->submit(second->request);
    ASSERT_TRUE(world->run_until([&] { return first->error && second->error; }));
    EXPECT_EQ(store->content()[299], 1);
    EXPECT_EQ(store->content()[300], 2);
    EXPECT_EQ(store->content()[699], 2);
  }
}

// --- Gates

// A secondary that accepts a write diverges from its primary.
TEST_F(TrackedDeviceTest, ReadOnlyGateRefusesWritesAndServesReads) {
  device->set_gate(WriteGate::ReadOnly);
  EXPECT_EQ(write(0, kBlock, 1), EPERM);
  EXPECT_EQ(run(*TestRequest::make(BlockOp::WriteZeroes, 0, kBlock)), EPERM);
  EXPECT_EQ(run(*TestRequest::make(BlockOp::Read, 0, kBlock)), 0);
  EXPECT_EQ(run(*TestRequest::make(BlockOp::Flush, 0, 0)), 0);
  EXPECT_EQ(device->mutation_counter(), 0U);
}

// A fenced write that reaches the store is a second writer; one that is lost is a hole in the guest's disk.
TEST_F(TrackedDeviceTest, ParkedWritesAreHeldThenReleasedInOrder) {
  device->set_gate(WriteGate::Parked);
  auto first = TestRequest::make(BlockOp::Write, 0, kBlock, 1);
  auto second = TestRequest::make(BlockOp::Write, 0, 512, 2);
  device->submit(first->request);
  device->submit(second->request);
  EXPECT_EQ(run(*TestRequest::make(BlockOp::Read, 0, kBlock)), 0);
  EXPECT_EQ(run(*TestRequest::make(BlockOp::Flush, 0, 0)), 0);
  world->run_for(kSecond);
  EXPECT_FALSE(first->error);
  EXPECT_EQ(device->parked_requests(), 2U);
  EXPECT_EQ(store->content()[0], 0);
  device->set_gate(WriteGate::Open);
  device->release_parked();
  ASSERT_TRUE(world->run_until([&] { return first->error && second->error; }));
  EXPECT_EQ(store->content()[0], 2);
  EXPECT_EQ(store->content()[512], 1);
}

TEST_F(TrackedDeviceTest, ParkedWritesCanBeFailed) {
  device->set_gate(WriteGate::Parked);
  auto parked = TestRequest::make(BlockOp::Write, 0, kBlock, 1);
  device->submit(parked->request);
  device->set_gate(WriteGate::ReadOnly);
  device->fail_parked(EPERM);
  ASSERT_TRUE(world->run_until([&] { return parked->error.has_value(); }));
  EXPECT_EQ(*parked->error, EPERM);
  EXPECT_EQ(store->content()[0], 0);
}

// A fence that does not wait for what is already below it seals an epoch that lacks a write.
TEST_F(TrackedDeviceTest, QuiesceWaitsForEveryRequestBelowTheGate) {
  ASSERT_TRUE(activate(Baseline::Clean));
  std::vector<std::unique_ptr<TestRequest>> requests;
  for (uint64_t i = 0; i < 40; ++i) {
    requests.push_back(TestRequest::make(BlockOp::Write, i / 2 * kRegion, kBlock, 1));
    device->submit(requests.back()->request);
  }
  device->set_gate(WriteGate::Parked);
  EXPECT_EQ(device->mutations_in_flight(), 40U);
  bool quiet = false;
  device->quiesce([&] {
    quiet = true;
    for (const auto& request : requests) EXPECT_TRUE(request->error);
  });
  EXPECT_FALSE(quiet) << "never inline";
  ASSERT_TRUE(world->run_until([&] { return quiet; }));
  bool again = false;
  device->quiesce([&] { again = true; });
  EXPECT_FALSE(again);
  ASSERT_TRUE(world->run_until([&] { return again; }));
}

// Readers of a secondary see epoch N or N+1, never a mix.
TEST_F(TrackedDeviceTest, HeldReadsWaitUntilTheEpochIsApplied) {
  device->hold_reads(true);
  auto read = TestRequest::make(BlockOp::Read, 0, 2 * kBlock);
  device->submit(read->request);
  world->run_for(kSecond);
  EXPECT_FALSE(read->error);
  store->poke(0, Bytes(2 * kBlock, 9));
  device->hold_reads(false);
  ASSERT_TRUE(world->run_until([&] { return read->error.has_value(); }));
  EXPECT_EQ(read->data, Bytes(2 * kBlock, 9));
}

TEST_F(TrackedDeviceTest, ServeZeroesHidesAHalfCopiedImage) {
  store->poke(0, Bytes(kBlock, 9));
  device->serve_zeroes(true);
  auto read = TestRequest::make(BlockOp::Read, 0, kBlock, 1);
  EXPECT_EQ(run(*read), 0);
  EXPECT_EQ(read->data, Bytes(kBlock));
  device->serve_zeroes(false);
  auto after = TestRequest::make(BlockOp::Read, 0, kBlock, 1);
  EXPECT_EQ(run(*after), 0);
  EXPECT_EQ(after->data, Bytes(kBlock, 9));
}

// A block that is read back while it is written is neither the old nor the new one.
TEST_F(TrackedDeviceTest, ReadBackWaitsForWritesInFlight) {
  ASSERT_TRUE(activate(Baseline::Clean));
  for (uint8_t round = 1; round < 50; ++round) {
    auto first = TestRequest::make(BlockOp::Write, 0, 8 * kBlock, round);
    device->submit(first->request);
    auto back = TestRequest::make(BlockOp::Read, 0, 8 * kBlock);
    device->submit_readback(back->request);
    auto second = TestRequest::make(BlockOp::Write, 0, 8 * kBlock, static_cast<uint8_t>(round + 100));
    device->submit(second->request);
    ASSERT_TRUE(world->run_until([&] { return back->error && second->error; }));
    EXPECT_EQ(back->data, Bytes(8 * kBlock, round));
  }
}

// --- What a restart finds

TEST_F(TrackedDeviceTest, CleanStopKeepsExactlyTheDirtyBlocks) {
  ASSERT_TRUE(activate(Baseline::Clean));
  for (const uint64_t block : {3U, 77U, 400U}) ASSERT_EQ(write(block * kBlock, 1, 1), 0);
  device->consumer().seal();
  ASSERT_EQ(write(5 * kBlock, 1, 1), 0);
  device->consumer().clear_sealed({77 * kBlock, kBlock});
  ASSERT_TRUE(close_device());
  auto late = TestRequest::make(BlockOp::Write, 0, 1, 1);
  EXPECT_EQ(run(*late), ESHUTDOWN);
  metadata->power_cut();
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::Clean);
  EXPECT_EQ(open_blocks(), (std::set<uint64_t>{3, 5, 400})) << "sealed and not acknowledged counts as dirty";
}

TEST_F(TrackedDeviceTest, CrashKeepsDirtyBlocksAndWholeActiveRegions) {
  ASSERT_TRUE(activate(Baseline::Clean));
  ASSERT_EQ(write(9 * kBlock, kBlock, 1), 0);
  crash(true);
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::Recovered);
  EXPECT_EQ(open_blocks(), (std::set<uint64_t>{8, 9, 10, 11, 12, 13, 14, 15})) << "region 1 was active";
}

// A store that was changed or swapped while the volume was closed: nothing that was saved is about it.
TEST_F(TrackedDeviceTest, ForeignOrChangedStoreIsWhollyDirty) {
  ASSERT_TRUE(activate(Baseline::Clean));
  ASSERT_TRUE(close_device());
  stamp.modified_ns = 5;
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::WholeDirty);
  EXPECT_EQ(device->dirty_bytes(), kSize);
  device->consumer().seal();
  device->consumer().clear_all_sealed();
  crash(false);
  stamp.modified_ns = 6;  // after a crash the time says nothing
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::Recovered);
  crash(false);
  stamp.identity.bytes[3] = 1;
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::WholeDirty);
}

TEST_F(TrackedDeviceTest, DamagedSuperblockIsWhollyDirtyAndANewerOneIsRefused) {
  ASSERT_TRUE(activate(Baseline::Clean));
  ASSERT_TRUE(close_device());
  const Bytes good = metadata->content();
  metadata->poke(0, Bytes(2 * track::kSuperblockSlotSize, 0x5a));
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::WholeDirty);
  EXPECT_EQ(device->dirty_bytes(), kSize);
  crash(false);
  DurableRecord newer(*metadata, {.offset = 0, .slot_size = 4096, .kind = record_kind("TRKS"), .version = 99});
  ASSERT_TRUE(
      wait([&](TrackedDevice::Done done) { newer.load([&newer, done](auto) { newer.save(Bytes(10), done); }); }));
  const Bytes before = metadata->content();
  const Status refused = open_device();
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::Mismatch);
  EXPECT_EQ(metadata->content(), before) << "nothing may be written over a newer format";
}

// Marks of a full copy must not be forgotten by a crash in the middle of it.
TEST_F(TrackedDeviceTest, SavedMarksSurviveACrash) {
  ASSERT_TRUE(activate(Baseline::Clean));
  device->mark_dirty({0, 50 * kBlock});
  ASSERT_TRUE(wait([&](TrackedDevice::Done done) { device->save_dirty(std::move(done)); }));
  crash(true);
  ASSERT_TRUE(open_device());
  EXPECT_EQ(open_blocks().size(), 50U);
}

// Without lazy saving a crash late in a full copy would send all of it again.
TEST_F(TrackedDeviceTest, AcknowledgedBlocksLeaveTheSavedBitmapAfterAWhile) {
  ASSERT_TRUE(activate(Baseline::Dirty));
  EXPECT_EQ(device->dirty_bytes(), kSize);
  device->consumer().seal();
  device->consumer().clear_sealed({0, kSize / 2});
  world->run_for(kSecond);
  crash(true);
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->dirty_bytes(), kSize / 2);
}

// Flushing the store whenever a region leaves the log would cost a guest with random writes half of its requests. A
// page that only gained bits does not need it; one that lost some does, or a power cut takes back what the peer has.
TEST_F(TrackedDeviceTest, OnlyPagesThatLostBitsAreWrittenAfterAFlushOfTheStore) {
  ASSERT_TRUE(activate(Baseline::Clean));
  uint64_t flushes = 0;
  uint64_t pages = 0;
  store->on_submit = [&](const BlockRequest& request) {
    flushes += request.op == BlockOp::Flush ? 1 : 0;
    return 0;
  };
  metadata->on_submit = [&](const BlockRequest& request) {
    pages += request.op == BlockOp::Write && request.range.offset >= track::kBitmapOffset ? 1 : 0;
    return 0;
  };
  for (uint64_t region = 0; region < 40; ++region) ASSERT_EQ(write(region * kRegion, kBlock, 1), 0);
  EXPECT_GE(pages, 1U);
  EXPECT_LT(pages, 40U) << "all regions of a page are saved with it";
  EXPECT_EQ(flushes, 0U);
  device->consumer().seal();
  device->consumer().clear_all_sealed();
  ASSERT_TRUE(wait([&](TrackedDevice::Done done) { device->save_dirty(std::move(done)); }));
  EXPECT_EQ(flushes, 1U);
  ASSERT_EQ(write(0, kBlock, 1), 0);
  ASSERT_TRUE(wait([&](TrackedDevice::Done done) { device->save_dirty(std::move(done)); }));
  EXPECT_EQ(flushes, 1U) << "what was cleared is on the disk already";
}

// A failed write leaves either content on the disk: taken for the newer one, the next page would skip the flush.
TEST_F(TrackedDeviceTest, AfterAFailedSaveTheStoreIsFlushedAgain) {
  ASSERT_TRUE(activate(Baseline::Dirty));
  ASSERT_TRUE(wait([&](TrackedDevice::Done done) { device->save_dirty(std::move(done)); }));
  device->consumer().seal();
  device->consumer().clear_all_sealed();
  bool failing = true;
  metadata->on_submit = [&](const BlockRequest& request) {
    return failing && request.op == BlockOp::Write && request.range.offset >= track::kBitmapOffset ? EIO : 0;
  };
  EXPECT_FALSE(wait([&](TrackedDevice::Done done) { device->save_dirty(std::move(done)); }));
  failing = false;
  uint64_t flushes = 0;
  store->on_submit = [&](const BlockRequest& request) {
    flushes += request.op == BlockOp::Flush ? 1 : 0;
    return 0;
  };
  ASSERT_TRUE(wait([&](TrackedDevice::Done done) { device->save_dirty(std::move(done)); }));
  EXPECT_EQ(flushes, 1U);
}

// With a window of gigabytes a crash would send all of it again, long after the last write to most of it.
TEST_F(TrackedDeviceTest, IdleRegionsLeaveTheLogAndTheirBlocksStayDirty) {
  slots = 64;
  ASSERT_TRUE(close_device());
  ASSERT_TRUE(open_device());
  ASSERT_TRUE(activate(Baseline::Clean));
  for (uint64_t region = 0; region < 50; ++region) ASSERT_EQ(write(region * kRegion, kBlock, 1), 0);
  world->run_for(kSecond);
  uint64_t metadata_requests = 0;
  bool log_durable = false;
  metadata->on_submit = [&](const BlockRequest& request) {
    ++metadata_requests;
    log_durable = log_durable || (request.op == BlockOp::Write && request.range.offset < track::kBitmapOffset);
    return 0;
  };
  world->run_for(10 * kSecond);
  EXPECT_EQ(metadata_requests, 0U) << "an idle volume is left alone";
  store->on_submit = [&](const BlockRequest& request) {
    EXPECT_TRUE(log_durable || request.op != BlockOp::Write) << "a region that left is cold again";
    return 0;
  };
  ASSERT_EQ(write(60 * kRegion, kBlock, 1), 0);
  crash(true);
  store->on_submit = nullptr;
  metadata->on_submit = nullptr;
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::Recovered);
  EXPECT_EQ(device->dirty_bytes(), 50 * kBlock + kRegion) << "the blocks themselves, and one active region";
}

TEST_F(TrackedDeviceTest, DeactivationForgetsDurablyAndReactivationBeginsAnew) {
  ASSERT_TRUE(activate(Baseline::Dirty));
  ASSERT_TRUE(wait([&](TrackedDevice::Done done) { device->deactivate_tracking(std::move(done)); }));
  EXPECT_EQ(device->dirty_bytes(), 0U);
  crash(true);
  ASSERT_TRUE(open_device());
  EXPECT_FALSE(device->tracking());
  ASSERT_TRUE(activate(Baseline::Clean));
  EXPECT_EQ(device->dirty_bytes(), 0U);
  crash(true);
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->dirty_bytes(), 0U) << "pages of the earlier generation must not come back";
}

// A grown disk must be tracked to its new end, also when the crash comes before the store has grown.
TEST_F(TrackedDeviceTest, GrowthIsDurableBeforeTheStoreGrows) {
  ASSERT_TRUE(activate(Baseline::Dirty));
  ASSERT_EQ(write(0, kBlock, 1), 0);
  const uint64_t larger = kSize + 100_MiB;
  metadata->grow(TrackedDevice::metadata_size(larger));
  ASSERT_TRUE(wait([&](TrackedDevice::Done done) { device->resize(larger, std::move(done)); }));
  crash(true);
  ASSERT_TRUE(open_device());
  EXPECT_EQ(device->opened_as(), OpenOutcome::Recovered);
  EXPECT_EQ(device->dirty_bytes(), kSize) << "the new part is clean";
  store->grow(larger);
  ASSERT_EQ(write(larger - 1, 1, 1), 0);
  EXPECT_EQ(device->dirty_bytes(), kSize + kBlock);
  crash(true);
  ASSERT_TRUE(open_device());
  EXPECT_GE(device->dirty_bytes(), kSize + kBlock);
  EXPECT_FALSE(wait([&](TrackedDevice::Done done) { device->resize(kSize, std::move(done)); })) << "never shrinks";
}

// Activation while the guest writes: a write in flight must be in the baseline or be marked.
TEST_F(TrackedDeviceTest, ActivationWaitsForWritesInFlightAndHoldsNewOnes) {
  auto before = TestRequest::make(BlockOp::Write, 0, kBlock, 1);
  device->submit(before->request);
  auto after = TestRequest::make(BlockOp::Write, 10 * kBlock, kBlock, 1);
  bool active = false;
  device->activate_tracking(Baseline::Clean, [&](Status status) {
    EXPECT_TRUE(status);
    EXPECT_TRUE(before->error);
    EXPECT_FALSE(after->error);
    active = true;
  });
  device->submit(after->request);
  ASSERT_TRUE(world->run_until([&] { return active && after->error; }));
  EXPECT_EQ(open_blocks(), (std::set<uint64_t>{10}));
}

}  // namespace
}  // namespace vmferry
