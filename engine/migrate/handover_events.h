// SPDX-License-Identifier: Apache-2.0
//
// Everything that can happen to the ownership of a group, as values: the events of docs/migration.md, each with the
// facts that its guards need. The coordinator gathers facts and makes events; handover.h decides.
// Threads: values.
#pragma once

#include <string>
#include <string_view>
#include <variant>

#include "engine/migrate/ownership.h"

namespace vmferry {

// What the peer says about itself first on every connection (H6).
struct PeerOwnership {
  Role role = Role::Secondary;
  HandoverState state = HandoverState::Secondary;
  uint64_t term = 0;
  Id128 attempt{};
  bool wrote = false;
  bool forced = false;
  bool split_brain = false;
};

enum class ResolveChoice : uint8_t { RunHere, RunAtPeer, DiscardLocal, DiscardPeer };

namespace event {

// ---- source side

// The operator's `migrate`: bulk and converge are over, memory is about to move.
struct Start {
  Id128 attempt{};  // new
  std::string qmp_path;
  ProcessIdentity qemu;
  bool qemu_reachable = false;
  bool guest_running = false;
  bool detach = false;
  bool quit_source = false;
  std::string capabilities{};  // of the QEMU there, now
};
// The peer answered PREPARED and QEMU is at pre-switchover: the guest is stopped.
struct SwitchoverReached {
  Id128 attempt{};
  bool peer_prepared = false;
  bool same_run = false;  // this daemon has not restarted since Start: it still holds the stream
  bool guest_was_running = true;
};
// The migration is given up at the source: limit, cancel, too early, QEMU failed, restart of the daemon.
struct SourceAbort {
  bool qemu_dead = false;       // proved
  bool operator_spoke = false;  // `resolve` (H8); a cancel is no word about a dead QEMU
  std::string reason;
};
struct SourceQemuState {
  bool completed = false;    // query-migrate
  bool postmigrate = false;  // query-status
};
struct Reconnected {};
enum class Answer : uint8_t { Primary, Started, Running, Aborted, UnknownAttempt };
struct PeerAnswered {
  Answer answer = Answer::UnknownAttempt;
  Id128 attempt{};
  uint64_t term = 0;
  std::string reason;
};
// What QEMU says while a resume is owed.
struct ResumeObserved {
  QemuState state;
  bool dead = false;  // proved; `state` means nothing then
};

// ---- peer side

struct PrepareReceived {
  Id128 attempt{};
  uint64_t term = 0;
  bool qemu_fresh = false;  // inmigrate, never used
  ProcessIdentity qemu;
  std::string qmp_path;  // our own for this volume; a path never comes from the other side
  bool guest_was_running = true;
  bool detach = false;         // the source will not follow
  std::string capabilities{};  // of the QEMU there, now
};
struct GoReceived {
  Id128 attempt{};
  uint64_t term = 0;
};
struct Conditions {
  Id128 attempt{};
  bool epoch_durable = false;
  bool stream_hash_equal = false;
  bool go = false;
  bool qemu_completed_paused = false;
  bool guest_was_running = true;
};
struct QemuStillPaused {};  // seen after Primary became durable, or after a restart
struct ContSucceeded {};    // or QEMU was seen running after a restart
struct ContFailed {
  bool reply_seen = false;  // QEMU answered `cont` with an error, in this run of the daemon (H2)
};
struct QemuHung {};
struct QemuDead {
  bool proved = false;           // pidfd or recorded identity; a closed socket is no proof (H5)
  bool cont_error_seen = false;  // the kill followed an error reply to `cont` (H2)
};
// A condition is missing for too long (H10), QEMU failed, wrong hash, restart without the stream.
struct PeerAbort {
  std::string reason;
};

// ---- both

struct HelloReceived {
  PeerOwnership peer;
};
// The other side named a higher term outside a hello: its ABORTED after it took the group back.
struct HigherTermSeen {
  uint64_t term = 0;
};
// `promote`: asked by the operator here.
struct PromoteAsked {
  Id128 attempt{};  // new
  bool force = false;
  bool consistent = true;  // the image is a whole epoch
  bool accept_inconsistent = false;
  uint64_t peer_term = 0;  // highest term that the peer was heard to have, 0 if none
};
// The other side, or a configured fencing hook, says that it is fenced for this promotion.
struct FenceConfirmed {
  Id128 attempt{};
  uint64_t term = 0;
  bool consistent = true;
  bool accept_inconsistent = false;
};
// The peer asks us to fence ourselves. `replicated`: nothing that we acknowledged is missing at the peer.
struct PromoteRequestReceived {
  Id128 attempt{};
  uint64_t term = 0;
  bool guest_running = false;
  bool replicated = false;
};
struct DemoteAsked {
  bool guest_running = false;
};
struct ResolveAsked {
  ResolveChoice choice = ResolveChoice::RunHere;
  bool force = false;
  Id128 new_attempt{};
  bool qemu_dead = false;        // proved
  bool memory_complete = false;  // the destination QEMU loaded a whole stream with the right hash and is paused
  uint64_t peer_term = 0;        // highest term that the peer was heard to have, 0 if none
};
struct FirstWrite {};  // the first guest write of this term was accepted
struct Rejoined {};    // a superseded side without split brain follows the owner's epochs again

}  // namespace event

using HandoverEvent =
    std::variant<event::Start, event::SwitchoverReached, event::SourceAbort, event::SourceQemuState, event::Reconnected,
                 event::PeerAnswered, event::ResumeObserved, event::PrepareReceived, event::GoReceived,
                 event::Conditions, event::QemuStillPaused, event::ContSucceeded, event::ContFailed, event::QemuHung,
                 event::QemuDead, event::PeerAbort, event::HelloReceived, event::HigherTermSeen, event::PromoteAsked,
                 event::FenceConfirmed, event::PromoteRequestReceived, event::DemoteAsked, event::ResolveAsked,
                 event::FirstWrite, event::Rejoined>;

}  // namespace vmferry
