// SPDX-License-Identifier: Apache-2.0
//
// Two coordinators against fakes: the undisturbed handover, its limits, and the operator.
#include <gmock/gmock.h>

#include "tests/unit/migrate/fake_world.h"

namespace vmferry::fake {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

size_t count(const std::vector<MessageType>& sent, MessageType type) {
  return static_cast<size_t>(std::count(sent.begin(), sent.end(), type));
}

// The main job: if this fails, nothing else matters.
TEST(Coordinator, GuestMovesAndTheSourceFollows) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  world.run_for(kSecond);
  EXPECT_THAT(world.violations, IsEmpty());
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Done);
  EXPECT_EQ(world.result->owner, "peer");
  EXPECT_EQ(world.result->guest, GuestPlace::RunningPeer);
  EXPECT_EQ(world.result->error, "");
  EXPECT_TRUE(world.peer_runs());
  EXPECT_FALSE(world.source_runs());
  EXPECT_EQ(world.state(world.source()), HandoverState::Secondary);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Running);
  EXPECT_EQ(world.source().record.term, world.peer().record.term);
  EXPECT_THAT(world.source().daemon->roles, ElementsAre(Role::Secondary));
  EXPECT_THAT(world.peer().daemon->roles, ElementsAre(Role::Primary));
  EXPECT_EQ(world.source().daemon->replication.followed_epoch, 17U);
  EXPECT_THAT(world.source().daemon->phases,
              ElementsAre(MigratePhase::Preflight, MigratePhase::Bulk, MigratePhase::Converge, MigratePhase::Precopy,
                          MigratePhase::Switchover, MigratePhase::Handover, MigratePhase::Running, MigratePhase::Done));
  EXPECT_TRUE(world.source().qemu()->alive) << "the source QEMU stays in postmigrate";
}

// Whoever watches at the destination, or after a restart, must not read that nothing is under way.
TEST(Coordinator, PhaseIsToldAtBothSidesAndAfterARestart) {
  World world;
  const auto phase = [](Host& host) { return host.daemon->coordinator->phase(); };
  EXPECT_EQ(phase(world.source()), MigratePhase::Idle);
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return phase(world.peer()) == MigratePhase::Precopy; }));
  EXPECT_EQ(phase(world.source()), MigratePhase::Precopy);
  ASSERT_TRUE(world.run_until([&] { return phase(world.peer()) == MigratePhase::Switchover; }));
  EXPECT_EQ(phase(world.source()), MigratePhase::Switchover);
  ASSERT_TRUE(world.run_until([&] { return phase(world.peer()) == MigratePhase::Handover; }));
  EXPECT_EQ(phase(world.source()), MigratePhase::Handover);
  world.kill_daemon(world.source());
  world.start_daemon(world.source());
  EXPECT_EQ(phase(world.source()), MigratePhase::Handover);
  world.connect();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::Secondary; }));
  // The record is durable a moment before the coordinator acts on it.
  EXPECT_TRUE(world.run_until([&] { return phase(world.source()) == MigratePhase::Idle; }));
  EXPECT_EQ(phase(world.peer()), MigratePhase::Idle);
}

// The pause that is reported must be the one that the guest had: from its stop to its resume.
TEST(Coordinator, DowntimeIsFromStopToResume) {
  World world;
  Nanoseconds stopped = 0;
  Nanoseconds resumed = 0;
  world.migrate();
  world.run_until([&] {
    if (stopped == 0 && !world.source_runs()) stopped = world.clock().now();
    if (resumed == 0 && world.peer_runs()) resumed = world.clock().now();
    return world.result.has_value();
  });
  ASSERT_TRUE(resumed > stopped && stopped > 0);
  const double real_ms = static_cast<double>(resumed - stopped) / 1e6;
  EXPECT_NEAR(world.result->downtime_ms, real_ms, 3);
  EXPECT_LT(real_ms, 150) << "two one-way trips, the tail and the records";
}

