// SPDX-License-Identifier: Apache-2.0
//
// Sender and Receiver against each other over a link that can be cut, with disks that lose what was not flushed.
#include <gtest/gtest.h>

#include "tests/unit/replicate/test_world.h"

namespace vmferry::testing {
namespace {

TEST(Replication, FullCopyThenEpochsMakeTheFilesEqual) {
  // The plain case; everything else is a variation of it.
  auto options = small_world();
  options.host.volume_sizes = {3U << 20, 4096 * 10 + 512};
  TestWorld world(options);
  world.start_source(world.a);
  world.write(0, 0, pattern(1'500'000, 1));
  world.write(1, 4096 * 10, pattern(512, 2));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  EXPECT_EQ(world.b.receiver->status().quality, CopyQuality::None);
  ASSERT_TRUE(world.connect());
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::Initial);
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_EQ(world.b.receiver->status().quality, CopyQuality::Consistent);
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::InSync);
  EXPECT_EQ(world.a.sender->status().remaining_bytes, 0U);
  EXPECT_EQ(world.a.sender->status().rpo_s, 0.0);

  for (int i = 0; i < 50; ++i) world.random_write();
  EXPECT_GT(world.a.sender->status().remaining_bytes + world.writes_in_flight, 0U);
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_FALSE(world.protocol_error) << world.protocol_error->text;
}

TEST(Replication, HolesCostAlmostNothingAndStayHoles) {
  // A thin disk must not arrive thick, nor its empty part be read or sent.
  auto options = small_world();
  options.host.volume_sizes = {16U << 20};
  TestWorld world(options);
  world.start_source(world.a);
  world.write(0, 8U << 20, pattern(4096, 1));
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_LT(world.link.a.sent_bytes, 10'000U);
  EXPECT_LT(world.a.stores[0]->read_bytes, 2U << 20);
}

TEST(Replication, EpochsFlowByThemselvesAtTheInterval) {
  // Without a timer the copy would be as old as the last command.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  const uint64_t before = world.b.receiver->status().epoch;
  world.write(0, 0, pattern(4096, 3));
  world.executor.run_for(4 * kSecond);
  EXPECT_GT(world.b.receiver->status().epoch, before);
  EXPECT_TRUE(world.equal());
  const uint64_t after = world.b.receiver->status().epoch;
  world.executor.run_for(60 * kSecond);
  EXPECT_EQ(world.b.receiver->status().epoch, after) << "an idle guest needs no epochs";
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::InSync);
}

TEST(Replication, CutLinkResendsOnlyWhatWasNotAcknowledged) {
  // A full copy that starts from zero at every cut never ends on a bad link.
  auto options = small_world();
  options.host.volume_sizes = {16U << 20};
  options.receiver.segment_bytes = 1U << 20;
  TestWorld world(options);
  world.link.bytes_per_second = 2'000'000;
  world.start_source(world.a);
  world.write(0, 0, pattern(16U << 20, 9));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  for (int i = 0; i < 7; ++i) {
    world.executor.run_for(kSecond);
    world.cut();
    EXPECT_NE(world.a.sender->status().state, ReplicationState::InSync);
    world.executor.run_for(kSecond);
    ASSERT_TRUE(world.connect());
  }
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  // 16 MiB of noise, and per cut at most what was under way.
  EXPECT_LT(world.a.sender->status().wire_bytes, (16U << 20) + 8 * (3U << 20));
}

