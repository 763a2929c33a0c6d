// SPDX-License-Identifier: Apache-2.0
//
// The twelve rules of docs/migration.md that each cost a guest or a write when they were missing. Rules that are about
// time or about the daemon's order of work have a second test in coordinator_*_test.cpp.
#include <gmock/gmock.h>

#include "tests/unit/migrate/handover_fixture.h"

namespace vmferry {
namespace {

using testing::ElementsAre;

// The peer in Primary or Started may still prove its QEMU dead and say ABORTED: parked writes have to be there then.
TEST(Handover, H1PrimaryAndStartedChangeNothingAtTheSource) {
  for (const event::Answer answer : {event::Answer::Primary, event::Answer::Started})
    EXPECT_TRUE(is_inert(step(in_state(HandoverState::GoSent), event::PeerAnswered{answer, attempt_id(1), 8, ""})));
}

// A `cont` without an answer, or a QEMU that died after it, may have run the guest: going back would lose its writes.
TEST(Handover, H2OnlyAnErrorReplySeenInThisRunLeadsBackFromStarted) {
  const Ownership started = in_state(HandoverState::Started);
  EXPECT_THAT(kinds(step(started, event::ContFailed{.reply_seen = false})), ElementsAre(ActionKind::AskOperator));
  EXPECT_THAT(kinds(step(started, event::ContFailed{.reply_seen = true})), ElementsAre(ActionKind::KillQemu));

  EXPECT_FALSE(step(started, event::QemuDead{.proved = true, .cont_error_seen = false}).next);
  EXPECT_FALSE(step(started, event::QemuDead{.proved = false, .cont_error_seen = true}).next);
  const Transition t = step(started, event::QemuDead{.proved = true, .cont_error_seen = true});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Aborted);
  EXPECT_FALSE(step(in_state(HandoverState::Running), event::QemuDead{.proved = true, .cont_error_seen = true}).next);

