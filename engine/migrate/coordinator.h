// SPDX-License-Identifier: Apache-2.0
//
// Drives one group's ownership on one daemon: gathers facts, asks step() (handover.h), makes the answer durable, then
// acts. Both sides of a migration are this class.
//
// Flow: operator's requests from engine/daemon; messages from GroupChannel via channel_*(); events from Qemu,
// GroupReplication and MemoryCarrier. One event at a time: while a record is being written, later events wait, so
// nothing is decided on a state that is not durable (I5).
// Source of truth: the Ownership last saved. Everything else here is volatile and rebuilt after a restart by resume().
// Threads: the group's executor.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "engine/migrate/handover.h"
#include "engine/migrate/interfaces.h"
#include "engine/migrate/migrate_result.h"
#include "engine/migrate/qemu.h"
#include "engine/replicate/peer_channel.h"
#include "engine/runtime/executor.h"

namespace vmferry {

// Planted faults: tests/sim must find each of them. All false in the daemon.
struct HandoverFaults {
  bool go_before_postmigrate = false;
  bool cont_before_primary_durable = false;
  bool unfence_after_go_without_aborted = false;
  bool fail_parked_on_primary = false;
  bool aborted_forgotten_on_restart = false;
};

struct CoordinatorOptions {
  std::string group;  // for log lines
  // Source: how long the guest may stay fenced before GO, then it is taken back.
  Nanoseconds fenced_limit = 10 * kSecond;
  // Peer: from the fence notice, and from the loss of the connection, until ABORTED (H10).
  Nanoseconds peer_fence_limit = 20 * kSecond;
  Nanoseconds peer_disconnect_limit = 60 * kSecond;
  // Destination QEMU: `completed` and paused after the whole stream, or an answer in Primary.
  Nanoseconds qemu_answer_limit = 10 * kSecond;
  // How long the `migrate` command waits for the peer's word after GO before it reports "unknown".
  Nanoseconds doubt_limit = 120 * kSecond;
  Nanoseconds promote_limit = 30 * kSecond;
  Nanoseconds poll_interval = 100 * kMillisecond;   // of QEMU and of the rounds
  Nanoseconds retry_interval = 200 * kMillisecond;  // records that could not be written, QMP that does not answer
  HandoverFaults faults{};
};

struct MigrateRequest {
  std::string qmp_path;       // "": the volume's own
  uint64_t memory_bytes = 0;  // of the guest, as preflight saw it: to be sent, until QEMU counts what is left
  Nanoseconds downtime_limit = 300 * kMillisecond;
  Nanoseconds timeout = 30 * 60 * kSecond;
  bool detach = false;
  bool quit_source = false;
};

struct PromoteOptions {
  bool force = false;
  bool accept_inconsistent = false;
  bool alone = false;  // there is no peer that could hold the volumes: nobody has to be asked
};

struct CoordinatorEvents {
  // Durable already. Primary: replicate towards the peer (unless detached); Secondary: follow it.
  std::function<void(Role)> role_changed;
  std::function<void(const Ownership&)> ownership_changed;  // every saved record
  std::function<void(MigratePhase)> phase_changed;
  std::function<void(const std::string&)> alert;  // split brain, superseded, waiting for the operator
};

struct CoordinatorImpl;  // coordinator_impl.h

class HandoverCoordinator {
 public:
  // The QEMU behind a QMP path; owned by the caller for the coordinator's whole life; nullptr: no such QEMU.
  using QemuAt = std::function<Qemu*(const std::string& qmp_path)>;

  struct Parts {
    Executor& executor;
    OwnershipStore& store;
    GroupChannel& channel;
    GroupDevices& devices;
    GroupReplication& replication;
    MemoryCarrier& memory;
    QemuAt qemu_at;
    std::string default_qmp_path;
  };

  // `ownership` is what the journal holds. Nothing happens before resume().
  HandoverCoordinator(Parts parts, Ownership ownership, CoordinatorOptions options, CoordinatorEvents events);
  ~HandoverCoordinator();
  HandoverCoordinator(const HandoverCoordinator&) = delete;
  HandoverCoordinator& operator=(const HandoverCoordinator&) = delete;

  // Sets the write gate as the record says, then continues whatever it says was under way. Call once, before the
  // exports open.
  void resume();

  const Ownership& ownership() const;
  // What this side says of itself in its hello; send it before any other message of the group.
  PeerOwnership hello() const;

  // --- from the link
  // The peer's hello of this connection, after ours was sent. The connection counts as usable from here on. A refusal
  // (old term, lost state, unrelated primaries): tell the peer, do not replicate; it is retried at the next hello.
  Status on_hello(const PeerOwnership& peer);
  void on_disconnected();
  // Message types 128..159. An error: the peer broke the protocol; drop the connection.
  Status on_message(MessageType type, ByteSpan payload);

  // --- from the operator
  using MigrateDone = std::function<void(const MigrateResult&)>;
  // Preflight was done by the caller. One at a time: Busy. `done` is called exactly once; never, when the daemon ends
  // first.
  Status migrate(const MigrateRequest& request, MigrateDone done);
  Status cancel();  // Fenced after GO: refused with the reason
  bool migrating() const;
  // Of the attempt that the record names, also at the destination and after a restart; else of the last migration from
  // here.
  MigratePhase phase() const;
  MigrateProgress progress() const;
  std::optional<MigrateResult> last_result() const;

  using Done = std::function<void(Status)>;
  void promote(const PromoteOptions& options, Done done);
  void demote(Done done);
  void resolve(ResolveChoice choice, bool force, Done done);
  void rejoined();  // a superseded side has taken the owner's data

 private:
  std::unique_ptr<CoordinatorImpl> impl_;
};

}  // namespace vmferry
