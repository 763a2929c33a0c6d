// SPDX-License-Identifier: Apache-2.0
//
// The operator's program that is run when a guest has arrived here (`on-running`): DNS, a lease, a route.
//
// Flow: GroupOwnershipStore notes a hook in the same record that says Running, and begin() runs it once that is
// durable. It leaves the record when it has ended. A daemon that stops in between runs it again at its next start,
// once: hooks are run once, and at most twice when the daemon dies meanwhile. A hook changes nothing of the migration.
// It ends after kTimeLimit at the latest. Threads: the reactor's.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>

#include "engine/control/events.h"
#include "engine/daemon/node_state.h"
#include "engine/runtime/program_run.h"

namespace vmferry {

class Hooks {
 public:
  static constexpr Nanoseconds kTimeLimit = 30 * kSecond;

  // `program`: absolute; "": none. What is referenced outlives this.
  Hooks(Reactor& reactor, NodeState& state, EventLog& events, std::string program);
  ~Hooks();

  bool wanted() const { return !program_.empty(); }
  void begin(const Id128& attempt);  // that is in the record
  void resume();                     // of all that a stopped daemon left there
  void stop();                       // kills those that run and begins no more: the next start does

 private:
  bool is_known(const Id128& attempt) const;
  void begin_next();
  void run(const Id128& attempt, const HookRecord& hook);
  void ended(const Id128& attempt, const HookRecord& hook, const Status& status);
  void forget(const Id128& attempt);

  Reactor& reactor_;
  NodeState& state_;
  EventLog& events_;
  const std::string program_;
  bool stopped_ = false;
  std::deque<Id128> waiting_;
  std::map<Id128, std::unique_ptr<ProgramRun>> running_;  // nullptr: its start is being recorded
  Alive alive_;
};

}  // namespace vmferry
