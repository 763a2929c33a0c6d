// SPDX-License-Identifier: Apache-2.0
//
// Every state with every event and every combination of the event's facts.
//
// A pair that the table does not name must not create an owner. The rule checked is written down here a second time, as
// the list of doors through which ownership may enter a side, independently of how step() is organised.
#include <gtest/gtest.h>

#include "tests/unit/migrate/handover_fixture.h"

namespace vmferry {
namespace {

constexpr std::array kBools = {false, true};

std::vector<Id128> some_attempts() {
  return {attempt_id(1), attempt_id(2), Id128{}};
}

std::vector<HandoverEvent> all_events() {
  std::vector<HandoverEvent> events;
  for (const Id128& attempt : some_attempts()) {
    for (const uint64_t term : {uint64_t{0}, kOwnTerm, kAttemptTerm, kAttemptTerm + 1, kAttemptTerm + 9}) {
      for (const bool x : kBools) {
        events.push_back(event::PrepareReceived{attempt, term, x, {}, "", true});
        for (const bool y : kBools) {
          events.push_back(event::FenceConfirmed{attempt, term, x, y});
          events.push_back(event::PromoteRequestReceived{attempt, term, x, y});
        }
      }
      events.push_back(event::GoReceived{attempt, term});
      for (const event::Answer answer : {event::Answer::Primary, event::Answer::Started, event::Answer::Running,
                                         event::Answer::Aborted, event::Answer::UnknownAttempt})
        events.push_back(event::PeerAnswered{answer, attempt, term, ""});
      for (const HandoverState state : kAllStates) {
        for (const bool wrote : kBools) {
          for (const bool forced : kBools) {
            PeerOwnership peer = to_peer_ownership(in_state(state));
            peer.term = term;
            peer.attempt = attempt;
            peer.wrote = wrote;
            peer.forced = forced;
            events.push_back(event::HelloReceived{peer});
          }
        }
      }
    }
    for (unsigned bits = 0; bits < 32; ++bits) {
      const bool a = (bits & 1) != 0, b = (bits & 2) != 0, c = (bits & 4) != 0, d = (bits & 8) != 0,
                 e = (bits & 16) != 0;
      events.push_back(event::Conditions{attempt, a, b, c, d, e});
      events.push_back(event::PromoteAsked{attempt, a, b, c});
      events.push_back(event::SwitchoverReached{attempt, a, b, c});
      events.push_back(event::Start{attempt, "/q", {}, a, b, c, d});
      for (const ResolveChoice choice :
           {ResolveChoice::RunHere, ResolveChoice::RunAtPeer, ResolveChoice::DiscardLocal, ResolveChoice::DiscardPeer})
        events.push_back(event::ResolveAsked{choice, a, attempt_id(3), b, c, d ? kAttemptTerm + 3 : 0});
    }
  }
  for (const bool a : kBools) {
    for (const bool b : kBools) {
      events.push_back(event::SourceAbort{a, b, "x"});
      events.push_back(event::SourceQemuState{a, b});
      events.push_back(event::QemuDead{a, b});
    }
    events.push_back(event::ContFailed{a});
    events.push_back(event::DemoteAsked{a});
  }
  for (const RunState run : {RunState::Unknown, RunState::Running, RunState::Paused, RunState::InMigrate,
                             RunState::PreMigrate, RunState::PostMigrate, RunState::FinishMigrate, RunState::Other}) {
    for (const MigrationState migration :
         {MigrationState::None, MigrationState::Setup, MigrationState::Active, MigrationState::PreSwitchover,
          MigrationState::Device, MigrationState::Completed, MigrationState::Failed, MigrationState::Cancelling,
          MigrationState::Cancelled, MigrationState::Other}) {
      for (const bool dead : kBools) {
        event::ResumeObserved seen;
        seen.state.run = run;
        seen.state.migration = migration;
        seen.dead = dead;
        events.push_back(seen);
      }
    }
  }
  events.insert(events.end(), {event::Reconnected{}, event::QemuStillPaused{}, event::ContSucceeded{},
                               event::QemuHung{}, event::PeerAbort{"x"}, event::FirstWrite{}, event::Rejoined{},
                               event::HigherTermSeen{kOwnTerm}, event::HigherTermSeen{kAttemptTerm + 5}});
  return events;
}

std::vector<Ownership> all_ownerships() {
  std::vector<Ownership> all;
  for (const HandoverState state : kAllStates) {
    for (unsigned bits = 0; bits < 8; ++bits) {
      Ownership ownership = in_state(state);
      ownership.wrote = (bits & 1) != 0;
      ownership.split_brain = (bits & 2) != 0;
      ownership.guest_was_running = (bits & 4) != 0;
      all.push_back(ownership);
    }
  }
  return all;
}

// The only ways in which a side that may not run the guest becomes one that may.
bool is_door(const Ownership& from, const HandoverEvent& event) {
  if (const auto* answered = std::get_if<event::PeerAnswered>(&event))
    return parks_writes(from) && answered->answer == event::Answer::Aborted && answered->attempt == from.attempt;
  if (const auto* abort = std::get_if<event::SourceAbort>(&event))
    return from.state == HandoverState::Fenced && (!abort->qemu_dead || abort->operator_spoke);
  if (std::holds_alternative<event::QemuStillPaused>(event)) return from.state == HandoverState::Primary;
  if (const auto* resolve = std::get_if<event::ResolveAsked>(&event)) {
    if (resolve->choice == ResolveChoice::RunHere)
      return resolve->force || from.state == HandoverState::Fenced;  // before GO nobody else can run it
    return resolve->choice == ResolveChoice::DiscardPeer &&
           (from.split_brain || from.state == HandoverState::Superseded);
  }
  if (const auto* promote = std::get_if<event::PromoteAsked>(&event)) return promote->force;
  if (const auto* fence = std::get_if<event::FenceConfirmed>(&event)) return fence->term > from.term;
  return false;
}

// One unexpected pair that lets ownership in is a second running guest.
TEST(HandoverProduct, OwnershipEntersOnlyThroughTheKnownDoors) {
  const std::vector<HandoverEvent> events = all_events();
  size_t entered = 0;
  for (const Ownership& from : all_ownerships()) {
    for (size_t i = 0; i < events.size(); ++i) {
      const Transition t = step(from, events[i]);
      const Ownership& to = t.next ? *t.next : from;
      if (!may_run(from) && may_run(to)) {
        ++entered;
        EXPECT_TRUE(is_door(from, events[i]))
            << name_of(from.state) << " to " << name_of(to.state) << ", event " << i << " kind " << events[i].index();
      }
    }
  }
  EXPECT_GT(entered, 100U);
}

TEST(HandoverProduct, RecordsStayConsistentInThemselves) {
  const std::vector<HandoverEvent> events = all_events();
  for (const Ownership& from : all_ownerships()) {
    for (size_t i = 0; i < events.size(); ++i) {
      const Transition t = step(from, events[i]);
      if (!t.next) continue;
      const Ownership& to = *t.next;
      const std::string where = name_of(from.state) + " to " + name_of(to.state) + ", event " + std::to_string(i);
      EXPECT_GE(to.term, from.term) << where;
      EXPECT_EQ(to.role == Role::Primary, in_state(to.state).role == Role::Primary) << where;
      EXPECT_TRUE(!may_run(to) || to.owner == Owner::Self) << where;
      EXPECT_FALSE(t.refused()) << where;
      // Only an actual change of what this side may do is worth a durable write; a pure repetition is not.
      EXPECT_TRUE(to.state != from.state || to.term != from.term || to.split_brain != from.split_brain ||
                  to.wrote != from.wrote || to.attempt != from.attempt)
          << where;
    }
  }
}

// An action that lets a guest or a write through must fit the state that is durable before it.
TEST(HandoverProduct, ActionsFitTheStateTheyFollow) {
  const std::vector<HandoverEvent> events = all_events();
  for (const Ownership& from : all_ownerships()) {
    for (size_t i = 0; i < events.size(); ++i) {
      const Transition t = step(from, events[i]);
      const Ownership& to = t.next ? *t.next : from;
      const std::string where = name_of(from.state) + " to " + name_of(to.state) + ", event " + std::to_string(i);
      const bool lets_through = t.has(ActionKind::AcceptWrites) || t.has(ActionKind::UnfenceApplyParked) ||
                                t.has(ActionKind::ContGuest) || t.has(ActionKind::Cont) ||
                                t.has(ActionKind::ResumeGuest);
      const bool holds_back = t.has(ActionKind::FailParked) || t.has(ActionKind::FenceVolumes);
      EXPECT_TRUE(!lets_through || may_run(to)) << where;
      EXPECT_TRUE(!holds_back || !accepts_writes(to)) << where;
      EXPECT_TRUE(!t.has(ActionKind::SendGo) || to.state == HandoverState::GoSent) << where;
      EXPECT_TRUE(!t.has(ActionKind::SendRunning) || to.state == HandoverState::Running) << where;
      EXPECT_TRUE(!t.has(ActionKind::SendAborted) || to.state == HandoverState::Aborted ||
                  to.state == HandoverState::AbortedResumeOwed)
          << where;
      if (may_run(from) && !may_run(to)) {
        EXPECT_TRUE(t.has(ActionKind::FenceVolumes) || t.has(ActionKind::SendLastEpoch)) << where;
      }
    }
  }
}

// In doubt, only the peer's no, its RUNNING, a forced peer's hello or the operator changes anything.
TEST(HandoverProduct, GoSentIsLeftOnlyByAWord) {
  for (const HandoverEvent& event : all_events()) {
    const Transition t = step(in_state(HandoverState::GoSent), event);
    if (!t.next) continue;
    EXPECT_TRUE(
        std::holds_alternative<event::PeerAnswered>(event) || std::holds_alternative<event::HelloReceived>(event) ||
        std::holds_alternative<event::HigherTermSeen>(event) || std::holds_alternative<event::ResolveAsked>(event))
        << event.index();
  }
}

TEST(HandoverProduct, EveryStateHasANameAndAnExplanation) {
  for (const Ownership& ownership : all_ownerships()) {
    EXPECT_NE(to_string(ownership.state), "invalid");
    EXPECT_FALSE(explain(ownership).empty());
  }
}

}  // namespace
}  // namespace vmferry
