// SPDX-License-Identifier: Apache-2.0
//
// Rows of docs/migration.md, peer side.
#include <gmock/gmock.h>

#include "tests/unit/migrate/handover_fixture.h"

namespace vmferry {
namespace {

using testing::Contains;
using testing::ElementsAre;

event::PrepareReceived prepare(uint8_t attempt, uint64_t term) {
  return {.attempt = attempt_id(attempt),
          .term = term,
          .qemu_fresh = true,
          .qemu = {.pid = 7, .start_time = 99, .boot_id = "boot"},
          .qmp_path = "/run/b.qmp",
          .guest_was_running = true};
}

event::Conditions all_conditions() {
  return {.attempt = attempt_id(1),
          .epoch_durable = true,
          .stream_hash_equal = true,
          .go = true,
          .qemu_completed_paused = true,
          .guest_was_running = true};
}

// A new primary that does not know of --detach would send everything to a host that is about to be taken away.
TEST(HandoverPeer, WhetherTheSourceFollowsIsInTheRecordOfEachAttempt) {
  event::PrepareReceived detaching = prepare(2, kAttemptTerm + 1);
  detaching.detach = true;
  const Transition first = step(in_state(HandoverState::Secondary), detaching);
  ASSERT_TRUE(first.next);
  EXPECT_TRUE(first.next->detach);
  const Transition second = step(*first.next, prepare(3, kAttemptTerm + 2));
  ASSERT_TRUE(second.next);
  EXPECT_FALSE(second.next->detach);
}

TEST(HandoverPeer, PrepareIsDurableWithTheDestinationsIdentityBeforeTheStreamStarts) {
  for (const HandoverState state : {HandoverState::Secondary, HandoverState::Prepared, HandoverState::Aborted}) {
    const Transition t = step(in_state(state), prepare(2, kAttemptTerm + 1));
    ASSERT_TRUE(t.next) << name_of(state);
    EXPECT_EQ(t.next->state, HandoverState::Prepared);
    EXPECT_EQ(t.next->term, kAttemptTerm + 1);
    EXPECT_EQ(t.next->attempt, attempt_id(2));
    EXPECT_EQ(t.next->qemu.start_time, 99U);
    EXPECT_EQ(t.next->qemu.boot_id, "boot");
    EXPECT_THAT(kinds(t), Contains(ActionKind::StartIncoming));
  }
}

TEST(HandoverPeer, PrepareNeedsAHigherTermAFreshQemuAndASecondary) {
  EXPECT_TRUE(step(in_state(HandoverState::Secondary), prepare(2, kOwnTerm)).refused());
  event::PrepareReceived used = prepare(2, 99);
  used.qemu_fresh = false;
  EXPECT_TRUE(step(in_state(HandoverState::Secondary), used).refused());
  for (const HandoverState state : kAllStates) {
    if (state == HandoverState::Secondary || state == HandoverState::Prepared || state == HandoverState::Aborted)
      continue;
    const Transition t = step(in_state(state), prepare(2, 99));
    EXPECT_TRUE(t.refused() && is_inert(t)) << name_of(state);
  }
}

// PREPARE comes again after a cut: a second destination start would break a stream that is under way.
TEST(HandoverPeer, SamePrepareAgainGetsTheSameAnswer) {
  EXPECT_THAT(kinds(step(in_state(HandoverState::Prepared), prepare(1, kAttemptTerm))),
              ElementsAre(ActionKind::SendPrepared));
  EXPECT_THAT(kinds(step(in_state(HandoverState::Aborted), prepare(1, kAttemptTerm))),
              ElementsAre(ActionKind::SendAborted));
}

// Any one condition missing means a guest that runs without its last writes, its memory, or beside the source.
TEST(HandoverPeer, PrimaryNeedsEveryCondition) {
  const Ownership prepared = in_state(HandoverState::Prepared);
  for (int missing = 0; missing < 5; ++missing) {
    event::Conditions conditions = all_conditions();
    if (missing == 0) conditions.epoch_durable = false;
    if (missing == 1) conditions.stream_hash_equal = false;
    if (missing == 2) conditions.go = false;
    if (missing == 3) conditions.qemu_completed_paused = false;
    if (missing == 4) conditions.attempt = attempt_id(2);
    EXPECT_TRUE(is_inert(step(prepared, conditions))) << missing;
  }
  const Transition t = step(prepared, all_conditions());
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Primary);
  EXPECT_FALSE(t.has(ActionKind::ContGuest));
  EXPECT_THAT(kinds(t), ElementsAre(ActionKind::SendPrimary, ActionKind::CheckStillPaused));
}

TEST(HandoverPeer, MissingConditionAbortsDurablyAndEndsTheQemu) {
  const Transition t = step(in_state(HandoverState::Prepared), event::PeerAbort{"limit"});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Aborted);
  EXPECT_EQ(t.next->attempt, attempt_id(1));
  EXPECT_TRUE(t.has(ActionKind::SendAborted));
  EXPECT_TRUE(t.has(ActionKind::QuitDestinationQemu));
  for (const HandoverState state : kAllStates) {
    if (state == HandoverState::Prepared) continue;
    EXPECT_TRUE(is_inert(step(in_state(state), event::PeerAbort{"limit"}))) << name_of(state);
  }
}

