// SPDX-License-Identifier: Apache-2.0
//
// Rows of docs/migration.md, source side.
#include <gmock/gmock.h>

#include "tests/unit/migrate/handover_fixture.h"

namespace vmferry {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

event::Start start_event() {
  return {.attempt = attempt_id(1),
          .qmp_path = "/run/a.qmp",
          .qemu = {.pid = 42, .start_time = 7, .boot_id = "b"},
          .qemu_reachable = true,
          .guest_running = true,
          .detach = false,
          .quit_source = true};
}

// The peer must never hear of an attempt that a restarted source has forgotten.
TEST(HandoverSource, StartIsDurableWithANewTermBeforePrepare) {
  const Transition t = step(in_state(HandoverState::Own), start_event());
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Migrating);
  EXPECT_EQ(t.next->term, kOwnTerm + 1);
  EXPECT_EQ(t.next->attempt, attempt_id(1));
  EXPECT_EQ(t.next->qemu.pid, 42);
  EXPECT_TRUE(t.next->quit_source);
  EXPECT_THAT(kinds(t), ElementsAre(ActionKind::SendPrepare));
}

TEST(HandoverSource, StartAfterAHandoverTakesTheNextTerm) {
  const Transition t = step(in_state(HandoverState::Running), start_event());
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->term, kAttemptTerm + 1);
}

// A migration started where the group is not owned, or while one is under way, would have two terms for one guest.
TEST(HandoverSource, StartIsRefusedEverywhereElse) {
  for (const HandoverState state : kAllStates) {
    if (state == HandoverState::Own || state == HandoverState::Running) continue;
    const Transition t = step(in_state(state), start_event());
    EXPECT_TRUE(t.refused() && is_inert(t)) << name_of(state);
  }
  Ownership split = in_state(HandoverState::Own);
  split.split_brain = true;
  EXPECT_TRUE(step(split, start_event()).refused());
  event::Start unreachable = start_event();
  unreachable.qemu_reachable = false;
  EXPECT_TRUE(step(in_state(HandoverState::Own), unreachable).refused());
}

// The last epoch taken before the fence is durable could miss a write of a guest that a restart set free.
TEST(HandoverSource, SwitchoverFencesDurablyThenSendsEpochAndTailAtOnce) {
  const Transition t =
      step(in_state(HandoverState::Migrating),
           event::SwitchoverReached{
               .attempt = attempt_id(1), .peer_prepared = true, .same_run = true, .guest_was_running = true});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Fenced);
  EXPECT_THAT(kinds(t),
              ElementsAre(ActionKind::SendFenceNotice, ActionKind::SendLastEpoch, ActionKind::MigrateContinue));
}

TEST(HandoverSource, SwitchoverNeedsPreparedTheSameRunAndTheAttempt) {
  const Ownership migrating = in_state(HandoverState::Migrating);
  EXPECT_TRUE(is_inert(step(migrating, event::SwitchoverReached{attempt_id(1), false, true, true})));
  EXPECT_TRUE(is_inert(step(migrating, event::SwitchoverReached{attempt_id(1), true, false, true})));
  EXPECT_TRUE(is_inert(step(migrating, event::SwitchoverReached{attempt_id(2), true, true, true})));
}

// Without the higher term a peer that is late could still run the guest that was taken back.
TEST(HandoverSource, AbortBeforeGoTakesTheGroupBackWithAHigherTerm) {
  for (const HandoverState state : {HandoverState::Migrating, HandoverState::Fenced}) {
    const Transition t =
        step(in_state(state), event::SourceAbort{.qemu_dead = false, .operator_spoke = false, .reason = "limit"});
    ASSERT_TRUE(t.next);
    EXPECT_EQ(t.next->state, HandoverState::AbortedResumeOwed);
    EXPECT_EQ(t.next->term, kAttemptTerm + 1);
    EXPECT_EQ(t.next->reason, "limit");
    EXPECT_THAT(kinds(t),
                ElementsAre(ActionKind::UnfenceApplyParked, ActionKind::SendAborted, ActionKind::ResumeGuest));
  }
}

