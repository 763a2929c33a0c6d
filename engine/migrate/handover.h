// SPDX-License-Identifier: Apache-2.0
//
// The decision who may run a group, as a pure function: state and event in, next state and actions out.
//
// Flow: HandoverCoordinator gathers facts, calls step(), makes `next` durable and only then carries out the actions
// (I5). The table is docs/migration.md; a pair that is not in it changes nothing. No I/O and no time in here, so that
// tests can try every state with every event.
// Threads: pure.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/migrate/handover_events.h"

namespace vmferry {

enum class ActionKind : uint8_t {
  // source
  SendPrepare,
  StartMemory,      // `migrate` as soon as the peer is prepared
  SendFenceNotice,  // the peer counts its limit from here (H10)
  SendLastEpoch,    // drain, seal, send
  MigrateContinue,
  SendGo,
  ResendLastEpochAndTail,
  UnfenceApplyParked,
  FailParked,  // and refuse writes from here on
  QuitSourceQemu,
  SendAborted,    // source: names the higher term; peer: the durable no
  ResumeGuest,    // by QEMU's state, repeated until seen running (H4)
  MigrateCancel,  // and read the state again
  Cont,           // of the source's guest
  ReportRolledBack,
  ReportHandedOver,
  // peer
  SendPrepared,
  StartIncoming,  // `migrate-incoming`, then the memory sink
  SendPrimary,
  CheckStillPaused,  // leads to Started
  AcceptWrites,
  SendStarted,
  ContGuest,  // the destination's, or leave it paused when it was paused at the source
  SendRunning,
  SendUnknownAttempt,
  QuitDestinationQemu,  // H12: it can never be reused
  KillQemu,
  DiscardIncoming,  // memory sink and facts of the attempt are dropped
  // both
  FenceVolumes,  // refuse writes
  StopQemu,      // H7: the guest may not go on
  ReportSplitBrain,
  ReportSuperseded,
  AskOperator,  // status names `resolve`
  SendPromoteRequest,
  SendPromoteConfirmed,
  SendDemoteNotice,
  RoleChanged,
};

struct Action {
  ActionKind kind;
  Id128 attempt{};  // that a message names; the state's own unless a question about another one is answered
  friend bool operator==(const Action&, const Action&) = default;
};

struct Transition {
  std::optional<Ownership> next;  // must be durable before any action; nullopt: nothing changes
  std::vector<Action> actions;
  std::string refusal;  // why the event changes nothing, for whoever caused it; "" when it was expected

  bool refused() const { return !refusal.empty(); }
  bool has(ActionKind kind) const;
};

Transition step(const Ownership& current, const HandoverEvent& event);

std::string_view to_string(HandoverState state) noexcept;
std::string_view to_string(Role role) noexcept;
std::string_view to_string(Owner owner) noexcept;
std::string_view to_string(ActionKind kind) noexcept;

// Whether a guest (or any client) may write to the group's volumes in this state.
bool accepts_writes(const Ownership& ownership) noexcept;
// Whether writes wait instead of being refused (Fenced, GoSent).
bool parks_writes(const Ownership& ownership) noexcept;
// Whether the group's guest may run on this host; for `status`.
bool may_run(const Ownership& ownership) noexcept;
// One sentence for `status`: why it may or may not run here, and what the operator can do.
std::string explain(const Ownership& ownership);

PeerOwnership to_peer_ownership(const Ownership& ownership) noexcept;

}  // namespace vmferry
