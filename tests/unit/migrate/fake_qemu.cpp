// SPDX-License-Identifier: Apache-2.0
//
// The fake QEMU process of fake_world.h: what real ones do when they migrate, fail, or lose their socket.
#include "tests/unit/migrate/fake_world.h"

namespace vmferry::fake {

namespace {

// The daemon's end of a stream: all that matters of it is when it closes.
class Socket final : public ByteStream {
 public:
  explicit Socket(std::function<void()> closed) : closed_(std::move(closed)) {}
  ~Socket() override { closed_(); }
  void set_handler(StreamHandler*) override {}
  void write(ByteSpan) override {}
  void write(Bytes&&) override {}
  size_t unsent_bytes() const override { return 0; }
  void pause_reading(bool) override {}
  void close() override {}
  void close_after_writing() override {}
  std::string peer_text() const override { return "fake"; }

 private:
  std::function<void()> closed_;
};

constexpr Nanoseconds kQmp = kMillisecond;
constexpr Nanoseconds kPrecopy = 300 * kMillisecond;
constexpr Nanoseconds kTail = 15 * kMillisecond;
// Between the last byte and `completed`: QEMU still runs the guest again when its socket closes.
constexpr Nanoseconds kClosing = 30 * kMillisecond;

}  // namespace

// QEMU writes its tail with the big lock held: while nobody takes it, the monitor answers nothing either.
bool FakeQemu::writes_in_vain(Host& host, const QemuProcess& process) {
  if (!process.long_tail || process.migration != MigrationState::Device || !process.socket_open || !host.daemon)
    return false;
  const Host& to = host.other();
  return !host.world.up() || !to.daemon || !to.daemon->memory.sinking(host.daemon->memory.attempt());
}

void FakeQemu::end_tail(Host& host, uint64_t to) {
  QemuProcess& now = host.qemus[to];
  if (!now.alive || now.migration != MigrationState::Device) return;
  World& world = host.world;
  if (writes_in_vain(host, now)) {
    world.clock().at(world.clock().now() + kClosing, [&host, to] { end_tail(host, to); });
    return;
  }
  if (!now.socket_open) {
    now.migration = MigrationState::Failed;
    now.run = RunState::Running;
    return;
  }
  now.migration = MigrationState::Completed;
  if (host.daemon) host.daemon->qemu.tell_migration(MigrationState::Completed);
  world.clock().at(world.clock().now() + 3 * kMillisecond, [&now] {
    if (now.alive && now.run == RunState::FinishMigrate) now.run = RunState::PostMigrate;
  });
}

void FakeQemu::command(Done done, std::function<Status(QemuProcess&)> act, Nanoseconds delay) {
  const uint64_t to = connected_to_;
  host_.daemon->executor.start_timer(kQmp + delay, [this, to, done = std::move(done), act = std::move(act)] {
    const auto found = host_.qemus.find(to);
    if (found == host_.qemus.end() || !found->second.alive)
      return done(fail(ErrorKind::Unavailable, "the QMP connection is closed"));
    if (found->second.hangs) return;
    if (writes_in_vain(host_, found->second)) return command(done, act, kClosing);
    const Status status = act(found->second);
    host_.daemon->executor.start_timer(kQmp, [this, to, done, status] {
      if (!host_.qemus[to].alive) return done(fail(ErrorKind::Unavailable, "the QMP connection is closed"));
      done(status);
    });
  });
}

void FakeQemu::connect(Done done) {
  host_.daemon->executor.start_timer(kQmp, [this, done = std::move(done)] {
    const QemuProcess* process = host_.qemu();
    if (!process || !process->alive) return done(fail(ErrorKind::Unavailable, "no QEMU at the QMP socket"));
    connected_to_ = host_.qemu_now;
    done({});
  });
}

bool FakeQemu::connected() const {
  const auto found = host_.qemus.find(connected_to_);
  return found != host_.qemus.end() && found->second.alive;
}

ProcessIdentity FakeQemu::identity() const {
  return {.pid = static_cast<int64_t>(connected_to_), .start_time = connected_to_, .boot_id = "boot"};
}

ProcessFate FakeQemu::fate(const ProcessIdentity& of) const {
  const auto found = host_.qemus.find(static_cast<uint64_t>(of.pid));
  if (found == host_.qemus.end()) return ProcessFate::Unknown;
  return found->second.alive ? ProcessFate::Alive : ProcessFate::Dead;
}

void FakeQemu::query(std::function<void(Result<QemuState>)> done) {
  const auto state = std::make_shared<QemuState>();
  command(
      [done = std::move(done), state](const Status& status) {
        if (!status) return done(tl::unexpected<Error>(status.error()));
        done(*state);
      },
      [state](QemuProcess& process) {
        state->run = process.run;
        state->migration = process.migration;
        state->ram_total = 1000;
        state->ram_remaining = 10;
        return Status{};
      });
}

void FakeQemu::migrate_out(const MigrateOptions&, std::function<void(Result<std::unique_ptr<ByteStream>>)> done) {
  const uint64_t to = connected_to_;
  const Nanoseconds delay = host_.qemus[to].migrate_delay;
  command(
      [this, to, done = std::move(done)](const Status& status) {
        if (!status) return done(tl::unexpected<Error>(status.error()));
        Host& host = host_;
        World& world = world_;
        done(std::make_unique<Socket>([&host, &world, to] {
          // The socket closes: the guest runs again by itself, except at pre-switchover, where QEMU does not look.
          QemuProcess& process = host.qemus[to];
          process.socket_open = false;
          if (!process.alive) return;
          if (process.migration == MigrationState::Active || process.migration == MigrationState::Device) {
            world.clock().at(world.clock().now() + kMillisecond, [&process] {
              if (process.migration != MigrationState::Active && process.migration != MigrationState::Device) return;
              process.migration = MigrationState::Failed;
              if (process.alive && process.was_running) process.run = RunState::Running;
            });
          }
        }));
        host_.daemon->executor.start_timer(kPrecopy, [this] { try_pre_switchover(); });
      },
      [](QemuProcess& process) {
        if (process.migration == MigrationState::Active) return Status(fail(ErrorKind::Busy, "already migrating"));
        process.migration = MigrationState::Active;
        process.capabilities = "events,pause-before-switchover";
        process.socket_open = true;
        process.was_running = process.run == RunState::Running;
        if (process.fits_into_socket) {
          process.run = RunState::FinishMigrate;
          process.migration = MigrationState::PreSwitchover;
        }
        return Status{};
      },
      delay);
}

// QEMU reads its own socket's pace: while it is held, it does not get there.
void FakeQemu::try_pre_switchover() {
  QemuProcess* process = host_.qemu();
  if (!process || !process->alive || process->migration != MigrationState::Active || !process->socket_open) return;
  if (host_.daemon->memory.held() || !world_.up() || !host_.daemon->memory.sourcing(host_.daemon->memory.attempt())) {
    host_.daemon->executor.start_timer(50 * kMillisecond, [this] { try_pre_switchover(); });
    return;
  }
  process->run = RunState::FinishMigrate;
  process->migration = MigrationState::PreSwitchover;
  tell_run(RunState::FinishMigrate);
  tell_migration(MigrationState::PreSwitchover);
}

void FakeQemu::migrate_continue(Done done) {
  const uint64_t to = connected_to_;
  command(std::move(done), [this, to](QemuProcess& process) {
    if (process.migration != MigrationState::PreSwitchover)
      return Status(fail(ErrorKind::InvalidArgument, "not at pre-switchover"));
    process.migration = MigrationState::Device;
    // The tail needs a reader; the process goes on whatever becomes of the daemon.
    Host& host = host_;
    World& world = world_;
    const Id128 attempt = host.daemon->memory.attempt();
    world.clock().at(world.clock().now() + kTail, [&host, to, attempt] {
      const QemuProcess& now = host.qemus[to];
      if (now.alive && now.migration == MigrationState::Device && host.daemon)
        host.daemon->memory.deliver_tail(attempt);
    });
    world.clock().at(world.clock().now() + kTail + kClosing, [&host, to] { end_tail(host, to); });
    return Status{};
  });
}

void FakeQemu::migrate_cancel(Done done) {
  command(std::move(done), [](QemuProcess& process) {
    switch (process.migration) {
      case MigrationState::Active:
      case MigrationState::PreSwitchover:
      case MigrationState::Device:
        process.migration = MigrationState::Cancelled;
        if (process.run == RunState::FinishMigrate)
          process.run = process.was_running ? RunState::Running : RunState::PostMigrate;
        break;
      default:
        break;
    }
    return Status{};
  });
}

void FakeQemu::migrate_in(std::function<void(Result<std::unique_ptr<ByteStream>>)> done) {
  const uint64_t to = connected_to_;
  command(
      [this, to, done = std::move(done)](const Status& status) {
        if (!status) return done(tl::unexpected<Error>(status.error()));
        Host& host = host_;
        done(std::make_unique<Socket>([&host, to] {
          QemuProcess& process = host.qemus[to];
          process.socket_open = false;
          if (!process.loaded) process.alive = false;  // 7.2 exits when its stream ends early
        }));
      },
      [](QemuProcess& process) {
        if (!process.fresh_incoming || process.migration != MigrationState::None)
          return Status(fail(ErrorKind::InvalidArgument, "not waiting for a migration"));
        process.migration = MigrationState::Active;
        process.capabilities = "events,late-block-activate";
        process.socket_open = true;
        return Status{};
      });
}

void FakeQemu::capabilities(std::function<void(Result<std::string>)> done) {
  const auto on = std::make_shared<std::string>();
  command(
      [done = std::move(done), on](const Status& status) {
        if (!status) return done(tl::unexpected<Error>(status.error()));
        done(*on);
      },
      [on](QemuProcess& process) {
        *on = process.capabilities;
        return Status{};
      });
}

void FakeQemu::restore_capabilities(const std::string& on, Done done) {
  command(std::move(done), [on](QemuProcess& process) {
    switch (process.migration) {
      case MigrationState::Active:
      case MigrationState::PreSwitchover:
      case MigrationState::Device:
        return Status(fail(ErrorKind::Busy, "there is a migration under way"));
      default:
        process.capabilities = on;
        return Status{};
    }
  });
}

void FakeQemu::announce_self(Done done) {
  command(std::move(done), [](QemuProcess& process) {
    ++process.announced;
    if (process.run != RunState::Running) process.announced_early = true;
    return Status{};
  });
}

void FakeQemu::stop(Done done) {
  command(std::move(done), [](QemuProcess& process) {
    if (process.run == RunState::Running) process.run = RunState::Paused;
    return Status{};
  });
}

void FakeQemu::cont(Done done) {
  command(std::move(done), [](QemuProcess& process) {
    if (process.refuses_cont) return Status(fail(ErrorKind::Internal, "cont failed"));
    process.run = RunState::Running;
    return Status{};
  });
}

void FakeQemu::quit(Done done) {
  command(std::move(done), [](QemuProcess& process) {
    process.alive = false;
    return Status{};
  });
}

void FakeQemu::kill(Done done) {
  const uint64_t to = connected_to_;
  host_.daemon->executor.start_timer(kQmp, [this, to, done = std::move(done)] {
    host_.qemus[to].alive = false;
    done({});
  });
}

void FakeQemu::tell_run(RunState run) {
  host_.daemon->executor.post([this, run] {
    if (events_.run_state) events_.run_state(run);
  });
}

void FakeQemu::tell_migration(MigrationState state) {
  host_.daemon->executor.post([this, state] {
    if (events_.migration_state) events_.migration_state(state);
  });
}

void FakeQemu::tell_dead() {
  host_.daemon->executor.post([this] {
    if (events_.process_dead) events_.process_dead();
  });
}

}  // namespace vmferry::fake