// After GO the peer may run the guest: no limit, cancel or restart ends the doubt.
TEST(HandoverSource, AbortAfterGoIsRefused) {
  const Transition t = step(in_state(HandoverState::GoSent),
                            event::SourceAbort{.qemu_dead = false, .operator_spoke = true, .reason = "x"});
  EXPECT_TRUE(t.refused() && is_inert(t));
}

TEST(HandoverSource, PeersAbortedEndsAnAttemptBeforeGoToo) {
  for (const HandoverState state : {HandoverState::Migrating, HandoverState::Fenced}) {
    const Transition t = step(in_state(state), event::PeerAnswered{event::Answer::Aborted, attempt_id(1), 8, "hash"});
    ASSERT_TRUE(t.next);
    EXPECT_EQ(t.next->state, HandoverState::AbortedResumeOwed);
  }
}

// GO before postmigrate: QEMU may run the guest again by itself, and the peer runs it too.
TEST(HandoverSource, GoOnlyAtCompletedAndPostmigrateTogether) {
  const Ownership fenced = in_state(HandoverState::Fenced);
  EXPECT_TRUE(is_inert(step(fenced, event::SourceQemuState{.completed = true, .postmigrate = false})));
  EXPECT_TRUE(is_inert(step(fenced, event::SourceQemuState{.completed = false, .postmigrate = true})));
  const Transition t = step(fenced, event::SourceQemuState{.completed = true, .postmigrate = true});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::GoSent);
  EXPECT_EQ(t.next->owner, Owner::Unknown);
  EXPECT_THAT(kinds(t), ElementsAre(ActionKind::SendGo));
}

TEST(HandoverSource, ReconnectAsksAgainFromTheRecord) {
  EXPECT_THAT(kinds(step(in_state(HandoverState::GoSent), event::Reconnected{})),
              ElementsAre(ActionKind::SendGo, ActionKind::ResendLastEpochAndTail));
  EXPECT_THAT(kinds(step(in_state(HandoverState::Migrating), event::Reconnected{})),
              ElementsAre(ActionKind::SendPrepare));
  EXPECT_THAT(kinds(step(in_state(HandoverState::Fenced), event::Reconnected{})),
              ElementsAre(ActionKind::SendFenceNotice, ActionKind::ResendLastEpochAndTail));
  EXPECT_TRUE(is_inert(step(in_state(HandoverState::Own), event::Reconnected{})));
}

TEST(HandoverSource, AbortedAfterGoTakesTheGuestBack) {
  const Transition t =
      step(in_state(HandoverState::GoSent), event::PeerAnswered{event::Answer::Aborted, attempt_id(1), 8, "limit"});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::AbortedResumeOwed);
  EXPECT_EQ(t.next->term, kAttemptTerm + 1);
  EXPECT_TRUE(t.has(ActionKind::UnfenceApplyParked));
}

// An answer about another attempt, however late, must not unfence this one.
TEST(HandoverSource, AnswersAboutAnotherAttemptChangeNothing) {
  for (const HandoverState state : kAllStates)
    for (const event::Answer answer : {event::Answer::Primary, event::Answer::Started, event::Answer::Running,
                                       event::Answer::Aborted, event::Answer::UnknownAttempt})
      EXPECT_TRUE(is_inert(step(in_state(state), event::PeerAnswered{answer, attempt_id(9), 99, ""})))
          << name_of(state);
}

TEST(HandoverSource, RunningMakesTheSourceASecondaryAndEndsItsQemuOnlyWhenAsked) {
  Ownership in_doubt = in_state(HandoverState::GoSent);
  const event::PeerAnswered running{event::Answer::Running, attempt_id(1), 8, ""};
  Transition t = step(in_doubt, running);
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Secondary);
  EXPECT_EQ(t.next->owner, Owner::Peer);
  EXPECT_THAT(kinds(t), ElementsAre(ActionKind::FailParked, ActionKind::ReportHandedOver, ActionKind::RoleChanged));
  in_doubt.quit_source = true;
  EXPECT_TRUE(step(in_doubt, running).has(ActionKind::QuitSourceQemu));
}

