// SPDX-License-Identifier: Apache-2.0
//
// Hellos, promotion, demotion and the operator's decisions.
#include <gmock/gmock.h>

#include "tests/unit/migrate/handover_fixture.h"

namespace vmferry {
namespace {

using testing::ElementsAre;

event::HelloReceived hello_from(const Ownership& peer) {
  return {to_peer_ownership(peer)};
}

// Both sides of every moment of an undisturbed migration meet again after a cut; a hello that changed something here
// would end it.
TEST(HandoverContact, HelloInTheMiddleOfAHandoverChangesNothing) {
  const std::pair<HandoverState, HandoverState> moments[] = {
      {HandoverState::Own, HandoverState::Secondary},      {HandoverState::Migrating, HandoverState::Secondary},
      {HandoverState::Migrating, HandoverState::Prepared}, {HandoverState::Fenced, HandoverState::Prepared},
      {HandoverState::GoSent, HandoverState::Prepared},    {HandoverState::GoSent, HandoverState::Primary},
      {HandoverState::GoSent, HandoverState::Started},     {HandoverState::GoSent, HandoverState::Running},
      {HandoverState::Migrating, HandoverState::Aborted},  {HandoverState::Fenced, HandoverState::Aborted},
      {HandoverState::GoSent, HandoverState::Aborted}};
  for (const auto& [source, peer] : moments) {
    const Transition at_source = step(in_state(source), hello_from(in_state(peer)));
    const Transition at_peer = step(in_state(peer), hello_from(in_state(source)));
    EXPECT_TRUE(is_inert(at_source) && !at_source.refused()) << name_of(source) << " " << name_of(peer);
    EXPECT_TRUE(is_inert(at_peer) && !at_peer.refused()) << name_of(source) << " " << name_of(peer);
  }
}

// The PREPARE that follows a hello must still find a lower term.
TEST(HandoverContact, SecondaryDoesNotAdoptTheTermOfAnAttemptUnderWay) {
  Ownership secondary = in_state(HandoverState::Secondary);
  const Transition hello = step(secondary, hello_from(in_state(HandoverState::Migrating)));
  EXPECT_FALSE(hello.next);
  const Transition t = step(secondary, event::PrepareReceived{.attempt = attempt_id(1),
                                                              .term = kAttemptTerm,
                                                              .qemu_fresh = true,
                                                              .qemu = {},
                                                              .qmp_path = "",
                                                              .guest_was_running = true});
  EXPECT_TRUE(t.next);
}

TEST(HandoverContact, EqualTermsWithDifferentAttemptsAreSplitBrainOnBoth) {
  Ownership here = in_state(HandoverState::Running);
  Ownership there = in_state(HandoverState::Own);
  there.term = here.term;
  there.attempt = attempt_id(9);
  for (const auto& [self, peer] : {std::pair(here, there), std::pair(there, here)}) {
    const Transition t = step(self, hello_from(peer));
    ASSERT_TRUE(t.next);
    EXPECT_EQ(t.next->state, HandoverState::Superseded);
    EXPECT_TRUE(t.next->split_brain);
    EXPECT_TRUE(t.has(ActionKind::StopQemu));
    EXPECT_TRUE(t.has(ActionKind::ReportSplitBrain));
  }
}

// A forced peer that kept its attempt meets a source that aborted the same attempt alone: the terms can be equal.
TEST(HandoverContact, EqualTermsWithTheSameAttemptButTwoOwnersAreSplitBrainToo) {
  Ownership source = in_state(HandoverState::AbortedResumeOwed);
  Ownership peer = in_state(HandoverState::Running);
  peer.term = source.term;
  peer.forced = true;
  const Transition at_source = step(source, hello_from(peer));
  const Transition at_peer = step(peer, hello_from(source));
  ASSERT_TRUE(at_source.next && at_peer.next);
  EXPECT_TRUE(at_source.next->split_brain && at_peer.next->split_brain);
}

TEST(HandoverContact, TwoFreshPrimariesAreRefusedNotFenced) {
  const Transition t = step(in_state(HandoverState::Own), hello_from(in_state(HandoverState::Own)));
  EXPECT_TRUE(t.refused() && is_inert(t));
}

// I5: superseded, but idle: nothing has diverged.
TEST(HandoverContact, IdlePromotionIsNoSplitBrain) {
  Ownership old_primary = in_state(HandoverState::Own);
  old_primary.wrote = true;
  Ownership promoted = in_state(HandoverState::Own);
  promoted.term = 30;
  promoted.attempt = attempt_id(4);
  promoted.forced = true;
  Transition t = step(old_primary, hello_from(promoted));
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Superseded);
  EXPECT_FALSE(t.next->split_brain);
  promoted.wrote = true;
  EXPECT_TRUE(step(old_primary, hello_from(promoted)).next->split_brain);
  const Transition at_winner = step(promoted, hello_from(old_primary));
  ASSERT_TRUE(at_winner.next);
  EXPECT_TRUE(at_winner.next->split_brain);
  EXPECT_EQ(at_winner.next->state, HandoverState::Own) << "the winner keeps running and reports";
}

// A source whose state directory was lost would overwrite a newer copy with term 0.
TEST(HandoverContact, SideThatLostItsStateIsRefusedByBoth) {
  Ownership lost = in_state(HandoverState::Own);
  lost.term = 0;
  const Ownership secondary = in_state(HandoverState::Secondary);
  EXPECT_TRUE(step(lost, hello_from(secondary)).refused());
  EXPECT_TRUE(step(secondary, hello_from(lost)).refused());
}

TEST(HandoverContact, PromotionNeedsThePeersFenceAndAWholeImage) {
  const Ownership secondary = in_state(HandoverState::Secondary);
  const Transition asked = step(secondary, event::PromoteAsked{.attempt = attempt_id(3)});
  EXPECT_FALSE(asked.next);
  EXPECT_EQ(asked.actions.front(), (Action{ActionKind::SendPromoteRequest, attempt_id(3)}));
  EXPECT_TRUE(step(secondary, event::PromoteAsked{attempt_id(3), false, false, false}).refused());

  const Transition t = step(secondary, event::FenceConfirmed{.attempt = attempt_id(3), .term = kOwnTerm + 1});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Own);
  EXPECT_EQ(t.next->term, kOwnTerm + 1);
  EXPECT_THAT(kinds(t), ElementsAre(ActionKind::AcceptWrites, ActionKind::RoleChanged));
  EXPECT_TRUE(step(secondary, event::FenceConfirmed{.attempt = attempt_id(3), .term = kOwnTerm}).refused());
}

