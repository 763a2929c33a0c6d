// SPDX-License-Identifier: Apache-2.0
//
// Transition function, where the two sides compare themselves: hellos and higher terms (H6, H7), promotion without a
// migration, and the operator's decisions.
#include <algorithm>

#include "engine/migrate/handover_internal.h"

namespace vmferry::handover_detail {

// In handover_source.cpp and handover_peer.cpp.
Transition resolve_on_source(const Ownership& current, const event::ResolveAsked& event);
Transition resolve_on_peer(const Ownership& current, const event::ResolveAsked& event);

namespace {

bool is_in_doubt(HandoverState state) {
  return state == HandoverState::Fenced || state == HandoverState::GoSent;
}

// Whether this side changed something that the other cannot know of: its guest ran, or it wrote.
bool ran_or_wrote(HandoverState state, bool wrote) {
  switch (state) {
    case HandoverState::Started:
    case HandoverState::Running:
    case HandoverState::Migrating:
    case HandoverState::AbortedResumeOwed:
      return true;
    default:
      return wrote;
  }
}

// A side that claims the group has a higher term than ours.
Transition yield_to(const Ownership& current, const PeerOwnership& peer) {
  switch (current.state) {
    case HandoverState::Prepared: {
      Ownership next = moved(current, HandoverState::Aborted, "the peer has a higher term");
      return go_to(std::move(next),
                   {ActionKind::SendAborted, ActionKind::DiscardIncoming, ActionKind::QuitDestinationQemu});
    }
    case HandoverState::Secondary:
    case HandoverState::Aborted:
    case HandoverState::Superseded: {
      // The term of an attempt under way arrives with its PREPARE, which must find ours below it.
      if (peer.state == HandoverState::Migrating || is_in_doubt(peer.state)) return nothing();
      // H11: the durable no may be forgotten now, because its asker has moved on to a higher term.
      const HandoverState state =
          current.state == HandoverState::Superseded ? HandoverState::Superseded : HandoverState::Secondary;
      Ownership next = moved(current, state, state == HandoverState::Superseded ? current.reason : "");
      next.term = peer.term;
      return go_to(std::move(next), {});
    }
    case HandoverState::GoSent:
      // The same attempt with a higher term was forced at the peer: the answer to GO says so.
      if (peer.attempt == current.attempt) return nothing();
      [[fallthrough]];
    default: {
      Ownership next = moved(current, HandoverState::Superseded, fmt::format("the peer has term {}", peer.term));
      next.term = peer.term;
      next.split_brain = ran_or_wrote(current.state, current.wrote) && ran_or_wrote(peer.state, peer.wrote);
      Transition transition = go_to(next, {ActionKind::FenceVolumes, ActionKind::StopQemu, ActionKind::RoleChanged});
      if (is_in_doubt(current.state))
        transition.actions.insert(transition.actions.begin(), {ActionKind::FailParked, next.attempt});
      if (current.state == HandoverState::Primary)
        transition.actions.push_back({ActionKind::DiscardIncoming, next.attempt});
      transition.actions.push_back(
          {next.split_brain ? ActionKind::ReportSplitBrain : ActionKind::ReportSuperseded, next.attempt});
      return transition;
    }
  }
}

Transition equal_terms(const Ownership& current, const PeerOwnership& peer) {
  if (current.role != Role::Primary || peer.role != Role::Primary) return nothing();
  if (is_in_doubt(current.state) || is_in_doubt(peer.state)) {
    // GoSent here and Primary..Running there is the middle of a handover, when the attempt is the same.
    if (peer.attempt == current.attempt) return nothing();
  } else if (current.attempt.is_none() && peer.attempt.is_none()) {
    return refuse("both sides are primary and have never been related; `vmferry demote` one of them");
  }
  Ownership next = moved(current, HandoverState::Superseded, "both sides took over with the same term");
  next.split_brain = true;
  Transition transition = go_to(
      next, {ActionKind::FenceVolumes, ActionKind::StopQemu, ActionKind::ReportSplitBrain, ActionKind::RoleChanged});
  if (is_in_doubt(current.state))
    transition.actions.insert(transition.actions.begin(), {ActionKind::FailParked, next.attempt});
  return transition;
}

Transition peer_is_behind(const Ownership& current, const PeerOwnership& peer) {
  if (peer.role == Role::Primary && current.role == Role::Secondary)
    return refuse("the peer claims the volumes with term {}, which is behind ours, {}", peer.term, current.term);
  if (peer.role != Role::Primary || current.role != Role::Primary) return nothing();
  if (current.split_brain) return nothing();
  if (!ran_or_wrote(current.state, current.wrote) || !ran_or_wrote(peer.state, peer.wrote)) return nothing();
  // The other side fences itself; here it must not be overwritten before the operator has looked.
  Ownership next = current;
  next.split_brain = true;
  next.reason = "the peer wrote too, before it was superseded";
  return go_to(std::move(next), {ActionKind::ReportSplitBrain});
}

}  // namespace

Transition on(const Ownership& current, const event::HelloReceived& event) {
  const PeerOwnership& peer = event.peer;
  // The loser's operator has discarded its writes: nothing is left to decide here.
  if (current.split_brain && current.role == Role::Primary && peer.state == HandoverState::Secondary &&
      peer.term <= current.term) {
    Ownership next = current;
    next.split_brain = false;
    next.reason = "";
    return go_to(std::move(next), {});
  }
  // Hellos cross: the owner may have noticed a write of its own between saying hello and hearing ours.
  const bool one_yielded = current.state == HandoverState::Superseded || peer.state == HandoverState::Superseded;
  if (one_yielded && !current.split_brain && peer.split_brain && peer.term == current.term) {
    Ownership next = current;
    next.split_brain = true;
    return go_to(std::move(next), {ActionKind::ReportSplitBrain});
  }
  if (peer.term > current.term) {
    if (peer.role == Role::Primary) return yield_to(current, peer);
    if (current.role == Role::Primary)
      return refuse("the peer, a secondary, has seen term {}, above ours, {}: this side lost its state", peer.term,
                    current.term);
    return nothing();
  }
  if (peer.term == current.term) return equal_terms(current, peer);
  return peer_is_behind(current, peer);
}

Transition on(const Ownership& current, const event::HigherTermSeen& event) {
  if (event.term <= current.term) return nothing();
  return yield_to(current, {.role = Role::Primary,
                            .state = HandoverState::AbortedResumeOwed,
                            .term = event.term,
                            .attempt = {},
                            .wrote = false,
                            .forced = false,
                            .split_brain = false});
}

Transition on(const Ownership& current, const event::PromoteAsked& event) {
  if (current.split_brain) return refuse("split brain: decide with `vmferry resolve` first");
  if (current.role == Role::Primary) return refuse("this side is primary already ({})", to_string(current.state));
  if (current.state == HandoverState::Prepared)
    return refuse("a migration to this side is under way; `vmferry resolve --run-here --force` if its source is lost");
  if (!event.consistent && !event.accept_inconsistent)
    return refuse("the image here is not a whole epoch; add --accept-inconsistent to promote it anyway");
  if (!event.force) {
    if (current.state == HandoverState::Superseded) return refuse("this side was superseded; `vmferry resolve` first");
    return answer(ActionKind::SendPromoteRequest, event.attempt);
  }
  Ownership next = moved(current, HandoverState::Own, "promoted by force, without the peer's word");
  next.term = std::max(current.term, event.peer_term) + 1;
  next.attempt = event.attempt;
  next.forced = true;
  next.wrote = false;
  return go_to(std::move(next), {ActionKind::AcceptWrites, ActionKind::RoleChanged});
}

Transition on(const Ownership& current, const event::FenceConfirmed& event) {
  if (current.role == Role::Primary) return nothing();
  if (current.state != HandoverState::Secondary && current.state != HandoverState::Aborted)
    return refuse("this side is {} now", to_string(current.state));
  // Anything that happened since the question has moved the term.
  if (event.term <= current.term) return refuse("term {} is not above ours, {}", event.term, current.term);
  if (!event.consistent && !event.accept_inconsistent)
    return refuse("the image here is not a whole epoch; add --accept-inconsistent to promote it anyway");
  Ownership next = moved(current, HandoverState::Own, "");
  next.term = event.term;
  next.attempt = event.attempt;
  next.wrote = false;
  next.forced = false;
  return go_to(std::move(next), {ActionKind::AcceptWrites, ActionKind::RoleChanged});
}

Transition on(const Ownership& current, const event::PromoteRequestReceived& event) {
  if (current.split_brain) return refuse("split brain: decide with `vmferry resolve` first");
  if (current.state == HandoverState::Secondary && event.attempt == current.attempt && event.term == current.term)
    return stay(current, {ActionKind::SendPromoteConfirmed});  // the answer was lost
  if (event.term <= current.term) return refuse("term {} is not above ours, {}", event.term, current.term);
  switch (current.state) {
    case HandoverState::Own:
    case HandoverState::Running:
      if (event.guest_running) return refuse("the guest is running here; migrate it or stop it first");
      if (!event.replicated) return refuse("not everything written here has reached you; wait for in-sync");
      break;
    case HandoverState::Secondary:
    case HandoverState::Aborted:
      if (!event.replicated)
        return refuse(
            "the other side was primary and holds writes that never came here; promote it again, or decide "
            "against them with --force");
      break;
    default:
      return refuse("this side is {}", to_string(current.state));
  }
  const bool was_primary = current.role == Role::Primary;
  Ownership next = moved(current, HandoverState::Secondary, "");
  next.term = event.term;
  next.attempt = event.attempt;
  next.wrote = false;
  next.forced = false;
  Transition transition = go_to(next, {ActionKind::FenceVolumes, ActionKind::SendPromoteConfirmed});
  if (was_primary) transition.actions.push_back({ActionKind::RoleChanged, next.attempt});
  return transition;
}

Transition on(const Ownership& current, const event::DemoteAsked& event) {
  if (current.state == HandoverState::Secondary) return nothing();
  if (current.split_brain) return refuse("split brain: decide with `vmferry resolve` first");
  if (current.state != HandoverState::Own && current.state != HandoverState::Running)
    return refuse("this side is {}; wait for the migration to end", to_string(current.state));
  if (event.guest_running) return refuse("the guest is running here; migrate it or stop it first");
  Ownership next = moved(current, HandoverState::Secondary, "demoted by the operator");
  next.owner = Owner::Unknown;
  next.wrote = false;
  next.forced = false;
  return go_to(std::move(next), {ActionKind::FenceVolumes, ActionKind::SendDemoteNotice, ActionKind::RoleChanged});
}

Transition on(const Ownership& current, const event::ResolveAsked& event) {
  const bool undecided = current.split_brain || current.state == HandoverState::Superseded;
  switch (event.choice) {
    case ResolveChoice::DiscardLocal: {
      if (!undecided) {
        if (current.role == Role::Secondary) return nothing();
        return refuse("there is nothing to discard: this side is {} without split brain", to_string(current.state));
      }
      Ownership next = moved(current, HandoverState::Secondary, "");
      next.split_brain = false;
      next.wrote = false;
      next.forced = false;
      return go_to(std::move(next), {ActionKind::FenceVolumes, ActionKind::StopQemu, ActionKind::RoleChanged});
    }
    case ResolveChoice::DiscardPeer: {
      if (!undecided) {
        // The other side's operator was here first, or there never was anything: the peer follows already.
        if (current.state == HandoverState::Own || current.state == HandoverState::Running) return nothing();
        return refuse("there is nothing to discard: this side is {} without split brain", to_string(current.state));
      }
      Ownership next = moved(current, HandoverState::Own, "the operator chose this side's data");
      next.term = std::max(current.term, event.peer_term) + 1;
      next.attempt = event.new_attempt;
      next.split_brain = false;
      next.forced = true;
      return go_to(std::move(next), {ActionKind::AcceptWrites, ActionKind::Cont, ActionKind::RoleChanged});
    }
    case ResolveChoice::RunHere:
    case ResolveChoice::RunAtPeer:
      break;
  }
  if (current.split_brain) return refuse("split brain: choose --discard-local or --discard-peer");
  switch (current.state) {
    case HandoverState::Own:
    case HandoverState::Migrating:
    case HandoverState::Fenced:
    case HandoverState::GoSent:
    case HandoverState::AbortedResumeOwed:
      return resolve_on_source(current, event);
    default:
      return resolve_on_peer(current, event);
  }
}

Transition on(const Ownership& current, const event::FirstWrite&) {
  if (current.wrote || !accepts_writes(current)) return nothing();
  Ownership next = current;
  next.wrote = true;
  return go_to(std::move(next), {});
}

Transition on(const Ownership& current, const event::Rejoined&) {
  if (current.state != HandoverState::Superseded || current.split_brain) return nothing();
  return go_to(moved(current, HandoverState::Secondary, ""), {ActionKind::RoleChanged});
}

}  // namespace vmferry::handover_detail
