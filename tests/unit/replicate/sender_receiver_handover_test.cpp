// SPDX-License-Identifier: Apache-2.0
//
// Sender and Receiver at a change of roles: the final epoch, and what the former source is worth afterwards.
#include <gtest/gtest.h>

#include "tests/unit/replicate/test_world.h"

namespace vmferry::testing {
namespace {

TEST(ReplicationHandover, FinalEpochCarriesEverythingIsConsistentAndNamesItsAttempt) {
  // The destination may run only with the source's last write.
  auto options = small_world();
  options.host.volume_sizes = {2U << 20, 1U << 20};
  TestWorld world(options);
  start(world);
  ASSERT_TRUE(world.sync());
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 100; ++i) world.random_write();
    world.executor.run_for(static_cast<Nanoseconds>(round * 300) * kMillisecond);
    ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
    for (auto& device : world.a.devices) device->set_gate(WriteGate::Parked);
    const Id128 attempt = world.executor.new_id();
    std::optional<uint64_t> epoch;
    world.a.sender->send_final_epoch(attempt, TrafficClass::Urgent,
                                     [&](Result<uint64_t> done) { epoch = done.value(); });
    ASSERT_TRUE(world.executor.run_until([&] { return epoch.has_value(); }));
    EXPECT_TRUE(world.equal());
    ASSERT_FALSE(world.finals.empty());
    EXPECT_EQ(world.finals.back(), std::make_pair(attempt, *epoch));
    EXPECT_EQ(world.b.receiver->final_attempt(), attempt);
    EXPECT_EQ(world.b.receiver->status().quality, CopyQuality::Consistent);
    EXPECT_EQ(world.b.receiver->status().epoch, *epoch);
    // Rolled back: ordinary epochs go on.
    for (auto& device : world.a.devices) device->set_gate(WriteGate::Open);
    world.a.sender->cancel_final_epoch();
    world.write(0, 0, pattern(4096, 77));
    ASSERT_TRUE(world.sync());
    EXPECT_TRUE(world.equal());
    EXPECT_TRUE(world.b.receiver->final_attempt().is_none());
  }
}

TEST(ReplicationHandover, FinalEpochIsSentAgainAfterACut) {
  // The link may go at the worst moment.
  TestWorld world(small_world(4));
  start(world);
  ASSERT_TRUE(world.sync());
  for (Nanoseconds wait = 0; wait < 20 * kMillisecond; wait += kMillisecond) {
    world.write(0, 0, pattern(200'000, static_cast<uint64_t>(wait)));
    ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
    bool done = false;
    world.a.sender->send_final_epoch(world.executor.new_id(), TrafficClass::Urgent, [&](auto) { done = true; });
    world.executor.run_for(wait);
    world.cut();
    world.executor.run_for(kSecond);
    ASSERT_TRUE(world.connect());
    ASSERT_TRUE(world.executor.run_until([&] { return done; })) << wait;
    ASSERT_TRUE(world.equal());
    world.a.sender->cancel_final_epoch();
  }
}

TEST(ReplicationHandover, FinalEpochBeforeTheFirstCopyIsRefusedAtOnceOrAtTheHello) {
  // The guest would stand still for the length of a full copy.
  auto options = small_world();
  options.host.volume_sizes = {8U << 20};
  TestWorld world(options);
  world.start_source(world.a);
  world.write(0, 0, pattern(8U << 20, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  for (const bool connected : {false, true}) {
    std::optional<Result<uint64_t>> result;
    world.a.sender->send_final_epoch(world.executor.new_id(), TrafficClass::Urgent, [&](auto r) { result = r; });
    if (!connected) {
      world.executor.run_for(kSecond);
      EXPECT_FALSE(result);
      ASSERT_TRUE(world.connect());
    }
    ASSERT_TRUE(world.executor.run_until([&] { return result.has_value(); }));
    ASSERT_FALSE(*result);
    EXPECT_EQ(result->error().kind, ErrorKind::Busy);
  }
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
}

TEST(ReplicationHandover, FinalEpochOfAVolumeThatIsStillWrittenIsNoSuccess) {
  // Whoever forgot the fence must not learn it from a lost write at the destination.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  world.write(0, 0, pattern(400'000, 1));
  std::optional<Result<uint64_t>> result;
  world.a.sender->send_final_epoch(world.executor.new_id(), TrafficClass::Urgent, [&](auto r) { result = r; });
  ASSERT_TRUE(world.executor.run_until([&] { return result.has_value(); }));
  ASSERT_FALSE(*result);
  EXPECT_EQ(result->error().kind, ErrorKind::Internal);
}

TEST(ReplicationHandover, AfterAHandoverTheOldSourceFollowsWithoutAFullCopy) {
  // A to B to A: each migration would otherwise cost the whole disk.
  auto options = small_world();
  options.host.volume_sizes = {4U << 20};
  TestWorld world(options);
  world.start_source(world.a);
  world.write(0, 0, pattern(4U << 20, 5));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.b);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  for (int round = 0; round < 4; ++round) {
    TestHost& from = *world.source;
    TestHost& to = *world.copy;
    world.random_write();
    ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
    from.devices[0]->set_gate(WriteGate::Parked);
    std::optional<uint64_t> epoch;
    from.sender->send_final_epoch(world.executor.new_id(), TrafficClass::Urgent, [&](auto done) { epoch = *done; });
    ASSERT_TRUE(world.executor.run_until([&] { return epoch.has_value(); }));
    world.cut();
    EXPECT_TRUE(to.devices[0]->tracking());
    EXPECT_EQ(to.devices[0]->dirty_bytes(), 0U);
    from.sender.reset();
    to.receiver.reset();
    from.receiver = std::make_unique<Receiver>(world.executor, world.link.a, *from.state, *from.staging, from.volumes(),
                                               ReceiverOptions{}, ReceiverEvents{});
    bool adopted = false;
    from.receiver->adopt_as_copy(*epoch, [&](Status status) { adopted = status.has_value(); });
    ASSERT_TRUE(world.executor.run_until([&] { return adopted; }));
    world.start_source(to);
    world.write(0, 8192, pattern(4096, static_cast<uint64_t>(round)));
    ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
    world.start_copy(from);
    const uint64_t before = world.link.a.sent_bytes + world.link.b.sent_bytes;
    ASSERT_TRUE(world.connect());
    ASSERT_TRUE(world.sync());
    EXPECT_TRUE(world.equal());
    EXPECT_LT(world.link.a.sent_bytes + world.link.b.sent_bytes - before, 100'000U) << round;
  }
}

TEST(ReplicationHandover, FormerSourceWithItsOwnWritesIsNotOverwrittenWithoutConsent) {
  // A crashed primary that comes back holds acknowledged writes that nobody else has.
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  world.cut();
  world.write(0, 0, pattern(4096, 1));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.start_copy(world.a);
  world.b.receiver.reset();
  world.start_source(world.b);
  const Status refused = world.connect();
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::Denied);
  world.b.sender->set_overwrite_peer(true);
  ASSERT_TRUE(world.connect());
  ASSERT_TRUE(world.sync());
  EXPECT_TRUE(world.equal());
}

}  // namespace
}  // namespace vmferry::testing