TEST(Coordinator, QuitSourceEndsTheSourceQemuAfterRunningOnly) {
  World world;
  MigrateRequest request;
  request.quit_source = true;
  world.migrate(request);
  world.run_until([&] { return world.peer_runs(); });
  EXPECT_TRUE(world.source().qemu()->alive);
  world.run_until([&] { return world.result.has_value(); });
  world.run_for(kSecond);
  EXPECT_FALSE(world.source().qemu()->alive);
}

// A guest that its operator had paused must not start to run because it was moved.
TEST(Coordinator, PausedGuestStaysPausedAtThePeer) {
  WorldOptions options;
  options.guest_running = false;
  World world(options);
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Done);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Running);
  world.run_for(5 * kSecond);
  EXPECT_FALSE(world.peer_runs());
}

TEST(Coordinator, ThereAndBackAgainManyTimes) {
  World world;
  for (int round = 0; round < 6; ++round) {
    Host& from = round % 2 == 0 ? world.source() : world.peer();
    Host& to = from.other();
    if (round > 0) world.start_fresh_qemu(to);
    world.result.reset();
    ASSERT_TRUE(from.daemon->coordinator->migrate({}, [&](const MigrateResult& r) { world.result = r; })) << round;
    ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
    EXPECT_EQ(world.result->outcome, MigrateOutcome::Done) << round << ": " << world.result->error;
    EXPECT_TRUE(World::guest_runs(to)) << round;
    world.run_for(kSecond);
    ASSERT_FALSE(World::guest_runs(from)) << round;
  }
  EXPECT_THAT(world.violations, IsEmpty());
}

TEST(Coordinator, CancelInPrecopyLeavesTheGuestRunningAtTheSource) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.source().qemu()->migration == MigrationState::Active; }));
  ASSERT_TRUE(world.source().daemon->coordinator->cancel());
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_EQ(world.result->guest, GuestPlace::RunningSource);
  EXPECT_EQ(world.result->error, "cancelled by the operator");
  EXPECT_TRUE(world.source_runs());
  world.run_for(5 * kSecond);
  EXPECT_NE(world.state(world.peer()), HandoverState::Prepared);
  EXPECT_FALSE(world.peer().qemu()->alive) << "H12";
}

TEST(Coordinator, CancelAfterGoIsRefused) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::GoSent; }));
  world.run_for(2 * kMillisecond);
  EXPECT_FALSE(world.source().daemon->coordinator->cancel());
  world.run_until([&] { return world.result.has_value(); });
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Done);
}

TEST(Coordinator, DestinationThatWasUsedIsRefusedBeforeTheGuestStops) {
  World world;
  world.peer().qemu()->migration = MigrationState::Failed;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_THAT(world.result->error, HasSubstr("fresh"));
  EXPECT_TRUE(world.source_runs());
  EXPECT_EQ(world.state(world.peer()), HandoverState::Secondary);
}

// A QEMU that nobody could ask says nothing about its guest.
TEST(Coordinator, SourceQemuThatDoesNotAnswerLeavesThePlaceOfTheGuestUnknown) {
  World world;
  world.kill_qemu(world.source());
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Failed);
  EXPECT_EQ(world.result->owner, "source");
  EXPECT_EQ(world.result->guest, GuestPlace::Unknown);
  EXPECT_THAT(world.result->error, HasSubstr("vmferry resolve"));
}

// An operator who pauses the guest and then gives the migration up must not read that it runs.
TEST(Coordinator, GuestPausedBeforeTheAttemptIsReportedPaused) {
  World world;
  world.predicted_bytes = 100'000'000;  // never small enough for an attempt
  world.migrate();
  world.run_for(2 * kSecond);
  world.source().qemu()->run = RunState::Paused;
  world.source().daemon->qemu.tell_run(RunState::Paused);
  world.run_for(100 * kMillisecond);
  ASSERT_TRUE(world.source().daemon->coordinator->cancel());
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_EQ(world.result->guest, GuestPlace::PausedSource);
}

TEST(Coordinator, SecondMigrationAtTheSameTimeIsBusy) {
  World world;
  world.migrate();
  EXPECT_EQ(world.source().daemon->coordinator->migrate({}, [](const MigrateResult&) {}).error().kind, ErrorKind::Busy);
}

