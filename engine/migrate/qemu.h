// SPDX-License-Identifier: Apache-2.0
//
// The QEMU beside a volume, as the handover needs it. Real: QmpQemu (netproto/qemu QMP codec over the QMP socket);
// tests/sim: SimQemu, which misbehaves as design section 6 says that real ones do.
// Threads: the group's executor; callbacks are posted, never inline.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/result.h"
#include "engine/base/units.h"

namespace vmferry {

// query-status "status" and query-migrate "status", as far as decisions depend on them.
enum class RunState : uint8_t { Unknown, Running, Paused, InMigrate, PreMigrate, PostMigrate, FinishMigrate, Other };
enum class MigrationState : uint8_t {
  None,
  Setup,
  Active,
  PreSwitchover,
  Device,
  Completed,
  Failed,
  Cancelling,
  Cancelled,
  Other
};

struct QemuState {
  RunState run = RunState::Unknown;
  MigrationState migration = MigrationState::None;
  std::string migration_error;  // "" when none
  uint64_t ram_remaining = 0;   // bytes, source only
  uint64_t ram_total = 0;
  uint64_t dirty_pages_rate = 0;  // pages per second
  uint64_t page_size = 4096;
};

// Proof of identity of a process over daemon restarts (H5).
struct ProcessIdentity {
  int64_t pid = 0;
  uint64_t start_time = 0;  // clock ticks since boot, /proc/PID/stat field 22
  std::string boot_id;
  bool is_none() const { return pid == 0; }
};

enum class ProcessFate : uint8_t { Alive, Dead, Unknown };

struct QemuEvents {
  std::function<void(RunState)> run_state;              // STOP, RESUME, and POSTMIGRATE-like changes
  std::function<void(MigrationState)> migration_state;  // MIGRATION events
  std::function<void()> connection_lost;                // QMP socket closed; not a proof of death
  std::function<void()> process_dead;                   // the pidfd fired: proof
};

struct MigrateOptions {
  Nanoseconds downtime_limit = 300 * kMillisecond;
  uint64_t bandwidth_max = 0;  // bytes per second for QEMU's own pacing; 0 = effectively unlimited
  // Bytes per second that QEMU counts on for the pause; 0 = what it measured itself. QEMU before 8.2 does so always.
  uint64_t switchover_bandwidth = 0;
};

// One end of a stream that carries QEMU's migration data; engine/memory wraps it.
class ByteStream;

class Qemu {
 public:
  virtual ~Qemu() = default;
  using Done = std::function<void(Status)>;

  virtual void set_events(QemuEvents events) = 0;
  // Connects, negotiates, finds the process behind the socket. Repeating reconnects.
  virtual void connect(Done done) = 0;
  virtual bool connected() const = 0;
  virtual ProcessIdentity identity() const = 0;
  // Whether the process that identity() named (or `of` from a durable record) is still there.
  virtual ProcessFate fate(const ProcessIdentity& of) const = 0;

  virtual void query(std::function<void(Result<QemuState>)> done) = 0;

  // Those migration capabilities that are on, of all that migrate_out and migrate_in touch; names with commas between.
  virtual void capabilities(std::function<void(Result<std::string>)> done) = 0;
  // Back to what capabilities() said before; parameters, too, as far as this daemon has set them.
  virtual void restore_capabilities(const std::string& on, Done done) = 0;

  // Source: sets capabilities and parameters of design section 6, then `migrate` into one end of a socketpair; the
  // other end is returned. QEMU goes on until pre-switchover and waits there.
  virtual void migrate_out(const MigrateOptions& options,
                           std::function<void(Result<std::unique_ptr<ByteStream>>)> done) = 0;
  // Of MigrateOptions, while the migration runs.
  virtual void set_switchover_bandwidth(uint64_t /*bytes_per_second*/) {}
  virtual void migrate_continue(Done done) = 0;  // from pre-switchover
  virtual void migrate_cancel(Done done) = 0;
  // Destination: sets capabilities, `stop` (so that it ends paused), `migrate-incoming` from a socketpair.
  virtual void migrate_in(std::function<void(Result<std::unique_ptr<ByteStream>>)> done) = 0;
  virtual void announce_self(Done done) = 0;

  virtual void stop(Done done) = 0;
  virtual void cont(Done done) = 0;
  virtual void quit(Done done) = 0;  // asks; done when the answer or the end of the connection is seen
  virtual void kill(Done done) = 0;  // SIGKILL by pidfd; done when death is proved
};

}  // namespace vmferry