  Ownership wrote = started;
  wrote.wrote = true;
  EXPECT_FALSE(step(wrote, event::QemuDead{.proved = true, .cont_error_seen = true}).next);
}

// A write accepted in Primary is lost when Primary goes back to the source.
TEST(Handover, H3PrimaryAcceptsNoWritesUntilStartedIsDurable) {
  EXPECT_FALSE(accepts_writes(in_state(HandoverState::Primary)));
  const Transition to_primary =
      step(in_state(HandoverState::Prepared), event::Conditions{attempt_id(1), true, true, true, true, true});
  ASSERT_TRUE(to_primary.next);
  EXPECT_FALSE(to_primary.has(ActionKind::AcceptWrites));
  EXPECT_FALSE(to_primary.has(ActionKind::ContGuest));
  const Transition to_started = step(*to_primary.next, event::QemuStillPaused{});
  ASSERT_TRUE(to_started.next);
  EXPECT_EQ(to_started.next->state, HandoverState::Started);
  EXPECT_TRUE(accepts_writes(*to_started.next));
  EXPECT_TRUE(to_started.has(ActionKind::AcceptWrites));
}

// A restarted source that does not know its QEMU can neither cancel nor resume: the guest stays stopped for ever. One
// that resumes a guest that it does not owe undoes the operator's `stop`.
TEST(Handover, H4TheRecordNamesQmpAndOnlyAnOwedResumeIsRepeated) {
  const Transition started = step(in_state(HandoverState::Own), event::Start{.attempt = attempt_id(1),
                                                                             .qmp_path = "/run/a.qmp",
                                                                             .qemu = {},
                                                                             .qemu_reachable = true,
                                                                             .guest_running = true,
                                                                             .detach = false,
                                                                             .quit_source = false});
  ASSERT_TRUE(started.next);
  EXPECT_EQ(started.next->qmp_path, "/run/a.qmp");
  event::ResumeObserved stopped;
  stopped.state.run = RunState::PostMigrate;
  for (const HandoverState state : kAllStates) {
    const Transition t = step(in_state(state), stopped);
    EXPECT_EQ(t.has(ActionKind::Cont), state == HandoverState::AbortedResumeOwed) << name_of(state);
  }
}

// A socket closes when QEMU hangs, is restarted or merely full; its guest may run all the same.
TEST(Handover, H5PrimaryGoesBackOnlyOnProofOfDeath) {
  const Transition unproved =
      step(in_state(HandoverState::Primary), event::QemuDead{.proved = false, .cont_error_seen = false});
  EXPECT_FALSE(unproved.next);
  EXPECT_THAT(kinds(unproved), ElementsAre(ActionKind::KillQemu));
  EXPECT_TRUE(step(in_state(HandoverState::Primary), event::QemuDead{.proved = true, .cont_error_seen = false}).next);
}

// A forced decision that is not told at first contact leaves two owners that both think all is well.
TEST(Handover, H6ForcedDecisionIsToldByTermAtFirstContact) {
  const Transition forced = step(in_state(HandoverState::GoSent), event::ResolveAsked{.choice = ResolveChoice::RunHere,
                                                                                      .force = true,
                                                                                      .new_attempt = attempt_id(5),
                                                                                      .qemu_dead = false,
                                                                                      .memory_complete = false,
                                                                                      .peer_term = 0});
  ASSERT_TRUE(forced.next);
  const PeerOwnership hello = to_peer_ownership(*forced.next);
  EXPECT_TRUE(hello.forced);
  EXPECT_GT(hello.term, kAttemptTerm);
  const Transition at_peer = step(in_state(HandoverState::Running), event::HelloReceived{hello});
  ASSERT_TRUE(at_peer.next);
  EXPECT_EQ(at_peer.next->state, HandoverState::Superseded);
  EXPECT_TRUE(at_peer.next->split_brain);
}

// Volumes that refuse writes do not stop a guest that runs from its memory: it answers clients with a dead disk.
TEST(Handover, H7ASupersededSideStopsItsQemu) {
  const PeerOwnership forced{.role = Role::Primary,
                             .state = HandoverState::Running,
                             .term = 50,
                             .attempt = attempt_id(1),
                             .wrote = true,
                             .forced = true};
  for (const HandoverState state : {HandoverState::Own, HandoverState::Migrating, HandoverState::AbortedResumeOwed,
                                    HandoverState::Started, HandoverState::Running}) {
    Ownership current = in_state(state);
    current.wrote = true;
    const Transition t = step(current, event::HelloReceived{forced});
    ASSERT_TRUE(t.next) << name_of(state);
    EXPECT_TRUE(t.has(ActionKind::StopQemu)) << name_of(state);
    EXPECT_TRUE(t.has(ActionKind::FenceVolumes)) << name_of(state);
    EXPECT_TRUE(t.next->split_brain) << name_of(state);
    EXPECT_FALSE(accepts_writes(*t.next)) << name_of(state);
  }
}

// With the source QEMU dead, the only whole memory of the guest may be the peer's.
TEST(Handover, H8FencedWithADeadQemuWaitsForThePeerOrTheOperator) {
  const Ownership fenced = in_state(HandoverState::Fenced);
  const Transition alone =
      step(fenced, event::SourceAbort{.qemu_dead = true, .operator_spoke = false, .reason = "limit"});
  EXPECT_FALSE(alone.next);
  EXPECT_TRUE(alone.has(ActionKind::AskOperator));
  EXPECT_TRUE(step(fenced, event::SourceAbort{.qemu_dead = true, .operator_spoke = true, .reason = "x"}).next);
  EXPECT_TRUE(step(fenced, event::PeerAnswered{event::Answer::Aborted, attempt_id(1), 8, ""}).next);
}

// A destination QEMU that has seen a stream can never load another one.
TEST(Handover, H9NewAttemptNeedsAFreshDestination) {
  const Transition t = step(in_state(HandoverState::Prepared), event::PrepareReceived{.attempt = attempt_id(2),
                                                                                      .term = kAttemptTerm + 2,
                                                                                      .qemu_fresh = false,
                                                                                      .qemu = {},
                                                                                      .qmp_path = "",
                                                                                      .guest_was_running = true});
  EXPECT_TRUE(t.refused());
  EXPECT_FALSE(t.next);
}

// Counted from PREPARE the limit would end every migration whose memory takes longer; the coordinator's clock starts at
// the fence notice, which the source sends with its fence.
TEST(Handover, H10FenceNoticeLeavesWithTheFence) {
  const Transition t =
      step(in_state(HandoverState::Migrating), event::SwitchoverReached{attempt_id(1), true, true, true});
  ASSERT_FALSE(t.actions.empty());
  EXPECT_EQ(t.actions.front().kind, ActionKind::SendFenceNotice);
  EXPECT_FALSE(step(in_state(HandoverState::Own), event::Start{}).has(ActionKind::SendFenceNotice));
}

// A peer that forgets its no answers the source's question with "unknown", and a source that takes "unknown" for a no
// runs a guest that a lost state directory may have let run at the peer.
TEST(Handover, H11AbortedIsKeptUntilAHigherTermAndUnknownIsNoAborted) {
  const Ownership aborted = in_state(HandoverState::Aborted);
  const auto hello_of = [](HandoverState state, uint64_t term) {
    Ownership source = in_state(state);
    source.term = term;
    return event::HelloReceived{to_peer_ownership(source)};
  };
  EXPECT_TRUE(is_inert(step(aborted, hello_of(HandoverState::GoSent, kAttemptTerm))));
  EXPECT_TRUE(is_inert(step(aborted, hello_of(HandoverState::Own, kOwnTerm))));
  const Transition later = step(aborted, hello_of(HandoverState::AbortedResumeOwed, kAttemptTerm + 1));
  ASSERT_TRUE(later.next);
  EXPECT_EQ(later.next->state, HandoverState::Secondary);
  EXPECT_EQ(later.next->term, kAttemptTerm + 1);

  const Transition unknown =
      step(in_state(HandoverState::GoSent), event::PeerAnswered{event::Answer::UnknownAttempt, attempt_id(1), 0, ""});
  EXPECT_FALSE(unknown.next);
  EXPECT_THAT(kinds(unknown), ElementsAre(ActionKind::AskOperator));
  for (const HandoverState state : kAllStates) {
    const Transition t = step(in_state(state), event::GoReceived{.attempt = attempt_id(77), .term = 1});
    ASSERT_EQ(t.actions.size(), 1U) << name_of(state);
    EXPECT_EQ(t.actions[0], (Action{ActionKind::SendUnknownAttempt, attempt_id(77)})) << name_of(state);
  }
}

// A destination QEMU left over after an abort is one `cont` away from being the second guest.
TEST(Handover, H12AbortedQuitsTheDestinationQemu) {
  const Ownership prepared = in_state(HandoverState::Prepared);
  EXPECT_TRUE(step(prepared, event::PeerAbort{"limit"}).has(ActionKind::QuitDestinationQemu));
  EXPECT_TRUE(step(prepared, event::HigherTermSeen{99}).has(ActionKind::QuitDestinationQemu));
  EXPECT_TRUE(step(prepared, event::QemuDead{}).has(ActionKind::QuitDestinationQemu));
  EXPECT_TRUE(step(prepared, event::QemuHung{}).has(ActionKind::QuitDestinationQemu));
}

}  // namespace
}  // namespace vmferry