TEST(Coordinator, TimeoutRollsBack) {
  World world;
  world.predicted_bytes = 100'000'000;  // ten seconds of link: never small enough
  MigrateRequest request;
  request.timeout = 5 * kSecond;
  world.migrate(request);
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_THAT(world.result->error, HasSubstr("5 s"));
  EXPECT_THAT(world.result->error, HasSubstr("changes its disks faster than the link carries"))
      << "what to do about it";
}

// H9: QEMU stops an idle guest whenever it likes. The disks are not ready, so the guest goes on at the source.
TEST(Coordinator, H9StoppedTooEarlyRollsBackWithoutAFreshDestination) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] {
    return world.source().qemu()->migration == MigrationState::PreSwitchover ||
           world.source().qemu()->migration == MigrationState::Active;
  }));
  world.predicted_bytes = 8'000'000;  // 0.8 s of link, the limit is 0.3 s
  world.source().daemon->memory.hold(false);
  ASSERT_TRUE(world.run_until([&] {
    world.source().daemon->memory.hold(false);
    return world.source().qemu()->migration == MigrationState::Cancelled;
  })) << world.describe();
  world.predicted_bytes = 0;
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_TRUE(world.source_runs());
  EXPECT_EQ(count(world.sent, MessageType::Prepare), 2U) << "a new attempt was asked for";
  EXPECT_THAT(world.violations, IsEmpty());
}

TEST(Coordinator, H9StoppedTooEarlyTriesAgainWithAFreshDestination) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.source().qemu()->migration == MigrationState::Active; }));
  world.predicted_bytes = 8'000'000;
  ASSERT_TRUE(world.run_until([&] {
    world.source().daemon->memory.hold(false);
    return world.source().qemu()->migration == MigrationState::Cancelled;
  }));
  world.start_fresh_qemu(world.peer());
  world.predicted_bytes = 0;
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Done) << world.result->error;
  EXPECT_THAT(world.violations, IsEmpty());
}

// The brake: while the disks need longer than their share, QEMU's socket is not read.
TEST(Coordinator, BrakeHoldsQemuUntilTheDisksFit) {
  World world;
  world.predicted_bytes = 3'000'000;  // 0.3 s
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.source().qemu()->migration == MigrationState::Active; }));
  world.run_for(10 * kSecond);
  EXPECT_EQ(world.source().qemu()->migration, MigrationState::Active);
  EXPECT_TRUE(world.source().daemon->coordinator->progress().brake_held);
  world.predicted_bytes = 100'000;
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Done);
}

// H10: a migration whose memory takes longer than the peer's limit is not given up while the guest runs.
TEST(Coordinator, H10PeersLimitCountsFromTheFenceNotFromPrepare) {
  World world;
  world.predicted_bytes = 3'000'000;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.peer()) == HandoverState::Prepared; }));
  world.run_for(300 * kSecond);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Prepared);
  world.predicted_bytes = 0;
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Done);
}

TEST(Coordinator, H10PeersLimitCountsFromTheLossOfTheConnectionToo) {
  World world;
  world.predicted_bytes = 3'000'000;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.peer()) == HandoverState::Prepared; }));
  world.cut();
  world.run_for(59 * kSecond);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Prepared);
  world.run_for(2 * kSecond);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Aborted);
  EXPECT_TRUE(world.source_runs());
}

// A short cut in precopy is what links do; it must cost time only.
TEST(Coordinator, ShortCutInPrecopyIsRiddenOut) {
  World world;
  world.predicted_bytes = 3'000'000;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.peer()) == HandoverState::Prepared; }));
  world.cut();
  world.run_for(10 * kSecond);
  world.restore();
  world.run_for(kSecond);
  world.predicted_bytes = 0;
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Done) << world.result->error;
}

// H2, H5: QEMU refused `cont`: it is killed, proved dead, and only then the source has its guest back.
TEST(Coordinator, RefusedContGivesTheGuestBack) {
  World world;
  world.peer().qemu()->refuses_cont = true;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_TRUE(world.source_runs());
  EXPECT_FALSE(world.peer().qemu()->alive);
  EXPECT_THAT(world.violations, IsEmpty());
}

