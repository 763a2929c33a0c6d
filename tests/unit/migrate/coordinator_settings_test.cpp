// SPDX-License-Identifier: Apache-2.0
//
// What a migration leaves behind in the two QEMUs: their capabilities as they were, and one announcement.
#include <gmock/gmock.h>

#include "tests/unit/migrate/fake_world.h"

namespace vmferry::fake {
namespace {

// Switches that have moved with a guest find it only when it says where it is; one that does not run yet says nothing.
TEST(Coordinator, GuestIsAnnouncedOnceAndOnlyAfterItRuns) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  world.cut();  // the source asks again, and is told again
  world.restore();
  world.run_for(5 * kSecond);
  EXPECT_EQ(world.peer().qemu()->announced, 1);
  EXPECT_FALSE(world.peer().qemu()->announced_early);
  EXPECT_EQ(world.source().qemu()->announced, 0);
}

// `pause-before-switchover` left on makes the operator's own next migration wait for ever.
TEST(Coordinator, CapabilitiesAreRestoredAtBothSidesAfterDone) {
  for (const bool running : {true, false}) {
    WorldOptions options;
    options.guest_running = running;
    World world(options);
    world.migrate();
    ASSERT_TRUE(world.run_until([&] { return world.source().qemu()->capabilities != kCapabilities; }));
    ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
    world.run_for(kSecond);
    ASSERT_EQ(world.result->outcome, MigrateOutcome::Done);
    EXPECT_EQ(world.source().qemu()->capabilities, kCapabilities) << running;
    EXPECT_EQ(world.peer().qemu()->capabilities, kCapabilities) << running;
    EXPECT_EQ(world.peer().qemu()->announced, running ? 1 : 0);
  }
}

TEST(Coordinator, CapabilitiesAreRestoredAfterARollbackAlsoByARestartedDaemon) {
  for (const bool restarted : {false, true}) {
    World world;
    world.migrate();
    ASSERT_TRUE(world.run_until([&] { return world.source().qemu()->capabilities != kCapabilities; }));
    world.run_for(50 * kMillisecond);
    if (restarted) {
      world.kill_daemon(world.source());
      world.run_for(100 * kMillisecond);
      world.start_daemon(world.source());
      world.connect();
    } else {
      ASSERT_TRUE(world.source().daemon->coordinator->cancel());
    }
    ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::Own; }));
    world.run_for(kSecond);
    EXPECT_TRUE(world.source_runs());
    EXPECT_EQ(world.source().qemu()->capabilities, kCapabilities) << restarted;
  }
}

TEST(Coordinator, CapabilitiesAreRestoredByDaemonsThatRestartedInTheHandover) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.peer()) == HandoverState::Started; }));
  world.kill_daemon(world.peer());
  world.kill_daemon(world.source());
  world.start_daemon(world.peer());
  world.start_daemon(world.source());
  world.connect();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::Secondary; }))
      << world.describe();
  world.run_for(kSecond);
  EXPECT_EQ(world.source().qemu()->capabilities, kCapabilities);
  EXPECT_EQ(world.peer().qemu()->capabilities, kCapabilities);
}

}  // namespace
}  // namespace vmferry::fake
