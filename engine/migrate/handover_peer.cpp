// SPDX-License-Identifier: Apache-2.0
//
// Transition function, peer side: from Secondary through Prepared, Primary and Started to Running, or to Aborted.
#include <algorithm>

#include "engine/migrate/handover_internal.h"

namespace vmferry::handover_detail {

namespace {

Transition abort_here(const Ownership& current, std::string reason) {
  Ownership next = moved(current, HandoverState::Aborted, std::move(reason));
  return go_to(std::move(next), {ActionKind::FenceVolumes, ActionKind::SendAborted, ActionKind::DiscardIncoming,
                                 ActionKind::QuitDestinationQemu});
}

}  // namespace

Transition on(const Ownership& current, const event::PrepareReceived& event) {
  // The same question again after a cut: the same answer, from the record.
  if (event.attempt == current.attempt && event.term == current.term) {
    switch (current.state) {
      case HandoverState::Prepared:
        return stay(current, {ActionKind::SendPrepared});
      case HandoverState::Aborted:
        return stay(current, {ActionKind::SendAborted});
      default:
        break;
    }
  }
  if (current.split_brain) return refuse("split brain: decide with `vmferry resolve` first");
  if (current.state != HandoverState::Secondary && current.state != HandoverState::Prepared &&
      current.state != HandoverState::Aborted)
    return refuse("this side is {} (term {})", to_string(current.state), current.term);
  if (event.term <= current.term) return refuse("term {} is not above ours, {}", event.term, current.term);
  if (event.attempt.is_none()) return refuse("no attempt id");
  if (!event.qemu_fresh)
    return refuse("the destination QEMU is not waiting for its first incoming migration; start a fresh one");
  Ownership next = moved(current, HandoverState::Prepared, "");
  next.term = event.term;
  next.attempt = event.attempt;
  next.qemu = event.qemu;  // H5
  next.qmp_path = event.qmp_path;
  next.capabilities = event.capabilities;
  next.guest_was_running = event.guest_was_running;
  next.detach = event.detach;
  next.quit_source = false;
  next.wrote = false;
  next.forced = false;
  Transition transition;
  // An earlier attempt leaves its sink behind; its QEMU is not this one, which is fresh.
  if (current.state == HandoverState::Prepared)
    transition.actions.push_back({ActionKind::DiscardIncoming, current.attempt});
  transition.actions.push_back({ActionKind::StartIncoming, next.attempt});
  transition.next = std::move(next);
  return transition;
}

Transition on(const Ownership& current, const event::GoReceived& event) {
  if (event.attempt != current.attempt) return answer(ActionKind::SendUnknownAttempt, event.attempt);
  switch (current.state) {
    case HandoverState::Prepared:
      return nothing();  // noted as one of the conditions
    case HandoverState::Primary:
      return stay(current, {ActionKind::SendPrimary});
    case HandoverState::Started:
      return stay(current, {ActionKind::SendStarted});
    case HandoverState::Running:
      return stay(current, {ActionKind::SendRunning});
    case HandoverState::Aborted:
      return stay(current, {ActionKind::SendAborted});
    default:
      return answer(ActionKind::SendUnknownAttempt, event.attempt);
  }
}

Transition on(const Ownership& current, const event::Conditions& event) {
  if (current.state != HandoverState::Prepared) return nothing();
  if (event.attempt != current.attempt) return refuse("conditions of attempt {}", event.attempt.to_string());
  if (!event.epoch_durable || !event.stream_hash_equal || !event.go || !event.qemu_completed_paused) return nothing();
  Ownership next = moved(current, HandoverState::Primary, "");
  next.guest_was_running = event.guest_was_running;
  next.wrote = false;
  return go_to(std::move(next), {ActionKind::SendPrimary, ActionKind::CheckStillPaused});
}

Transition on(const Ownership& current, const event::QemuStillPaused&) {
  switch (current.state) {
    case HandoverState::Primary:
      // H3: Started is durable before the first write is accepted, so a Primary can still go back.
      return go_to(moved(current, HandoverState::Started, ""),
                   {ActionKind::AcceptWrites, ActionKind::ContGuest, ActionKind::SendStarted});
    case HandoverState::Started:
      return stay(current, {ActionKind::AcceptWrites, ActionKind::ContGuest});
    default:
      return nothing();
  }
}

Transition on(const Ownership& current, const event::ContSucceeded&) {
  if (current.state != HandoverState::Started) return nothing();
  return go_to(moved(current, HandoverState::Running, ""), {ActionKind::SendRunning, ActionKind::RoleChanged});
}

Transition on(const Ownership& current, const event::ContFailed& event) {
  if (current.state != HandoverState::Started) return nothing();
  if (!event.reply_seen) {
    Transition transition = stay(current, {ActionKind::AskOperator});
    transition.refusal = "no answer to `cont`: the guest may have run";  // H2
    return transition;
  }
  return stay(current, {ActionKind::KillQemu});
}

Transition on(const Ownership& current, const event::QemuHung&) {
  if (current.state == HandoverState::Prepared) return abort_here(current, "the destination QEMU does not answer");
  if (current.state == HandoverState::Primary) return stay(current, {ActionKind::KillQemu});
  return nothing();
}

Transition on(const Ownership& current, const event::QemuDead& event) {
  switch (current.state) {
    case HandoverState::Prepared:
      return abort_here(current, "the destination QEMU is gone");
    case HandoverState::Primary:
      if (!event.proved) return stay(current, {ActionKind::KillQemu});  // H5: a closed socket proves nothing
      return abort_here(current, "the destination QEMU died before it was started");
    case HandoverState::Started:
      // H2: only when QEMU itself said that it did not start. A write that was accepted has no way back either.
      if (event.proved && event.cont_error_seen && !current.wrote)
        return abort_here(current, "the destination QEMU refused to start the guest");
      return stay(current, {ActionKind::AskOperator});
    case HandoverState::Running:
      return stay(current, {ActionKind::AskOperator});
    default:
      return nothing();
  }
}

Transition on(const Ownership& current, const event::PeerAbort& event) {
  if (current.state != HandoverState::Prepared) return nothing();
  return abort_here(current, event.reason);
}

Transition resolve_on_peer(const Ownership& current, const event::ResolveAsked& event) {
  if (event.choice == ResolveChoice::RunAtPeer) {
    switch (current.state) {
      case HandoverState::Prepared:
        return abort_here(current, "the operator left the guest at the source");
      case HandoverState::Primary:
        return stay(current, {ActionKind::KillQemu});
      case HandoverState::Started:
        if (!event.qemu_dead) return refuse("the guest may be running here; `vmferry migrate` it back instead");
        if (current.wrote) return refuse("this side has the newest writes; run the guest here, or migrate it back");
        return abort_here(current, "the operator gave the guest back after its QEMU had died");
      case HandoverState::Running:
        return refuse("the guest runs here; use `vmferry migrate` or `vmferry demote`");
      default:
        return nothing();  // it is the peer's already
    }
  }
  switch (current.state) {
    case HandoverState::Prepared:
    case HandoverState::Aborted:
    case HandoverState::Primary: {
      if (!event.force) return refuse("the peer may be running the guest; make sure that it is not, then add --force");
      Ownership next = moved(current, HandoverState::Running, "the operator took the volumes over by force");
      next.term = std::max(current.term, event.peer_term) + 1;
      next.forced = true;
      next.wrote = false;
      Transition transition = go_to(next, {ActionKind::AcceptWrites});
      const bool loaded = current.state == HandoverState::Primary ||
                          (current.state == HandoverState::Prepared && event.memory_complete);
      if (loaded) {
        transition.actions.push_back({ActionKind::ContGuest, next.attempt});
      } else if (current.state == HandoverState::Prepared) {
        transition.actions.push_back({ActionKind::DiscardIncoming, next.attempt});
        transition.actions.push_back({ActionKind::QuitDestinationQemu, next.attempt});
      }
      transition.actions.push_back({ActionKind::SendRunning, next.attempt});
      transition.actions.push_back({ActionKind::RoleChanged, next.attempt});
      return transition;
    }
    case HandoverState::Started:
      if (!event.qemu_dead) return nothing();
      return go_to(moved(current, HandoverState::Running, "the operator keeps it here; boot the guest from its disks"),
                   {ActionKind::SendRunning, ActionKind::RoleChanged});
    case HandoverState::Running:
      return nothing();
    case HandoverState::Superseded:
      return refuse("the peer was promoted; choose --discard-local or --discard-peer");
    default:
      return refuse("this side is {}; use `vmferry promote`", to_string(current.state));
  }
}

}  // namespace vmferry::handover_detail