TEST(HandoverContact, ConfirmedFenceIsDurableBeforeItIsSaid) {
  const Ownership primary = in_state(HandoverState::Own);
  event::PromoteRequestReceived request{
      .attempt = attempt_id(3), .term = kOwnTerm + 1, .guest_running = false, .replicated = true};
  const Transition t = step(primary, request);
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Secondary);
  EXPECT_EQ(t.next->term, kOwnTerm + 1);
  EXPECT_THAT(kinds(t),
              ElementsAre(ActionKind::FenceVolumes, ActionKind::SendPromoteConfirmed, ActionKind::RoleChanged));
  EXPECT_THAT(kinds(step(*t.next, request)), ElementsAre(ActionKind::SendPromoteConfirmed)) << "the answer was lost";
  request.guest_running = true;
  EXPECT_TRUE(step(primary, request).refused());
  request.guest_running = false;
  request.replicated = false;
  EXPECT_TRUE(step(primary, request).refused());
}

// Two operators at once: each side has confirmed the other's fence, so neither may act on its own confirmation.
TEST(HandoverContact, CrossedPromotionsLeaveNoOwnerRatherThanTwo) {
  Ownership a = in_state(HandoverState::Secondary);
  Ownership b = in_state(HandoverState::Secondary);
  a = *step(a, event::PromoteRequestReceived{attempt_id(2), kOwnTerm + 1, false, true}).next;
  b = *step(b, event::PromoteRequestReceived{attempt_id(1), kOwnTerm + 1, false, true}).next;
  EXPECT_FALSE(step(a, event::FenceConfirmed{.attempt = attempt_id(1), .term = kOwnTerm + 1}).next);
  EXPECT_FALSE(step(b, event::FenceConfirmed{.attempt = attempt_id(2), .term = kOwnTerm + 1}).next);
}

TEST(HandoverContact, ForcedPromotionIsMarkedAndTold) {
  const Transition t = step(in_state(HandoverState::Secondary), event::PromoteAsked{attempt_id(3), true, true, false});
  ASSERT_TRUE(t.next);
  EXPECT_TRUE(t.next->forced);
  EXPECT_GT(t.next->term, kOwnTerm);
  EXPECT_TRUE(step(in_state(HandoverState::Prepared), event::PromoteAsked{attempt_id(3), true, true, false}).refused());
}

TEST(HandoverContact, DemoteNeedsAStoppedGuestAndLeavesNoOwner) {
  EXPECT_TRUE(step(in_state(HandoverState::Own), event::DemoteAsked{true}).refused());
  const Transition t = step(in_state(HandoverState::Own), event::DemoteAsked{false});
  ASSERT_TRUE(t.next);
  EXPECT_EQ(t.next->state, HandoverState::Secondary);
  EXPECT_EQ(t.next->owner, Owner::Unknown);
  EXPECT_TRUE(step(in_state(HandoverState::GoSent), event::DemoteAsked{false}).refused());
}