TEST(HandoverPeer, GoIsAnsweredFromTheRecord) {
  const event::GoReceived go{.attempt = attempt_id(1), .term = kAttemptTerm};
  EXPECT_TRUE(is_inert(step(in_state(HandoverState::Prepared), go)));
  EXPECT_THAT(kinds(step(in_state(HandoverState::Primary), go)), ElementsAre(ActionKind::SendPrimary));
  EXPECT_THAT(kinds(step(in_state(HandoverState::Started), go)), ElementsAre(ActionKind::SendStarted));
  EXPECT_THAT(kinds(step(in_state(HandoverState::Running), go)), ElementsAre(ActionKind::SendRunning));
  EXPECT_THAT(kinds(step(in_state(HandoverState::Aborted), go)), ElementsAre(ActionKind::SendAborted));
}

TEST(HandoverPeer, PrimaryOfAHungQemuKillsItAndGivesTheGuestBackOnlyWhenItIsDead) {
  const Ownership primary = in_state(HandoverState::Primary);
  EXPECT_THAT(kinds(step(primary, event::QemuHung{})), ElementsAre(ActionKind::KillQemu));
  const Transition t = step(primary, event::QemuDead{.proved = true, .cont_error_seen = false});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Aborted);
  EXPECT_TRUE(t.has(ActionKind::SendAborted));
}

TEST(HandoverPeer, ContThatSucceededIsDurableBeforeRunningIsSaid) {
  const Transition t = step(in_state(HandoverState::Started), event::ContSucceeded{});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Running);
  EXPECT_THAT(kinds(t), ElementsAre(ActionKind::SendRunning, ActionKind::RoleChanged));
}

// A daemon killed between Started and `cont` must not leave the guest paused for ever.
TEST(HandoverPeer, StartedWithAPausedQemuContinuesItAgain) {
  const Transition t = step(in_state(HandoverState::Started), event::QemuStillPaused{});
  EXPECT_FALSE(t.next);
  EXPECT_THAT(kinds(t), ElementsAre(ActionKind::AcceptWrites, ActionKind::ContGuest));
}

TEST(HandoverPeer, HigherTermEndsPreparedWithAnAborted) {
  const Transition t = step(in_state(HandoverState::Prepared), event::HigherTermSeen{kAttemptTerm + 1});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Aborted);
  EXPECT_EQ(t.next->attempt, attempt_id(1));
  EXPECT_TRUE(t.has(ActionKind::SendAborted));
  EXPECT_TRUE(is_inert(step(in_state(HandoverState::Prepared), event::HigherTermSeen{kAttemptTerm})));
}

TEST(HandoverPeer, HigherTermSupersedesAndIsSplitBrainOnlyIfTheGuestRan) {
  for (const HandoverState state : {HandoverState::Primary, HandoverState::Started, HandoverState::Running}) {
    const Transition t = step(in_state(state), event::HigherTermSeen{kAttemptTerm + 1});
    ASSERT_TRUE(t.next) << name_of(state);
    EXPECT_EQ(t.next->state, HandoverState::Superseded);
    EXPECT_EQ(t.next->split_brain, state != HandoverState::Primary) << name_of(state);
    EXPECT_TRUE(t.has(ActionKind::FenceVolumes));
    EXPECT_TRUE(t.has(ActionKind::StopQemu));
  }
}

TEST(HandoverPeer, RunHereByForceNeedsTheWordAndRunsOnlyAWholeGuest) {
  event::ResolveAsked resolve{.choice = ResolveChoice::RunHere,
                              .force = false,
                              .new_attempt = attempt_id(5),
                              .qemu_dead = false,
                              .memory_complete = false,
                              .peer_term = 0};
  for (const HandoverState state : {HandoverState::Prepared, HandoverState::Aborted, HandoverState::Primary}) {
    resolve.force = false;
    EXPECT_TRUE(step(in_state(state), resolve).refused()) << name_of(state);
    resolve.force = true;
    const Transition t = step(in_state(state), resolve);
    ASSERT_TRUE(t.next) << name_of(state);
    EXPECT_EQ(t.next->state, HandoverState::Running);
    EXPECT_TRUE(t.next->forced);
    EXPECT_GT(t.next->term, kAttemptTerm);
    EXPECT_EQ(t.next->attempt, attempt_id(1)) << "the source asks about this attempt";
    EXPECT_EQ(t.has(ActionKind::ContGuest), state == HandoverState::Primary) << name_of(state);
  }
  resolve.memory_complete = true;
  EXPECT_TRUE(step(in_state(HandoverState::Prepared), resolve).has(ActionKind::ContGuest));
}

// Writes accepted here exist nowhere else.
TEST(HandoverPeer, RunAtPeerNeverDropsWritesThatWereAccepted) {
  event::ResolveAsked resolve{.choice = ResolveChoice::RunAtPeer,
                              .force = true,
                              .new_attempt = attempt_id(5),
                              .qemu_dead = true,
                              .memory_complete = false,
                              .peer_term = 0};
  Ownership started = in_state(HandoverState::Started);
  ASSERT_TRUE(step(started, resolve).next);
  EXPECT_EQ(step(started, resolve).next->state, HandoverState::Aborted);
  started.wrote = true;
  EXPECT_TRUE(step(started, resolve).refused());
  EXPECT_TRUE(step(in_state(HandoverState::Running), resolve).refused());
}

}  // namespace
}  // namespace vmferry