// H2: noticed too late, a write that a client was answered in Started would go with the guest that is given back.
TEST(Coordinator, RefusedContAfterAnAcceptedWriteGoesToTheOperator) {
  World world;
  world.peer().qemu()->refuses_cont = true;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.peer().gate == Gate::Open; })) << world.describe();
  world.write_to(world.peer());  // a client of the export, not the guest
  world.run_for(60 * kSecond);
  EXPECT_THAT(world.violations, IsEmpty());
  EXPECT_FALSE(world.source_runs());
  EXPECT_EQ(world.state(world.source()), HandoverState::GoSent);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Started);
  EXPECT_TRUE(world.peer().record.wrote);
  EXPECT_EQ(world.peer().gate, Gate::Open) << "the owner's volumes stay usable";
}

// A guest small enough to fit into the socket would wait at pre-switchover for ever, stopped, with nobody to continue.
TEST(Coordinator, MigrateThatQemuCarriesOutAfterTheCancelIsCancelledToo) {
  World world;
  world.source().qemu()->migrate_delay = 2 * kSecond;
  world.source().qemu()->fits_into_socket = true;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.peer()) == HandoverState::Prepared; }));
  world.run_for(100 * kMillisecond);
  ASSERT_TRUE(world.source().daemon->coordinator->cancel());
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.source().qemu()->migration, MigrationState::None) << "not carried out yet: else this shows nothing";
  world.run_for(10 * kSecond);
  EXPECT_EQ(world.source().qemu()->migration, MigrationState::Cancelled);
  EXPECT_TRUE(world.source_runs());
}

// QEMU holds its big lock while it writes the tail: asked for its state first, it would never answer, and the guest
// would stay stopped until somebody killed it.
TEST(Coordinator, TailThatThePeerNoLongerTakesIsDroppedBeforeQemuIsAsked) {
  World world;
  world.source().qemu()->long_tail = true;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.source().qemu()->migration == MigrationState::Device; }));
  world.kill_qemu(world.peer());
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_EQ(world.state(world.source()), HandoverState::Own);
  EXPECT_TRUE(world.source_runs());
}

// After a restart the source has no stream any more; a peer that waits for the rest of it up to its limit of 20 s keeps
// a guest stopped that could go on at once.
TEST(Coordinator, SourceThatRestartedAfterGoSaysThatTheStreamIsLost) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::Fenced; }));
  world.cut();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::GoSent; }))
      << world.describe();
  world.kill_daemon(world.source());
  world.start_daemon(world.source());
  world.restore();
  world.run_for(3 * kSecond);
  EXPECT_EQ(world.state(world.source()), HandoverState::Own) << world.describe();
  EXPECT_TRUE(world.source_runs());
  EXPECT_FALSE(world.peer_runs());
}

// H12: the source's word that it took the guest back must not spare a hung QEMU, which is one `cont` from running.
TEST(Coordinator, HungDestinationOfAFailedAttemptIsKilledAfterTheSourceTookBack) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::Fenced; }));
  world.peer().qemu()->hangs = true;
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  world.run_for(60 * kSecond);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Secondary);
  EXPECT_FALSE(world.peer().qemu()->alive);
}

// H5: a QEMU that does not answer in Primary is killed before its guest is given back.
TEST(Coordinator, HungDestinationInPrimaryIsKilledThenTheGuestGoesBack) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.peer()) == HandoverState::Primary; }));
  world.peer().qemu()->hangs = true;
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_EQ(world.result->outcome, MigrateOutcome::RolledBack);
  EXPECT_FALSE(world.peer().qemu()->alive);
  EXPECT_TRUE(world.source_runs());
  EXPECT_THAT(world.violations, IsEmpty());
}

