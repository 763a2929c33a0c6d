// SPDX-License-Identifier: Apache-2.0
//
// A fault at every single event of a migration, then two faults, then planted mistakes that these tests must find.
#include <gmock/gmock.h>

#include <map>

#include "engine/base/random.h"
#include "tests/unit/migrate/fake_world.h"

namespace vmferry::fake {
namespace {

using testing::IsEmpty;

enum class Fault : uint8_t {
  ShortCut,
  LongCut,
  RestartSource,
  RestartPeer,
  RestartBoth,
  SourceDownForLong,
  PeerDownForLong,
  KillDestinationQemu,
  KillSourceQemu,
  Cancel,
};
constexpr std::array kFaults = {Fault::ShortCut,        Fault::LongCut,
                                Fault::RestartSource,   Fault::RestartPeer,
                                Fault::RestartBoth,     Fault::SourceDownForLong,
                                Fault::PeerDownForLong, Fault::KillDestinationQemu,
                                Fault::KillSourceQemu,  Fault::Cancel};

const char* name_of_fault(Fault fault) {
  switch (fault) {
    case Fault::ShortCut:
      return "short cut";
    case Fault::LongCut:
      return "long cut";
    case Fault::RestartSource:
      return "source daemon restarts";
    case Fault::RestartPeer:
      return "destination daemon restarts";
    case Fault::RestartBoth:
      return "both daemons restart";
    case Fault::SourceDownForLong:
      return "source daemon is down";
    case Fault::PeerDownForLong:
      return "destination daemon is down";
    case Fault::KillDestinationQemu:
      return "destination QEMU dies";
    case Fault::KillSourceQemu:
      return "source QEMU dies";
    case Fault::Cancel:
      return "cancel";
  }
  return "";
}

// What heals comes back by a task on the world's clock.
void inject(World& world, Fault fault) {
  const auto after = [&world](Nanoseconds delay, std::function<void()> heal) {
    world.clock().at(world.clock().now() + delay, std::move(heal));
  };
  const auto restart = [&world](Host& host) {
    if (!host.daemon) world.start_daemon(host);
    world.restore();
  };
  switch (fault) {
    case Fault::ShortCut:
      world.cut();
      after(300 * kMillisecond, [&world] { world.restore(); });
      break;
    case Fault::LongCut:
      world.cut();
      after(200 * kSecond, [&world] { world.restore(); });
      break;
    case Fault::RestartSource:
      world.kill_daemon(world.source());
      after(100 * kMillisecond, [&world, restart] { restart(world.source()); });
      break;
    case Fault::RestartPeer:
      world.kill_daemon(world.peer());
      after(100 * kMillisecond, [&world, restart] { restart(world.peer()); });
      break;
    case Fault::RestartBoth:
      world.kill_daemon(world.source());
      world.kill_daemon(world.peer());
      after(100 * kMillisecond, [&world, restart] {
        restart(world.source());
        restart(world.peer());
      });
      break;
    case Fault::SourceDownForLong:
      world.kill_daemon(world.source());
      after(200 * kSecond, [&world, restart] { restart(world.source()); });
      break;
    case Fault::PeerDownForLong:
      world.kill_daemon(world.peer());
      after(200 * kSecond, [&world, restart] { restart(world.peer()); });
      break;
    case Fault::KillDestinationQemu:
      world.kill_qemu(world.peer());
      break;
    case Fault::KillSourceQemu:
      world.kill_qemu(world.source());
      break;
    case Fault::Cancel:
      if (world.source().daemon) (void)world.source().daemon->coordinator->cancel();
      break;
  }
}

bool any_daemon_missing(World& world) {
  return !world.source().daemon || !world.peer().daemon || !world.up();
}

// The guest runs where its owner says; or it died with its QEMU and the owner is known; or a side waits for the
// operator and its status names `resolve`.
bool is_stated(World& world, std::string& what) {
  const HandoverState source = world.state(world.source());
  const HandoverState peer = world.state(world.peer());
  const bool source_dead = !world.source().qemu()->alive;
  const bool peer_dead = !world.peer().qemu()->alive;
  if (source == HandoverState::Own && may_run(world.source().record) && !may_run(world.peer().record)) {
    what = source_dead ? "own, source QEMU dead" : "rolled back";
    return source_dead || world.source_runs();
  }
  if (source == HandoverState::Secondary && peer == HandoverState::Running) {
    what = peer_dead ? "handed over, then QEMU died" : "handed over";
    return peer_dead || world.peer_runs();
  }
  if (source == HandoverState::GoSent && peer == HandoverState::Started && peer_dead) {
    what = "started and dead";
    return explain(world.source().record).find("resolve") != std::string::npos;
  }
  if (source == HandoverState::Fenced && source_dead) {
    what = "fenced with a dead source QEMU";
    return true;
  }
  what = "?";
  return false;
}

struct Outcome {
  std::vector<std::string> violations;
  bool settled = false;
  std::string what;
  std::string description;
};

// Runs a migration, injects faults when their event count comes, and waits until both sides have settled.
Outcome run_with(const std::vector<std::pair<uint64_t, Fault>>& faults, HandoverFaults planted = {}) {
  WorldOptions options;
  options.coordinator.faults = planted;
  World world(options);
  world.migrate();
  for (const auto& [step, fault] : faults) {
    while (world.steps() < step && world.step()) {
    }
    inject(world, fault);
  }
  world.run_for(230 * kSecond);
  for (int i = 0; i < 40; ++i) {
    Outcome outcome;
    outcome.settled = !any_daemon_missing(world) && is_stated(world, outcome.what);
    outcome.description = world.describe();
    outcome.violations = world.violations;
    if (outcome.settled || !world.violations.empty() || i == 39) return outcome;
    world.run_for(10 * kSecond);
  }
  return {};
}

uint64_t steps_of_a_whole_migration() {
  World world;
  world.migrate();
  world.run_until([&] { return world.result.has_value(); });
  world.run_for(100 * kMillisecond);
  return world.steps();
}

// I5, I10: whatever fails at whatever moment, there is one guest at most, and nobody has to guess.
TEST(CoordinatorFaults, OneFaultAtEveryEventLeavesOneGuestAndAStatedOutcome) {
  const uint64_t steps = steps_of_a_whole_migration();
  ASSERT_GT(steps, 100U);
  std::map<std::string, int> outcomes;
  for (const Fault fault : kFaults) {
    for (uint64_t step = 1; step <= steps; ++step) {
      const Outcome outcome = run_with({{step, fault}});
      ASSERT_THAT(outcome.violations, IsEmpty()) << name_of_fault(fault) << " at event " << step;
      ASSERT_TRUE(outcome.settled) << name_of_fault(fault) << " at event " << step << ": " << outcome.description;
      ++outcomes[outcome.what];
    }
  }
  // A matrix in which an outcome never comes up does not test it.
  for (const char* what :
       {"rolled back", "handed over", "handed over, then QEMU died", "started and dead", "own, source QEMU dead"})
    EXPECT_GT(outcomes[what], 0) << what;
}

TEST(CoordinatorFaults, TwoFaultsLeaveOneGuestAndAStatedOutcome) {
  const uint64_t steps = steps_of_a_whole_migration();
  Random random(0x5eed);
  for (int i = 0; i < 3000; ++i) {
    const uint64_t first = 1 + random.below(steps);
    const uint64_t second = first + random.below(120);
    const Fault a = kFaults[random.below(kFaults.size())];
    const Fault b = kFaults[random.below(kFaults.size())];
    const Outcome outcome = run_with({{first, a}, {second, b}});
    ASSERT_THAT(outcome.violations, IsEmpty())
        << name_of_fault(a) << " at " << first << ", " << name_of_fault(b) << " at " << second;
    ASSERT_TRUE(outcome.settled) << name_of_fault(a) << " at " << first << ", " << name_of_fault(b) << " at " << second
                                 << ": " << outcome.description;
  }
}

// Whether some single fault shows the planted mistake, as a violation or as an outcome that nobody can act on.
bool is_found(HandoverFaults planted) {
  const uint64_t steps = steps_of_a_whole_migration();
  for (const Fault fault : kFaults) {
    for (uint64_t step = 1; step <= steps; ++step) {
      const Outcome outcome = run_with({{step, fault}}, planted);
      if (!outcome.violations.empty() || !outcome.settled) return true;
    }
  }
  return false;
}

// Tests of the tests: each of these mistakes lost a guest or a write in the model.
TEST(CoordinatorFaults, GoBeforePostmigrateIsFound) {
  HandoverFaults planted;
  planted.go_before_postmigrate = true;
  EXPECT_TRUE(is_found(planted));
}

TEST(CoordinatorFaults, UnfencingAfterGoWithoutAbortedIsFound) {
  HandoverFaults planted;
  planted.unfence_after_go_without_aborted = true;
  EXPECT_TRUE(is_found(planted));
}

// GO is lost, the peer gives up, restarts, and is asked.
HandoverState source_after_a_restarted_no(HandoverFaults planted) {
  WorldOptions options;
  options.coordinator.faults = planted;
  World world(options);
  world.migrate();
  world.run_until([&] { return world.state(world.source()) == HandoverState::GoSent; });
  world.cut();
  world.run_for(70 * kSecond);
  EXPECT_EQ(world.state(world.peer()), HandoverState::Aborted);
  world.restart_daemon(world.peer());
  world.restore();
  world.run_for(10 * kSecond);
  return world.state(world.source());
}

TEST(CoordinatorFaults, H11AbortedForgottenOnRestartIsFound) {
  HandoverFaults planted;
  planted.aborted_forgotten_on_restart = true;
  EXPECT_EQ(source_after_a_restarted_no(planted), HandoverState::GoSent);
  EXPECT_EQ(source_after_a_restarted_no({}), HandoverState::Own);
}

TEST(CoordinatorFaults, H1ParkedWritesFailedOnPrimaryIsFound) {
  HandoverFaults planted;
  planted.fail_parked_on_primary = true;
  EXPECT_TRUE(is_found(planted));
}

// Run before Primary is durable, a crash of the daemon leaves a guest that runs beside the source's.
TEST(CoordinatorFaults, ContBeforePrimaryIsDurableIsFound) {
  HandoverFaults planted;
  planted.cont_before_primary_durable = true;
  EXPECT_TRUE(is_found(planted));
}

}  // namespace
}  // namespace vmferry::fake
