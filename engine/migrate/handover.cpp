// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/handover.h"

#include <algorithm>

#include "engine/migrate/handover_internal.h"

namespace vmferry {

namespace handover_detail {

Ownership moved(const Ownership& current, HandoverState state, std::string reason) {
  Ownership next = current;
  next.state = state;
  next.reason = std::move(reason);
  switch (state) {
    case HandoverState::Own:
    case HandoverState::Migrating:
    case HandoverState::Fenced:
    case HandoverState::AbortedResumeOwed:
    case HandoverState::Primary:
    case HandoverState::Started:
    case HandoverState::Running:
      next.role = Role::Primary;
      next.owner = Owner::Self;
      break;
    case HandoverState::GoSent:
      next.role = Role::Primary;
      next.owner = Owner::Unknown;
      break;
    case HandoverState::Secondary:
    case HandoverState::Prepared:
    case HandoverState::Aborted:
    case HandoverState::Superseded:
      next.role = Role::Secondary;
      next.owner = Owner::Peer;
      break;
  }
  return next;
}

}  // namespace handover_detail

Transition step(const Ownership& current, const HandoverEvent& event) {
  return std::visit([&current](const auto& concrete) { return handover_detail::on(current, concrete); }, event);
}

bool Transition::has(ActionKind kind) const {
  return std::any_of(actions.begin(), actions.end(), [kind](const Action& action) { return action.kind == kind; });
}

bool accepts_writes(const Ownership& ownership) noexcept {
  switch (ownership.state) {
    case HandoverState::Own:
    case HandoverState::Migrating:
    case HandoverState::AbortedResumeOwed:
    case HandoverState::Started:
    case HandoverState::Running:
      return true;
    case HandoverState::Fenced:
    case HandoverState::GoSent:
    case HandoverState::Secondary:
    case HandoverState::Prepared:
    case HandoverState::Primary:
    case HandoverState::Aborted:
    case HandoverState::Superseded:
      return false;
  }
  return false;
}

bool parks_writes(const Ownership& ownership) noexcept {
  return ownership.state == HandoverState::Fenced || ownership.state == HandoverState::GoSent;
}

bool may_run(const Ownership& ownership) noexcept {
  return accepts_writes(ownership);
}

std::string explain(const Ownership& ownership) {
  const std::string detail = ownership.reason.empty() ? "" : ": " + ownership.reason;
  if (ownership.split_brain) {
    return fmt::format(
        "split brain: both sides ran with different writes{}; decide with `vmferry resolve VOLUME "
        "--discard-local` on one side and `--discard-peer` on the other",
        detail);
  }
  switch (ownership.state) {
    case HandoverState::Own:
      return "this side owns the volumes" + detail;
    case HandoverState::Running:
      return "this side owns the volumes and took over the guest" + detail;
    case HandoverState::Migrating:
      return "this side owns the volumes; a migration is under way" + detail;
    case HandoverState::AbortedResumeOwed:
      return "the migration failed; the guest is being resumed here" + detail;
    case HandoverState::Fenced:
      return "the guest is stopped for the switchover; this side still owns it" + detail;
    case HandoverState::GoSent:
      return fmt::format(
          "the peer was told to run the guest and has not answered; this side stays fenced{}. If the peer "
          "is lost for good: `vmferry resolve VOLUME --run-here --force`; if the guest runs there: "
          "`vmferry resolve VOLUME --run-at-peer`",
          detail);
    case HandoverState::Secondary:
      return (ownership.owner == Owner::Unknown ? "no side owns the volumes; `vmferry promote VOLUME` makes this one"
                                                : "the peer owns the volumes") +
             detail;
    case HandoverState::Prepared:
      return "the peer owns the volumes and is migrating to this side" + detail;
    case HandoverState::Aborted:
      return "the peer owns the volumes; the migration to this side failed" + detail;
    case HandoverState::Primary:
      return "this side owns the volumes and is about to start the guest" + detail;
    case HandoverState::Started:
      return fmt::format(
          "this side owns the volumes and has started the guest{}. If its QEMU is dead, boot it here "
          "from its disks",
          detail);
    case HandoverState::Superseded:
      return fmt::format(
          "the peer was promoted with a higher term{}; `vmferry resolve VOLUME --discard-local` makes this "
          "side follow it",
          detail);
  }
  return detail;
}

PeerOwnership to_peer_ownership(const Ownership& ownership) noexcept {
  return {.role = ownership.role,
          .state = ownership.state,
          .term = ownership.term,
          .attempt = ownership.attempt,
          .wrote = ownership.wrote,
          .forced = ownership.forced,
          .split_brain = ownership.split_brain};
}

std::string_view to_string(HandoverState state) noexcept {
  switch (state) {
    case HandoverState::Own:
      return "own";
    case HandoverState::Migrating:
      return "migrating";
    case HandoverState::Fenced:
      return "fenced";
    case HandoverState::GoSent:
      return "go-sent";
    case HandoverState::AbortedResumeOwed:
      return "aborted-resume-owed";
    case HandoverState::Secondary:
      return "secondary";
    case HandoverState::Prepared:
      return "prepared";
    case HandoverState::Primary:
      return "primary";
    case HandoverState::Started:
      return "started";
    case HandoverState::Running:
      return "running";
    case HandoverState::Aborted:
      return "aborted";
    case HandoverState::Superseded:
      return "superseded";
  }
  return "invalid";
}

std::string_view to_string(Role role) noexcept {
  return role == Role::Primary ? "primary" : "secondary";
}

std::string_view to_string(Owner owner) noexcept {
  switch (owner) {
    case Owner::Self:
      return "self";
    case Owner::Peer:
      return "peer";
    case Owner::Unknown:
      return "unknown";
  }
  return "invalid";
}

std::string_view to_string(ActionKind kind) noexcept {
  switch (kind) {
    case ActionKind::SendPrepare:
      return "send-prepare";
    case ActionKind::StartMemory:
      return "start-memory";
    case ActionKind::SendFenceNotice:
      return "send-fence-notice";
    case ActionKind::SendLastEpoch:
      return "send-last-epoch";
    case ActionKind::MigrateContinue:
      return "migrate-continue";
    case ActionKind::SendGo:
      return "send-go";
    case ActionKind::ResendLastEpochAndTail:
      return "resend-last-epoch-and-tail";
    case ActionKind::UnfenceApplyParked:
      return "unfence-apply-parked";
    case ActionKind::FailParked:
      return "fail-parked";
    case ActionKind::QuitSourceQemu:
      return "quit-source-qemu";
    case ActionKind::SendAborted:
      return "send-aborted";
    case ActionKind::ResumeGuest:
      return "resume-guest";
    case ActionKind::MigrateCancel:
      return "migrate-cancel";
    case ActionKind::Cont:
      return "cont";
    case ActionKind::ReportRolledBack:
      return "report-rolled-back";
    case ActionKind::ReportHandedOver:
      return "report-handed-over";
    case ActionKind::SendPrepared:
      return "send-prepared";
    case ActionKind::StartIncoming:
      return "start-incoming";
    case ActionKind::SendPrimary:
      return "send-primary";
    case ActionKind::CheckStillPaused:
      return "check-still-paused";
    case ActionKind::AcceptWrites:
      return "accept-writes";
    case ActionKind::SendStarted:
      return "send-started";
    case ActionKind::ContGuest:
      return "cont-guest";
    case ActionKind::SendRunning:
      return "send-running";
    case ActionKind::SendUnknownAttempt:
      return "send-unknown-attempt";
    case ActionKind::QuitDestinationQemu:
      return "quit-destination-qemu";
    case ActionKind::KillQemu:
      return "kill-qemu";
    case ActionKind::DiscardIncoming:
      return "discard-incoming";
    case ActionKind::FenceVolumes:
      return "fence-volumes";
    case ActionKind::StopQemu:
      return "stop-qemu";
    case ActionKind::ReportSplitBrain:
      return "report-split-brain";
    case ActionKind::ReportSuperseded:
      return "report-superseded";
    case ActionKind::AskOperator:
      return "ask-operator";
    case ActionKind::SendPromoteRequest:
      return "send-promote-request";
    case ActionKind::SendPromoteConfirmed:
      return "send-promote-confirmed";
    case ActionKind::SendDemoteNotice:
      return "send-demote-notice";
    case ActionKind::RoleChanged:
      return "role-changed";
  }
  return "invalid";
}

}  // namespace vmferry
