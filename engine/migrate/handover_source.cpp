// SPDX-License-Identifier: Apache-2.0
//
// Transition function, source side: from Own through Migrating, Fenced and GoSent to Secondary, or back.
#include <algorithm>

#include "engine/migrate/handover_internal.h"

namespace vmferry::handover_detail {

namespace {

// The group comes back to the source: a term above everything that the attempt used, so that a late peer is refused.
Ownership taken_back(const Ownership& current, uint64_t peer_term, std::string reason) {
  Ownership next = moved(current, HandoverState::AbortedResumeOwed, std::move(reason));
  next.term = std::max(current.term, peer_term) + 1;
  return next;
}

Transition take_back(const Ownership& current, uint64_t peer_term, std::string reason) {
  return go_to(taken_back(current, peer_term, std::move(reason)),
               {ActionKind::UnfenceApplyParked, ActionKind::SendAborted, ActionKind::ResumeGuest});
}

Transition handed_over(const Ownership& current, uint64_t term) {
  Ownership next = moved(current, HandoverState::Secondary, "");
  next.term = std::max(current.term, term);
  next.wrote = false;
  next.forced = false;
  Transition transition = go_to(next, {ActionKind::FailParked});
  if (current.quit_source) transition.actions.push_back({ActionKind::QuitSourceQemu, next.attempt});
  transition.actions.push_back({ActionKind::ReportHandedOver, next.attempt});
  transition.actions.push_back({ActionKind::RoleChanged, next.attempt});
  return transition;
}

}  // namespace

Transition on(const Ownership& current, const event::Start& event) {
  if (current.split_brain) return refuse("split brain: decide with `vmferry resolve` first");
  if (current.state != HandoverState::Own && current.state != HandoverState::Running)
    return refuse("a migration can start only where the volumes are owned; this side is {}", to_string(current.state));
  if (!event.qemu_reachable) return refuse("QEMU at '{}' does not answer", event.qmp_path);
  if (event.attempt.is_none()) return refuse("a migration needs an attempt id");
  Ownership next = moved(current, HandoverState::Migrating, "");
  next.term = current.term + 1;
  next.attempt = event.attempt;
  next.forced = false;
  next.guest_was_running = event.guest_running;
  next.detach = event.detach;
  next.quit_source = event.quit_source;
  next.qmp_path = event.qmp_path;  // H4
  next.capabilities = event.capabilities;
  next.qemu = event.qemu;
  return go_to(std::move(next), {ActionKind::SendPrepare});
}

Transition on(const Ownership& current, const event::SwitchoverReached& event) {
  if (current.state != HandoverState::Migrating) return nothing();
  if (event.attempt != current.attempt)
    return refuse("switchover of attempt {}, which is not ours", event.attempt.to_string());
  // After a restart the stream is gone: the rest of it could never reach the peer.
  if (!event.same_run) return refuse("this daemon restarted since the migration began");
  if (!event.peer_prepared) return nothing();
  Ownership next = moved(current, HandoverState::Fenced, "");
  next.guest_was_running = event.guest_was_running;
  return go_to(std::move(next), {ActionKind::SendFenceNotice, ActionKind::SendLastEpoch, ActionKind::MigrateContinue});
}

Transition on(const Ownership& current, const event::SourceAbort& event) {
  switch (current.state) {
    case HandoverState::Migrating:
      return take_back(current, 0, event.reason);
    case HandoverState::Fenced: {
      // H8: the only whole copy of the guest's memory may be at the peer; nobody here decides to drop it.
      if (event.qemu_dead && !event.operator_spoke) {
        Transition transition = stay(current, {ActionKind::AskOperator});
        transition.refusal = "the source QEMU is dead while fenced: waiting for the peer's or the operator's word";
        return transition;
      }
      return take_back(current, 0, event.reason);
    }
    case HandoverState::GoSent:
      return refuse("the peer was told to run the guest: only its answer or `vmferry resolve` ends this attempt");
    default:
      return nothing();
  }
}

Transition on(const Ownership& current, const event::SourceQemuState& event) {
  if (current.state != HandoverState::Fenced) return nothing();
  // Both, exactly: before postmigrate QEMU may still run the guest again by itself.
  if (!event.completed || !event.postmigrate) return nothing();
  return go_to(moved(current, HandoverState::GoSent, ""), {ActionKind::SendGo});
}

Transition on(const Ownership& current, const event::Reconnected&) {
  switch (current.state) {
    case HandoverState::Migrating:
      return stay(current, {ActionKind::SendPrepare});
    case HandoverState::Fenced:
      return stay(current, {ActionKind::SendFenceNotice, ActionKind::ResendLastEpochAndTail});
    case HandoverState::GoSent:
      return stay(current, {ActionKind::SendGo, ActionKind::ResendLastEpochAndTail});
    case HandoverState::AbortedResumeOwed:
      return stay(current, {ActionKind::SendAborted});
    default:
      return nothing();
  }
}

Transition on(const Ownership& current, const event::PeerAnswered& event) {
  if (event.attempt != current.attempt) return nothing();  // frames name their attempt; a late one is somebody else's
  switch (current.state) {
    case HandoverState::Migrating:
    case HandoverState::Fenced:
      if (event.answer == event::Answer::Aborted)
        return take_back(current, event.term, "the peer aborted: " + event.reason);
      return nothing();
    case HandoverState::GoSent:
      switch (event.answer) {
        case event::Answer::Aborted:
          return take_back(current, event.term, "the peer aborted: " + event.reason);
        case event::Answer::Running:
          return handed_over(current, event.term);
        case event::Answer::Primary:  // H1: the peer may still prove its QEMU dead and say ABORTED
        case event::Answer::Started:
          return nothing();
        case event::Answer::UnknownAttempt:
          return stay(current, {ActionKind::AskOperator});  // H11
      }
      return nothing();
    default:
      return nothing();
  }
}

Transition on(const Ownership& current, const event::ResumeObserved& event) {
  if (current.state != HandoverState::AbortedResumeOwed) return nothing();
  const auto rolled_back = [&current](std::string reason) {
    Ownership next = moved(current, HandoverState::Own, std::move(reason));
    next.guest_was_running = true;
    return go_to(std::move(next), {ActionKind::ReportRolledBack});
  };
  if (event.dead) return rolled_back("the source QEMU is dead; boot the guest from its disks");
  // First of all the migration has to be over: a guest that runs beside one would be stopped by it again.
  switch (event.state.migration) {
    case MigrationState::Setup:
    case MigrationState::Active:
    case MigrationState::PreSwitchover:
    case MigrationState::Device:
      return stay(current, {ActionKind::MigrateCancel});
    case MigrationState::Cancelling:
      return stay(current, {ActionKind::ResumeGuest});
    default:
      break;
  }
  if (event.state.run == RunState::Running) return rolled_back(current.reason);
  if (event.state.run == RunState::FinishMigrate) return stay(current, {ActionKind::ResumeGuest});
  if (event.state.run == RunState::PostMigrate || event.state.run == RunState::Paused) {
    // A guest that was paused before the migration stays paused.
    if (!current.guest_was_running) return rolled_back(current.reason);
    return stay(current, {ActionKind::Cont});
  }
  return stay(current, {ActionKind::ResumeGuest});
}

Transition resolve_on_source(const Ownership& current, const event::ResolveAsked& event) {
  const bool run_here = event.choice == ResolveChoice::RunHere;
  switch (current.state) {
    case HandoverState::GoSent:
      if (!run_here) return handed_over(current, 0);
      if (!event.force) return refuse("the peer may be running the guest; make sure that it is not, then add --force");
      {
        Ownership next = taken_back(current, event.peer_term, "the operator took the guest back by force");
        next.attempt = event.new_attempt;
        next.forced = true;
        Transition transition = go_to(std::move(next), {ActionKind::UnfenceApplyParked, ActionKind::ResumeGuest});
        // A connection that is up is the first contact: without a word nothing would be said before the next one.
        transition.actions.push_back({ActionKind::SendAborted, current.attempt});
        return transition;
      }
    case HandoverState::Fenced:
      if (run_here)
        return on(current, event::SourceAbort{.qemu_dead = event.qemu_dead,
                                              .operator_spoke = true,
                                              .reason = "the operator took the guest back"});
      if (!event.force)
        return refuse("the peer was never told to run the guest; with --force this side gives it up anyway");
      {
        Transition transition = handed_over(current, 0);
        // Left alone at pre-switchover, QEMU would run the guest again at the next cancel.
        if (!current.quit_source) transition.actions.push_back({ActionKind::QuitSourceQemu, current.attempt});
        return transition;
      }
    default:
      if (run_here) return nothing();  // it is owned here already
      return refuse("this side owns the volumes ({}); use `vmferry migrate` or `vmferry demote`",
                    to_string(current.state));
  }
}

}  // namespace vmferry::handover_detail
