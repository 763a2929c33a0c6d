// SPDX-License-Identifier: Apache-2.0
//
// A QEMU process with its guest, misbehaving as design section 6 says that real ones do.
//
// - migrate_cancel at pre-switchover, or a socket that closes during the tail, makes it run the guest again by itself.
// - A socket that is dropped at pre-switchover is not noticed; it waits there for ever.
// - A delivered tail ends in completed and postmigrate, paused until `cont`.
// - A destination ends completed and paused; one that fails to load exits; it can never be loaded twice.
// - It outlives daemons: its disk requests wait for the daemon and are sent again, its QMP socket takes the next one.
// The guest writes, flushes, reads back and checks all the time; what may be read is the DiskModel's to say. The
// guest's memory is a counter that grows with every step and travels in the stream. Threads: the world's; the process
// has an executor of its own.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/migrate/qemu.h"
#include "engine/runtime/stream.h"
#include "tests/sim/disk_model.h"
#include "tests/sim/sim_world.h"

namespace vmferry::sim {

class Host;
class Oracle;

// The last sectors of each volume belong to another client than the guest (scenario.h).
inline constexpr uint64_t kReservedSectors = 16;

// One disk request of a guest, kept until it is answered, over deaths of the daemon.
struct DiskRequest;

class QemuProcess final : private StreamHandler {
 public:
  enum class Start : uint8_t { Boot, Incoming };
  QemuProcess(Host& host, SimExecutor& executor, Oracle& oracle, Start start, int64_t pid);
  ~QemuProcess();

  int64_t pid() const { return pid_; }
  bool alive() const { return alive_; }
  bool guest_runs() const { return alive_ && run_ == RunState::Running; }
  bool fresh_incoming() const { return alive_ && run_ == RunState::InMigrate && !used_; }
  RunState run_state() const { return run_; }
  MigrationState migration_state() const { return migration_; }
  SimExecutor& executor() { return executor_; }
  uint64_t memory() const { return memory_; }
  void die();

  // QMP, called on this process's executor.
  QemuState state() const;
  Status migrate_out(std::unique_ptr<ByteStream> stream);
  Status migrate_continue();
  Status migrate_cancel();
  Status migrate_in(std::unique_ptr<ByteStream> stream);
  Status stop();
  Status cont();

  // Events go to whoever listens; empty functions when nobody does.
  std::function<void(RunState)> on_run_state;
  std::function<void(MigrationState)> on_migration_state;
  std::function<void()> on_death;

 private:
  void stream_readable(ByteSpan bytes) override;
  void stream_writable() override;
  void stream_closed(Errno error) override;

  void set_run(RunState run);
  void set_migration(MigrationState migration);
  void send_precopy();
  void sent_all();
  void reach_switchover();
  void send_tail();
  void load();
  void migration_failed(const char* why);
  void when_drained(std::function<void()> action);

  void guest_tick();
  void guest_write(bool zeroes);
  void guest_flush();
  void guest_read();
  void check_whole_disk();
  std::optional<std::pair<uint64_t, uint64_t>> free_range(size_t volume, uint64_t count_max);
  void submit(std::unique_ptr<DiskRequest> request);

  Host& host_;
  SimExecutor& executor_;
  Oracle& oracle_;
  const int64_t pid_;
  bool alive_ = true;
  bool used_ = false;
  RunState run_;
  MigrationState migration_ = MigrationState::None;
  std::string error_;
  uint64_t memory_ = 0;
  std::unique_ptr<ByteStream> stream_;
  bool sending_ = false;   // precopy
  bool stopping_ = false;  // drains before pre-switchover
  bool tail_sent_ = false;
  uint64_t precopy_left_ = 0;
  Bytes incoming_;
  Bytes outgoing_;
  bool socket_gone_ = false;  // not noticed at pre-switchover
  bool ticking_ = false;
  bool settle_ = false;      // the disk was last used before a crash: what is found is the truth
  uint64_t check_left_ = 0;  // reads of the check of the whole disk
  std::vector<DiskRequest*> outstanding_;
  std::vector<std::function<void()>> drain_waiters_;
  std::shared_ptr<int> anchor_ = std::make_shared<int>(0);
};

// The daemon's end of QMP: Qemu of one life of the daemon.
class SimQemu final : public Qemu {
 public:
  SimQemu(Host& host, SimExecutor& executor) : host_(host), executor_(executor) {}
  ~SimQemu() override { disconnect(); }

  void set_events(QemuEvents events) override { events_ = std::move(events); }
  void connect(Done done) override;
  bool connected() const override;
  ProcessIdentity identity() const override;
  ProcessFate fate(const ProcessIdentity& of) const override;
  void query(std::function<void(Result<QemuState>)> done) override;
  void migrate_out(const MigrateOptions& options,
                   std::function<void(Result<std::unique_ptr<ByteStream>>)> done) override;
  void migrate_continue(Done done) override;
  void migrate_cancel(Done done) override;
  void migrate_in(std::function<void(Result<std::unique_ptr<ByteStream>>)> done) override;
  void capabilities(std::function<void(Result<std::string>)> done) override;
  void restore_capabilities(const std::string& on, Done done) override;
  void announce_self(Done done) override;
  void stop(Done done) override;
  void cont(Done done) override;
  void quit(Done done) override;
  void kill(Done done) override;

 private:
  // Runs `act` on the process after a moment, then `done` here. Unavailable when it died.
  void command(std::function<Status(QemuProcess&)> act, Done done);
  void disconnect();

  Host& host_;
  SimExecutor& executor_;
  QemuEvents events_;
  void answer(uint64_t command, Status status);
  void process_died();

  std::shared_ptr<QemuProcess> process_;
  std::map<uint64_t, Done> pending_;
  uint64_t next_command_ = 1;
  std::shared_ptr<int> anchor_ = std::make_shared<int>(0);
};

}  // namespace vmferry::sim
