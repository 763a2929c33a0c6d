// SPDX-License-Identifier: Apache-2.0
//
// What a migration reports: phases, progress while it runs, and the one JSON object at its end (docs/migration.md).
// Threads: values.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "engine/base/id.h"
#include "engine/base/units.h"
#include "engine/migrate/ownership.h"

namespace vmferry {

enum class MigratePhase : uint8_t {
  Idle,
  Preflight,
  Bulk,
  Converge,
  Precopy,
  Switchover,
  Handover,
  Running,
  Done,
  RolledBack,
  Failed,
};
std::string_view to_string(MigratePhase phase) noexcept;

enum class MigrateOutcome : uint8_t { Done, RolledBack, Failed };
enum class GuestPlace : uint8_t { RunningSource, RunningPeer, PausedSource, Unknown };

struct MigrateResult {
  MigrateOutcome outcome = MigrateOutcome::Failed;
  std::string owner = "source";  // "source", "peer" or "unknown"
  GuestPlace guest = GuestPlace::Unknown;
  double total_s = 0;
  double downtime_ms = 0;  // STOP at the source to receipt of RUNNING, less half a round trip; 0 if it never stopped
  uint32_t rounds = 0;     // of the disks
  uint64_t wire_bytes_disk = 0;
  uint64_t wire_bytes_memory = 0;
  uint64_t raw_bytes_disk = 0;
  uint64_t raw_bytes_memory = 0;
  std::string error;  // one sentence; empty when done
};
// The contract's word for who owns the group, as seen from the source.
std::string_view owner_word(const Ownership& ownership) noexcept;
// `unknown` goes with `failed` and with an error that names the way out (I10).
void explain_unknown(MigrateResult& result);
// One line without a newline.
std::string to_json_line(const MigrateResult& result);

struct MigrateProgress {
  MigratePhase phase = MigratePhase::Idle;
  Id128 attempt{};
  double elapsed_s = 0;
  double phase_s = 0;
  uint32_t rounds = 0;
  uint64_t disk_remaining_bytes = 0;
  uint64_t memory_remaining_bytes = 0;
  uint64_t memory_total_bytes = 0;
  uint64_t wire_bytes_disk = 0;
  uint64_t wire_bytes_memory = 0;
  uint64_t raw_bytes_disk = 0;
  uint64_t raw_bytes_memory = 0;
  double predicted_last_round_ms = 0;
  bool brake_held = false;
  std::string error;
};

struct LinkGuess {
  uint64_t rate = 0;       // bytes per second that the link carries now
  double reduction = 1.0;  // wire bytes per raw byte, until enough was sent to know
};
// Until the guest can be stopped, if the link goes on like this and the guest changed nothing; nullopt: no rate is
// known, or there is nothing to wait for.
std::optional<double> seconds_left(const MigrateProgress& progress, const LinkGuess& link);

// For the operator whose time limit is over: what is left, and what would help.
std::string why_not_done(const MigrateProgress& progress);

}  // namespace vmferry