TEST(HandoverSource, RunHereByForceTakesANewAttemptAndAHigherTerm) {
  const Ownership in_doubt = in_state(HandoverState::GoSent);
  event::ResolveAsked resolve{.choice = ResolveChoice::RunHere,
                              .force = false,
                              .new_attempt = attempt_id(5),
                              .qemu_dead = false,
                              .memory_complete = false,
                              .peer_term = 20};
  EXPECT_TRUE(is_inert(step(in_doubt, resolve)) && step(in_doubt, resolve).refused());
  resolve.force = true;
  const Transition t = step(in_doubt, resolve);
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::AbortedResumeOwed);
  EXPECT_EQ(t.next->attempt, attempt_id(5));
  EXPECT_EQ(t.next->term, 21U);
  EXPECT_TRUE(t.next->forced);
}

TEST(HandoverSource, RunAtPeerEndsTheDoubtAsSecondary) {
  const Transition t = step(in_state(HandoverState::GoSent), event::ResolveAsked{.choice = ResolveChoice::RunAtPeer});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Secondary);
  EXPECT_TRUE(t.has(ActionKind::FailParked));
}

struct ResumeRow {
  const char* name;
  RunState run;
  MigrationState migration;
  bool guest_was_running;
  bool ends;  // in Own
  std::vector<ActionKind> actions;
};

// The guest resumes by what QEMU says, not by what was asked of it: a cancel may find it already running, and a
// postmigrate guest never runs by itself.
TEST(HandoverSource, OwedResumeFollowsQemusState) {
  const ResumeRow rows[] = {
      {"active", RunState::Paused, MigrationState::Active, true, false, {ActionKind::MigrateCancel}},
      {"setup", RunState::Paused, MigrationState::Setup, true, false, {ActionKind::MigrateCancel}},
      {"pre-switchover",
       RunState::FinishMigrate,
       MigrationState::PreSwitchover,
       true,
       false,
       {ActionKind::MigrateCancel}},
      {"device", RunState::FinishMigrate, MigrationState::Device, true, false, {ActionKind::MigrateCancel}},
      {"cancelling", RunState::FinishMigrate, MigrationState::Cancelling, true, false, {ActionKind::ResumeGuest}},
      {"finishing", RunState::FinishMigrate, MigrationState::Cancelled, true, false, {ActionKind::ResumeGuest}},
      {"postmigrate", RunState::PostMigrate, MigrationState::Completed, true, false, {ActionKind::Cont}},
      {"cancelled and running",
       RunState::Running,
       MigrationState::Cancelled,
       true,
       true,
       {ActionKind::ReportRolledBack}},
      {"running while active", RunState::Running, MigrationState::Active, true, false, {ActionKind::MigrateCancel}},

      {"paused before", RunState::Paused, MigrationState::Cancelled, false, true, {ActionKind::ReportRolledBack}},
      {"unknown", RunState::Unknown, MigrationState::None, true, false, {ActionKind::ResumeGuest}},
  };
  for (const ResumeRow& row : rows) {
    Ownership owed = in_state(HandoverState::AbortedResumeOwed);
    owed.guest_was_running = row.guest_was_running;
    event::ResumeObserved seen;
    seen.state.run = row.run;
    seen.state.migration = row.migration;
    const Transition t = step(owed, seen);
    EXPECT_EQ(t.next.has_value(), row.ends) << row.name;
    EXPECT_TRUE(!t.next || t.next->state == HandoverState::Own) << row.name;
    EXPECT_EQ(kinds(t), row.actions) << row.name;
  }
}

// Waiting for a dead QEMU to run would keep the group in a migration that is over.
TEST(HandoverSource, OwedResumeOfADeadQemuEndsInOwnAndSaysSo) {
  Ownership owed = in_state(HandoverState::AbortedResumeOwed);
  event::ResumeObserved dead;
  dead.dead = true;
  const Transition t = step(owed, dead);
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Own);
  EXPECT_NE(t.next->reason, "");
}

}  // namespace
}  // namespace vmferry
