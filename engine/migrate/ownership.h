// SPDX-License-Identifier: Apache-2.0
//
// Who may run a group of volumes, as it is durable: the state of docs/migration.md, with what a restarted daemon needs
// to continue from it. One record per group; written whole, before it acts (I5).
#pragma once

#include <functional>
#include <string>

#include "engine/base/id.h"
#include "engine/base/result.h"
#include "engine/migrate/qemu.h"

namespace vmferry {

enum class Role : uint8_t { Primary, Secondary };
enum class Owner : uint8_t { Self, Peer, Unknown };

// States of handover.md. Source side: Own..AbortedResumeOwed; peer side: Secondary..Superseded.
enum class HandoverState : uint8_t {
  Own,                // primary, nothing under way
  Migrating,          // PREPARE was or may have been sent
  Fenced,             // the guest is stopped, writes are parked
  GoSent,             // in doubt: only the peer's word or the operator's ends it
  AbortedResumeOwed,  // the migration failed; the guest has to be seen running again
  Secondary,
  Prepared,
  Primary,     // may run, has not accepted a write
  Started,     // `cont` was or may have been sent; no automatic way back
  Running,     // an Own that still remembers its attempt, for the source's question after a cut
  Aborted,     // the peer's durable no to one attempt, kept until a higher term is seen (H11)
  Superseded,  // somebody with a higher term owns the group
};

struct Ownership {
  Role role = Role::Primary;
  Owner owner = Owner::Self;
  HandoverState state = HandoverState::Own;
  uint64_t term = 0;
  Id128 attempt{};  // of the state above; none when no attempt was ever made
  bool split_brain = false;
  bool forced = false;            // by resolve or promote --force; told at first contact (H6)
  bool guest_was_running = true;  // at the source when the attempt began: whether to `cont`
  bool wrote = false;             // as primary of this term, at least one guest write was accepted
  bool detach = false;
  bool quit_source = false;
  std::string qmp_path;  // H4
  // Of the QEMU there, before the attempt: the migration capabilities that were on, as Qemu::capabilities() names them.
  std::string capabilities;
  ProcessIdentity qemu;  // H5: destination (peer side), source QEMU (source side)
  std::string reason;    // one sentence for status
};

// Makes an Ownership durable. `done` runs after it is (or failed); saves complete in order.
class OwnershipStore {
 public:
  virtual ~OwnershipStore() = default;
  virtual void save(const Ownership& ownership, std::function<void(Status)> done) = 0;
};

}  // namespace vmferry