// Started and dead: nobody may run the guest by himself, and both sides say so.
TEST(Coordinator, DestinationThatDiesAfterStartedIsTheOperatorsAffair) {
  World world;
  MigrateRequest request;
  world.migrate(request);
  ASSERT_TRUE(world.run_until([&] { return world.state(world.peer()) == HandoverState::Started; }));
  world.kill_qemu(world.peer());
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); })) << world.describe();
  EXPECT_FALSE(world.source_runs());
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Failed);
  EXPECT_EQ(world.result->guest, GuestPlace::Unknown);
  EXPECT_EQ(world.result->owner, "unknown");
  EXPECT_THAT(world.result->error, HasSubstr("resolve"));
  EXPECT_THAT(world.peer().daemon->alerts, Not(IsEmpty()));
  // The operator gives it back there; the source hears ABORTED at the next question.
  std::optional<Status> resolved;
  world.peer().daemon->coordinator->resolve(ResolveChoice::RunAtPeer, false, [&](Status s) { resolved = s; });
  ASSERT_TRUE(world.run_until([&] { return world.source_runs(); })) << world.describe();
  EXPECT_TRUE(resolved && *resolved);
  EXPECT_THAT(world.violations, IsEmpty());
}

TEST(Coordinator, LostPeerIsResolvedByForceAndSupersededAtFirstContact) {
  World world;
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.peer_runs(); }));
  world.cut();  // RUNNING is lost
  ASSERT_TRUE(world.run_until([&] { return world.result.has_value(); }));
  EXPECT_EQ(world.result->outcome, MigrateOutcome::Failed);
  EXPECT_EQ(world.state(world.source()), HandoverState::GoSent);
  std::optional<Status> resolved;
  world.source().daemon->coordinator->resolve(ResolveChoice::RunHere, false, [&](Status s) { resolved = s; });
  world.run_for(kSecond);
  ASSERT_TRUE(resolved);
  EXPECT_FALSE(*resolved) << "without --force";
  world.split_allowed = true;
  resolved.reset();
  world.source().daemon->coordinator->resolve(ResolveChoice::RunHere, true, [&](Status s) { resolved = s; });
  world.run_for(2 * kSecond);
  ASSERT_TRUE(resolved && *resolved);
  EXPECT_TRUE(world.source_runs());
  world.restore();
  world.run_for(2 * kSecond);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Superseded);
  EXPECT_TRUE(world.peer().record.split_brain);
  EXPECT_FALSE(world.peer_runs()) << "H7: it was stopped";
  EXPECT_EQ(world.peer().gate, Gate::Refused);
}

TEST(Coordinator, GuestTakenBackByForceIsToldToAPeerThatIsConnected) {
  // The peer hangs between Primary and RUNNING, on a good link: no hello would come to fence it, and both sides would
  // own the group until the next cut.
  World world;
  world.start_fresh_qemu(world.peer());
  world.migrate();
  ASSERT_TRUE(world.run_until([&] { return world.state(world.source()) == HandoverState::GoSent; }));
  world.peer().qemu()->hangs = true;
  world.run_for(kSecond);
  const HandoverState before = world.state(world.peer());
  ASSERT_TRUE(before == HandoverState::Started || before == HandoverState::Primary) << to_string(before);
  world.split_allowed = true;
  std::optional<Status> resolved;
  world.source().daemon->coordinator->resolve(ResolveChoice::RunHere, true, [&](Status s) { resolved = s; });
  world.run_for(kSecond);
  ASSERT_TRUE(resolved && *resolved);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Superseded);
  EXPECT_EQ(world.peer().gate, Gate::Refused);
}

// --- promotion

TEST(Coordinator, PromoteAsksThePeerAndSwapsRoles) {
  World world;
  world.source().qemu()->run = RunState::Paused;
  world.run_for(kSecond);
  std::optional<Status> done;
  world.peer().daemon->coordinator->promote({}, [&](Status s) { done = s; });
  world.run_for(2 * kSecond);
  ASSERT_TRUE(done);
  EXPECT_TRUE(*done) << done->error().text;
  EXPECT_EQ(world.state(world.peer()), HandoverState::Own);
  EXPECT_EQ(world.state(world.source()), HandoverState::Secondary);
  EXPECT_EQ(world.peer().gate, Gate::Open);
  EXPECT_EQ(world.source().gate, Gate::Refused);
  EXPECT_TRUE(std::includes(world.peer().disk.begin(), world.peer().disk.end(), world.acknowledged.begin(),
                            world.acknowledged.end()));
}

