// SPDX-License-Identifier: Apache-2.0
//
// A process that may be watched and killed without ever meeting another one that got its number: pidfd, and identity
// over restarts by start time and boot (H5).
// Threads: the reactor's.
#pragma once

#include <optional>
#include <string_view>

#include "engine/migrate/qemu.h"
#include "engine/runtime/reactor.h"

namespace vmferry {

// Of a running process; NotFound when there is none of that number.
Result<ProcessIdentity> identify_process(int64_t pid);
// Alive only when a process of that number, start time and boot is there and is not a zombie; Dead only with proof.
ProcessFate process_fate(const ProcessIdentity& identity);

// Whether the process was started with `word` in one of its arguments; nullopt: it cannot be known. The first MiB
// counts.
std::optional<bool> command_line_has(int64_t pid, std::string_view word);

class ProcessHandle {
 public:
  // `dead` runs once when the process has ended, perhaps at once (posted).
  static Result<std::unique_ptr<ProcessHandle>> open(Reactor& reactor, int64_t pid, std::function<void()> dead);
  ~ProcessHandle();
  const ProcessIdentity& identity() const { return identity_; }
  bool is_dead() const { return dead_seen_; }
  Status kill();  // SIGKILL

 private:
  ProcessHandle(Reactor& reactor, UniqueFd fd, ProcessIdentity identity, std::function<void()> dead);
  Reactor& reactor_;
  UniqueFd fd_;
  ProcessIdentity identity_;
  std::function<void()> dead_;
  bool dead_seen_ = false;
  WatchId watch_ = 0;
};

}  // namespace vmferry