TEST(Replication, RestartOfTheSourceGoesOnWithoutAFullCopy) {
  // A restarted daemon must know from its own records what the copy has.
  auto options = small_world();
  options.host.volume_sizes = {8U << 20};
  TestWorld world(options);
  world.start_source(world.a);
  world.write(0, 0, pattern(8U << 20, 9));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  world.cut();
  size_t closed = 0;
  world.a.sender.reset();
  world.a.devices[0]->close([&](Status) { ++closed; });
  ASSERT_TRUE(world.executor.run_until([&] { return closed == 1; }));
  world.a.crash();
  world.a.boot();
  world.start_source(world.a);
  world.write(0, 4096, pattern(4096, 10));
  const uint64_t before = world.link.a.sent_bytes;
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_LT(world.link.a.sent_bytes - before, 100'000U);
}

TEST(Replication, ForeignDataIsNotOverwrittenWithoutConsent) {
  // The wrong volume name must not cost a disk.
  TestWorld world(small_world());
  world.start_source(world.a);
  world.b.stores[0]->data[700'000] = 1;
  world.start_copy(world.b);
  EXPECT_TRUE(world.b.receiver->status().foreign_data);
  const Status refused = world.connect();
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::Denied);
  EXPECT_NE(refused.error().text.find("--overwrite-peer"), std::string::npos);
  world.executor.run_for(10 * kSecond);
  EXPECT_EQ(world.b.stores[0]->data[700'000], 1);
  EXPECT_EQ(world.b.stores[0]->writes, 0U);

  world.a.sender->set_overwrite_peer(true);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
}

TEST(Replication, FileOfZeroesIsNoForeignData) {
  // `truncate` and `dd if=/dev/zero` both make fresh volumes.
  TestWorld world(small_world());
  world.start_source(world.a);
  world.start_copy(world.b);
  EXPECT_FALSE(world.b.receiver->status().foreign_data);
}

TEST(Replication, DifferentSizesAreRefusedOnBothSides) {
  // A shorter copy would be silently cut off.
  TestWorld world(small_world());
  start(world);
  GroupHello hello;
  world.a.sender->fill_hello(hello);
  hello.volumes[0].size += 4096;
  EXPECT_FALSE(world.b.receiver->on_peer_hello(hello));
  EXPECT_FALSE(world.a.sender->on_peer_hello(hello));
  hello.volumes[0].size -= 4096;
  hello.volumes[0].name = "other";
  EXPECT_FALSE(world.b.receiver->on_peer_hello(hello));
  hello.volumes.clear();
  EXPECT_FALSE(world.b.receiver->on_peer_hello(hello));
}

TEST(Replication, EpochReadBackFromAWritingGuestIsNotCalledConsistent) {
  // A mix of moments is no crash-consistent image (I7); promote has to know.
  auto options = small_world();
  options.host.volume_sizes = {16U << 20};
  TestWorld world(options);
  world.link.bytes_per_second = 3'000'000;
  world.start_source(world.a);
  world.write(0, 0, pattern(16U << 20, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.executor.run_until([&] { return world.link.a.sent_bytes > 300'000; }));
  world.write(0, 15U << 20, pattern(4096, 2));
  ASSERT_TRUE(world.executor.run_until([&] { return !world.applied.empty(); }));
  EXPECT_EQ(world.applied.begin()->second.first, CopyQuality::Fuzzy);
  ASSERT_TRUE(world.sync());
  EXPECT_EQ(world.b.receiver->status().quality, CopyQuality::Consistent);
  EXPECT_TRUE(world.equal());
}

TEST(Replication, RepeatedBlocksTravelAsReferencesAndAreProved) {
  // Blocks that the copy has elsewhere must not travel again.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  TestWorld world(options);
  start(world);
  world.write(0, 0, pattern(1U << 20, 1));
  ASSERT_TRUE(world.sync());
  const uint64_t before = world.link.a.sent_bytes;
  world.write(0, 2U << 20, pattern(1U << 20, 1));
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_EQ(world.a.sender->status().reference_bytes, 1U << 20);
  EXPECT_LT(world.link.a.sent_bytes - before, 2'000U);
}

TEST(Replication, ReferenceThatDoesNotMatchIsHealedWithData) {
  // The copy's disk may rot, and fingerprints may collide: a reference is only used when its SHA-256 matches (I8).
  for (const bool direct : {false, true}) {
    auto options = small_world();
    options.host.volume_sizes = {4U << 20};
    TestWorld world(options);
    world.start_source(world.a);
    world.write(0, 0, pattern(1U << 20, 1));
    if (direct) world.write(0, 2U << 20, pattern(1U << 20, 1));
    ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
    world.start_copy(world.b);
    ASSERT_TRUE(world.connect());
    if (direct) {
      // Rots between the frame with the data and the one that refers to it.
      ASSERT_TRUE(world.executor.run_until([&] { return world.b.stores[0]->data[100'000] != 0; }));
    } else {
      ASSERT_TRUE(world.sync());
      world.write(0, 2U << 20, pattern(1U << 20, 1));
    }
    world.b.stores[0]->data[100'000] ^= 1;
    ASSERT_TRUE(world.sync());
    EXPECT_GE(world.b.receiver->status().reference_mismatches, 1U) << direct;
    EXPECT_GE(world.a.sender->status().resent_references, 1U);
    world.b.stores[0]->data[100'000] ^= 1;
    EXPECT_TRUE(world.equal()) << direct;
    EXPECT_FALSE(world.protocol_error);
  }
}

TEST(Replication, BytesInFlightStayWithinTheCreditThatWasGranted) {
  // Without a bound, a slow copy would fill its memory with frames (I9).
  auto options = small_world();
  options.host.volume_sizes = {24U << 20};
  options.receiver.credit_window_min = options.receiver.credit_window_max = 3U << 20;
  TestWorld world(options);
  world.link.bytes_per_second = 1'000'000'000;
  uint64_t granted = 0;
  uint64_t sent = 0;
  uint64_t over = 0;
  uint64_t most = 0;
  world.link.b.tamper = [&](MessageType type, Bytes& payload) {
    if (type == MessageType::Credit) granted = decode_credit(payload)->granted;
  };
  world.link.a.tamper = [&](MessageType type, Bytes& payload) {
    if (type != MessageType::EpochData) return;
    sent += decode_epoch_data(payload)->body_size;
    over += sent > granted ? 1U : 0U;
    most = std::max(most, sent - (granted - (3U << 20)));
  };
  world.start_source(world.a);
  world.write(0, 0, pattern(24U << 20, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_EQ(over, 0U);
  EXPECT_GT(most, 1U << 20) << "the window was used";
  EXPECT_FALSE(world.protocol_error);
}

TEST(Replication, FramesBeyondTheCreditBreakTheConnection) {
  // A peer that ignores credit must not choose how much memory we take.
  auto options = small_world();
  TestWorld world(options);
  start(world);
  world.b.receiver->on_disconnected();
  GroupHello hello;
  world.a.sender->fill_hello(hello);
  ASSERT_TRUE(world.b.receiver->on_peer_hello(hello));
  const Bytes coded(100, 1);
  const EpochData data{
      .epoch = 1, .frame = 1, .stream = 2, .body_size = kFrameBodyMax, .body_hash = {}, .coded = coded};
  Status status{};
  uint64_t accepted = 0;
  for (; status && accepted < 1000; ++accepted)
    status = world.b.receiver->on_message(MessageType::EpochData, encode(data));
  EXPECT_FALSE(status);
  EXPECT_LE((accepted - 1) * kFrameBodyMax, options.receiver.credit_window_min);
}

TEST(Replication, FrameWhoseHashIsWrongIsNeverWritten) {
  // Bytes are proved, not trusted (I8).
  TestWorld world(small_world());
  world.start_source(world.a);
  world.write(0, 0, pattern(4096, 1));
  world.start_copy(world.b);
  world.link.a.tamper = [](MessageType type, Bytes& payload) {
    if (type == MessageType::EpochData) payload.back() ^= 1;
  };
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.executor.run_until([&] { return world.protocol_error.has_value(); }));
  EXPECT_EQ(world.b.stores[0]->writes, 0U);
  EXPECT_EQ(world.protocol_error->kind, ErrorKind::Corrupt);
}

TEST(Replication, StoreErrorAtTheCopyIsReportedAndRetried) {
  // A full or broken disk at the peer is a state with a reason, not a silent standstill.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.b.stores[0]->write_error = EIO;
  world.a.sender->sync_now();
  ASSERT_TRUE(world.executor.run_until([&] { return !world.b.receiver->status().reason.empty(); }));
  world.executor.run_for(kSecond);
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::Degraded);
  EXPECT_NE(world.a.sender->status().reason.find("EIO"), std::string::npos) << world.a.sender->status().reason;
  EXPECT_FALSE(world.equal());
  world.b.stores[0]->write_error = 0;
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::InSync);
}

TEST(Replication, FullStagingAreaIsReportedAndRetried) {
  // ENOSPC in the staging area must neither touch the copy nor stop replication for ever.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  const Bytes before = world.copy_image();
  world.write(0, 0, pattern(300'000, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.b.staging->write_error = ENOSPC;
  world.a.sender->sync_now();
  world.executor.run_for(20 * kSecond);
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::Degraded);
  EXPECT_EQ(world.copy_image(), before);
  world.b.staging->write_error = 0;
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
}

TEST(Replication, EpochLargerThanTheStagingAreaIsRefusedWithTheNumbers) {
  // Better a sentence with both sizes than an epoch that fails at its end again and again.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  options.host.staging_size = 1U << 20;
  TestWorld world(options);
  start(world);
  ASSERT_TRUE(world.sync());
  world.write(0, 0, pattern(3U << 20, 1));
  world.executor.run_for(5 * kSecond);
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::Degraded);
  EXPECT_NE(world.a.sender->status().reason.find("does not fit the staging area"), std::string::npos);
}

TEST(Replication, SenderAndReceiverMayGoAtAnyMomentAndComeBack) {
  // `replicate stop`, a change of roles and a shutdown come when they want; requests in flight must find nobody.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  TestWorld world(options);
  start(world);
  for (Nanoseconds wait = 0; wait < 40 * kMillisecond; wait += kMillisecond) {
    for (int i = 0; i < 10; ++i) world.random_write();
    world.a.sender->sync_now();
    world.executor.run_for(wait);
    const bool copy_goes = wait / kMillisecond % 2 == 0;
    if (copy_goes) {
      bool closed = false;
      world.b.receiver->close([&](Status status) { closed = status.has_value(); });
      ASSERT_TRUE(world.executor.run_until([&] { return closed; }));
      world.b.receiver.reset();
    } else {
      world.a.sender.reset();
    }
    world.cut();
    if (copy_goes) {
      world.start_copy(world.b);
    } else {
      world.start_source(world.a);
    }
    ASSERT_TRUE(world.connect());
  }
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
  EXPECT_FALSE(world.protocol_error);
}

TEST(Replication, GuestReadsAtTheCopySeeOneEpochOrTheNextNeverAMix) {
  // A reader of the secondary that sees half an epoch sees a file system that never was (I6).
  auto options = small_world();
  options.host.volume_sizes = {2U << 20};
  TestWorld world(options);
  start(world);
  ASSERT_TRUE(world.sync());
  for (uint8_t round = 1; round < 20; ++round) {
    for (uint64_t block = 0; block < 100; ++block) world.write(0, block * 20'480, Bytes(4096, round));
    ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
    bool synced = false;
    world.a.sender->wait_in_sync([&](Status) { synced = true; });
    while (!synced) {
      world.executor.run_for(200 * kMicrosecond);
      // Two reads in one moment: held together, or served together.
      Bytes first(4096);
      Bytes last(4096);
      size_t pending = 2;
      read_block(*world.b.devices[0], 0, first.data(), first.size(), [&](Errno) { --pending; });
      read_block(*world.b.devices[0], 99 * 20'480, last.data(), last.size(), [&](Errno) { --pending; });
      ASSERT_TRUE(world.executor.run_until([&] { return pending == 0; }));
      ASSERT_EQ(first[0], last[0]) << int{round};
    }
  }
}

TEST(Replication, PausedSenderSendsNothingAndGoesOn) {
  // `replicate pause` promises the operator the link.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  world.a.sender->pause();
  world.write(0, 0, pattern(4096, 1));
  const uint64_t before = world.link.a.sent_messages;
  world.executor.run_for(30 * kSecond);
  EXPECT_EQ(world.link.a.sent_messages, before);
  EXPECT_EQ(world.a.sender->status().state, ReplicationState::Paused);
  EXPECT_GT(world.a.sender->status().rpo_s, 20.0);
  world.a.sender->resume();
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
}

TEST(Replication, VerifyFindsExactlyTheDamagedPiece) {
  // A verification that cannot fail verifies nothing.
  auto options = small_world();
  options.host.volume_sizes = {5U << 20, 1U << 20};
  TestWorld world(options);
  start(world);
  world.write(0, 0, pattern(2U << 20, 1));
  ASSERT_TRUE(world.sync());
  const auto verify = [&] {
    std::optional<Result<std::vector<VerifyDifference>>> result;
    world.a.sender->verify([&](auto found) { result = std::move(found); });
    EXPECT_TRUE(world.executor.run_until([&] { return result.has_value(); }));
    return *result;
  };
  auto clean = verify();
  ASSERT_TRUE(clean);
  EXPECT_TRUE(clean->empty());
  world.b.stores[0]->data[(3U << 20) + 5] ^= 1;
  world.b.stores[1]->data.back() ^= 1;
  auto found = verify();
  ASSERT_TRUE(found);
  ASSERT_EQ(found->size(), 2U);
  EXPECT_EQ((*found)[0].range, (ByteRange{3U << 20, 1U << 20}));
  EXPECT_EQ((*found)[1].volume, 1);
  // Writes meanwhile are no differences.
  world.b.stores[0]->data[(3U << 20) + 5] ^= 1;
  world.b.stores[1]->data.back() ^= 1;
  std::optional<Result<std::vector<VerifyDifference>>> busy;
  world.a.sender->verify([&](auto result) { busy = std::move(result); });
  for (int i = 0; i < 20; ++i) {
    world.write(0, 4096, pattern(4096, static_cast<uint64_t>(i)));
    world.executor.run_for(2 * kMillisecond);
  }
  ASSERT_TRUE(world.executor.run_until([&] { return busy.has_value(); }));
  ASSERT_TRUE(*busy);
  EXPECT_TRUE((*busy)->empty());
}

}  // namespace
}  // namespace vmferry::testing