// A former primary that was demoted without its peer holds the newest writes: the peer must not run an older image.
TEST(HandoverContact, UnsentWritesOfAFormerPrimaryRefuseThePromotion) {
  const Ownership demoted = in_state(HandoverState::Secondary);
  event::PromoteRequestReceived request{
      .attempt = attempt_id(7), .term = demoted.term + 1, .guest_running = false, .replicated = false};
  EXPECT_TRUE(step(demoted, request).refused());
  request.replicated = true;
  EXPECT_TRUE(step(demoted, request).has(ActionKind::SendPromoteConfirmed));
}

TEST(HandoverContact, SplitBrainEndsByOneDiscardOnEachSide) {
  Ownership winner = in_state(HandoverState::Superseded);
  winner.split_brain = true;
  Ownership loser = winner;
  EXPECT_TRUE(step(winner, event::ResolveAsked{.choice = ResolveChoice::RunHere, .force = true}).refused());

  const Transition kept = step(winner, event::ResolveAsked{.choice = ResolveChoice::DiscardPeer,
                                                           .force = false,
                                                           .new_attempt = attempt_id(6),
                                                           .qemu_dead = false,
                                                           .memory_complete = false,
                                                           .peer_term = 40});
  ASSERT_TRUE(kept.next);
  EXPECT_EQ(kept.next->state, HandoverState::Own);
  EXPECT_EQ(kept.next->term, 41U);
  const Transition told = step(loser, hello_from(*kept.next));
  EXPECT_TRUE(!told.next || told.next->split_brain) << "never overwritten without this side's operator";

  const Transition dropped = step(loser, event::ResolveAsked{.choice = ResolveChoice::DiscardLocal});
  ASSERT_TRUE(dropped.next);
  EXPECT_EQ(dropped.next->state, HandoverState::Secondary);
  EXPECT_FALSE(dropped.next->split_brain);
  EXPECT_TRUE(step(in_state(HandoverState::Own), event::ResolveAsked{.choice = ResolveChoice::DiscardLocal}).refused());
  // The winner hears of the loser's decision; its own operator then has nothing left to do.
  const Transition again =
      step(in_state(HandoverState::Own), event::ResolveAsked{.choice = ResolveChoice::DiscardPeer});
  EXPECT_FALSE(again.refused());
  EXPECT_FALSE(again.next);
  EXPECT_TRUE(
      step(in_state(HandoverState::Secondary), event::ResolveAsked{.choice = ResolveChoice::DiscardPeer}).refused());
}

// Hellos cross: what one side learnt from the other's, the other has to learn too.
TEST(HandoverContact, SupersededLearnsOfTheSplitFromTheOwner) {
  const Ownership superseded = in_state(HandoverState::Superseded);
  Ownership owner = in_state(HandoverState::Own);
  owner.term = superseded.term;
  EXPECT_FALSE(step(superseded, hello_from(owner)).next);
  owner.split_brain = true;
  const Transition t = step(superseded, hello_from(owner));
  ASSERT_TRUE(t.next);
  EXPECT_TRUE(t.next->split_brain);
  EXPECT_EQ(t.next->state, HandoverState::Superseded);
  EXPECT_TRUE(t.has(ActionKind::ReportSplitBrain));
}

// Promoted by force below a term that the peer was heard to have, both would own the group and neither yield.
TEST(HandoverContact, ForcedPromotionGoesAboveTheTermThatThePeerWasHeardToHave) {
  const Ownership copy = in_state(HandoverState::Secondary);
  event::PromoteAsked asked{.attempt = attempt_id(5), .force = true, .consistent = true};
  asked.peer_term = copy.term + 3;
  EXPECT_EQ(step(copy, asked).next->term, copy.term + 4);
  asked.peer_term = 0;
  EXPECT_EQ(step(copy, asked).next->term, copy.term + 1);
}

TEST(HandoverContact, WinnerForgetsTheSplitWhenTheLoserFollows) {
  Ownership winner = in_state(HandoverState::Running);
  winner.split_brain = true;
  const Transition t = step(winner, hello_from(in_state(HandoverState::Secondary)));
  ASSERT_TRUE(t.next);
  EXPECT_FALSE(t.next->split_brain);
}

TEST(HandoverContact, FirstWriteIsRecordedOnceAndOnlyByAnOwner) {
  Ownership own = in_state(HandoverState::Own);
  const Transition t = step(own, event::FirstWrite{});
  ASSERT_TRUE(t.next);
  EXPECT_TRUE(t.next->wrote);
  EXPECT_FALSE(step(*t.next, event::FirstWrite{}).next);
  EXPECT_FALSE(step(in_state(HandoverState::GoSent), event::FirstWrite{}).next);
}

TEST(HandoverContact, SupersededFollowsAgainOnlyWithoutSplitBrain) {
  Ownership superseded = in_state(HandoverState::Superseded);
  EXPECT_EQ(step(superseded, event::Rejoined{}).next->state, HandoverState::Secondary);
  superseded.split_brain = true;
  EXPECT_FALSE(step(superseded, event::Rejoined{}).next);
}

}  // namespace
}  // namespace vmferry