TEST(Coordinator, RecordOfTheFirstWriteDoesNotOpenTheGateOfAPromotion) {
  // Writes would be acknowledged behind the round that the promotion waits for, and the new primary would lack them.
  for (Nanoseconds first = 0; first < 200 * kMillisecond; first += 5 * kMillisecond) {
    World world({.coordinator = {}, .guest_running = false});
    world.run_for(2 * kSecond);
    ASSERT_FALSE(world.source().record.wrote);
    world.write_to(world.source());  // by another client
    std::optional<Status> done;
    world.clock().at(world.clock().now() + first,
                     [&] { world.peer().daemon->coordinator->promote({}, [&](Status s) { done = s; }); });
    while (!done && world.step()) world.write_to(world.source());
    ASSERT_TRUE(done);
    ASSERT_TRUE(*done) << done->error().text;
    ASSERT_TRUE(std::includes(world.peer().disk.begin(), world.peer().disk.end(), world.acknowledged.begin(),
                              world.acknowledged.end()))
        << "first write " << first / kMillisecond << " ms before";
  }
}

TEST(Coordinator, HalfAnEpochIsNotPromotedWithoutTheOperatorsWord) {
  // The disk of the copy fails in the middle of an epoch: the guest would boot from a mix of two (I6).
  World world;
  world.source().qemu()->run = RunState::Paused;
  world.run_for(kSecond);
  world.peer().daemon->replication.half_applied = true;
  std::optional<Status> done;
  world.peer().daemon->coordinator->promote({}, [&](Status s) { done = s; });
  world.run_for(2 * kSecond);
  ASSERT_TRUE(done);
  ASSERT_FALSE(*done);
  EXPECT_THAT(done->error().text, HasSubstr("applied in part"));
  EXPECT_EQ(world.peer().record.role, Role::Secondary);
  EXPECT_EQ(world.peer().gate, Gate::Refused);
  done.reset();
  world.peer().daemon->coordinator->promote({.force = false, .accept_inconsistent = true}, [&](Status s) { done = s; });
  world.run_for(2 * kSecond);
  ASSERT_TRUE(done);
  EXPECT_TRUE(*done) << done->error().text;
  EXPECT_EQ(world.peer().record.role, Role::Primary);
}

TEST(Coordinator, PromoteIsRefusedWhileTheGuestRunsThere) {
  World world;
  world.run_for(kSecond);
  std::optional<Status> done;
  world.peer().daemon->coordinator->promote({}, [&](Status s) { done = s; });
  world.run_for(2 * kSecond);
  ASSERT_TRUE(done);
  EXPECT_FALSE(*done);
  EXPECT_THAT(done->error().text, HasSubstr("guest is running"));
  EXPECT_EQ(world.source().gate, Gate::Open) << "the guest must not notice";
}

TEST(Coordinator, PromoteWithoutAPeerNeedsForce) {
  World world;
  world.run_for(kSecond);
  world.cut();
  std::optional<Status> done;
  world.peer().daemon->coordinator->promote({}, [&](Status s) { done = s; });
  ASSERT_TRUE(done);
  EXPECT_EQ(done->error().kind, ErrorKind::Unavailable);
  world.split_allowed = true;
  world.peer().daemon->coordinator->promote({.force = true, .accept_inconsistent = false}, [&](Status s) { done = s; });
  world.run_for(kSecond);
  EXPECT_TRUE(*done);
  EXPECT_TRUE(world.peer().record.forced);
  world.restore();
  world.run_for(kSecond);
  EXPECT_EQ(world.state(world.source()), HandoverState::Superseded);
  EXPECT_FALSE(world.source_runs());
}

TEST(Coordinator, DemoteIsRefusedWhileTheGuestRuns) {
  World world;
  std::optional<Status> done;
  world.source().daemon->coordinator->demote([&](Status s) { done = s; });
  world.run_for(kSecond);
  ASSERT_TRUE(done);
  EXPECT_FALSE(*done);
  world.source().qemu()->run = RunState::Paused;
  world.source().daemon->coordinator->demote([&](Status s) { done = s; });
  world.run_for(kSecond);
  EXPECT_TRUE(*done);
  EXPECT_EQ(world.state(world.source()), HandoverState::Secondary);
}

}  // namespace
}  // namespace vmferry::fake
