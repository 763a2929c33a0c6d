// SPDX-License-Identifier: Apache-2.0
//
// SimQemu: the daemon's end of QMP, with delays, and with commands that take effect when their sender is gone.
#include "tests/sim/host.h"
#include "tests/sim/sim_qemu.h"
#include "tests/sim/sim_stream.h"

namespace vmferry::sim {

void SimQemu::connect(Done done) {
  disconnect();
  const auto process = host_.qemu();
  if (process == nullptr || !process->alive()) {
    return executor_.post([done = std::move(done)] { done(fail(ErrorKind::Unavailable, "no QEMU answers")); });
  }
  process_ = process;
  const auto later = [this, alive = std::weak_ptr<int>(anchor_), id = process->pid()](std::function<void()> action) {
    executor_.post([this, alive, id, action = std::move(action)] {
      if (!alive.expired() && process_ != nullptr && process_->pid() == id) action();
    });
  };
  process->on_run_state = [this, later](RunState run) {
    later([this, run] {
      if (events_.run_state) events_.run_state(run);
    });
  };
  process->on_migration_state = [this, later](MigrationState migration) {
    later([this, migration] {
      if (events_.migration_state) events_.migration_state(migration);
    });
  };
  process->on_death = [this, later] { later([this] { process_died(); }); };
  command([](QemuProcess&) { return Status{}; }, std::move(done));
}

void SimQemu::disconnect() {
  if (process_ == nullptr) return;
  process_->on_run_state = {};
  process_->on_migration_state = {};
  process_->on_death = {};
  process_.reset();
  pending_.clear();
}

void SimQemu::process_died() {
  const auto alive = std::weak_ptr<int>(anchor_);
  for (auto& [id, done] : std::exchange(pending_, {})) {
    done(fail(ErrorKind::Unavailable, "QEMU is gone"));
    if (alive.expired()) return;
  }
  const QemuEvents events = events_;
  if (events.connection_lost) events.connection_lost();
  if (alive.expired()) return;
  if (events.process_dead) events.process_dead();
}

bool SimQemu::connected() const {
  return process_ != nullptr && process_->alive();
}

ProcessIdentity SimQemu::identity() const {
  return process_ != nullptr ? host_.identity_of(*process_) : ProcessIdentity{};
}

ProcessFate SimQemu::fate(const ProcessIdentity& of) const {
  return host_.fate_of(of);
}

void SimQemu::command(std::function<Status(QemuProcess&)> act, Done done) {
  if (!connected()) {
    return executor_.post([done = std::move(done)] { done(fail(ErrorKind::Unavailable, "QMP is not connected")); });
  }
  const uint64_t id = next_command_++;
  pending_.emplace(id, std::move(done));
  SimExecutor& there = process_->executor();
  const auto delay = static_cast<Nanoseconds>(there.world().random().below(300)) * kMicrosecond;
  there.start_timer(delay,
                    [this, alive = std::weak_ptr<int>(anchor_), process = process_.get(), id, act = std::move(act)] {
                      // The command takes effect even when the daemon that sent it is gone by now.
                      Status status = act(*process);
                      if (alive.expired()) return;
                      executor_.post([this, alive, id, status = std::move(status)] {
                        if (!alive.expired()) answer(id, status);
                      });
                    });
}

void SimQemu::answer(uint64_t command, Status status) {
  const auto found = pending_.find(command);
  if (found == pending_.end()) return;
  const Done done = std::move(found->second);
  pending_.erase(found);
  done(std::move(status));
}

void SimQemu::query(std::function<void(Result<QemuState>)> done) {
  auto state = std::make_shared<QemuState>();
  command(
      [state](QemuProcess& process) {
        *state = process.state();
        return Status{};
      },
      [state, done = std::move(done)](Status status) {
        if (!status) return done(tl::unexpected(status.error()));
        done(*state);
      });
}

void SimQemu::migrate_out(const MigrateOptions&, std::function<void(Result<std::unique_ptr<ByteStream>>)> done) {
  if (!connected()) {
    return executor_.post([done = std::move(done)] { done(fail(ErrorKind::Unavailable, "QMP is not connected")); });
  }
  auto [ours, theirs] = SimStream::pair(executor_, process_->executor());
  auto mine = std::make_shared<std::unique_ptr<SimStream>>(std::move(ours));
  auto its = std::make_shared<std::unique_ptr<SimStream>>(std::move(theirs));
  command([its](QemuProcess& process) { return process.migrate_out(std::move(*its)); },
          [mine, done = std::move(done)](Status status) {
            if (!status) return done(tl::unexpected(status.error()));
            done(std::move(*mine));
          });
}

void SimQemu::migrate_in(std::function<void(Result<std::unique_ptr<ByteStream>>)> done) {
  if (!connected()) {
    return executor_.post([done = std::move(done)] { done(fail(ErrorKind::Unavailable, "QMP is not connected")); });
  }
  auto [ours, theirs] = SimStream::pair(executor_, process_->executor());
  auto mine = std::make_shared<std::unique_ptr<SimStream>>(std::move(ours));
  auto its = std::make_shared<std::unique_ptr<SimStream>>(std::move(theirs));
  command([its](QemuProcess& process) { return process.migrate_in(std::move(*its)); },
          [mine, done = std::move(done)](Status status) {
            if (!status) return done(tl::unexpected(status.error()));
            done(std::move(*mine));
          });
}

void SimQemu::migrate_continue(Done done) {
  command([](QemuProcess& process) { return process.migrate_continue(); }, std::move(done));
}
void SimQemu::migrate_cancel(Done done) {
  command([](QemuProcess& process) { return process.migrate_cancel(); }, std::move(done));
}
void SimQemu::capabilities(std::function<void(Result<std::string>)> done) {
  command([](QemuProcess&) { return Status{}; },
          [done = std::move(done)](Status status) {
            if (!status) return done(tl::unexpected(status.error()));
            done(std::string());
          });
}
void SimQemu::restore_capabilities(const std::string& /*on*/, Done done) {
  command([](QemuProcess&) { return Status{}; }, std::move(done));
}
void SimQemu::announce_self(Done done) {
  command([](QemuProcess&) { return Status{}; }, std::move(done));
}
void SimQemu::stop(Done done) {
  command([](QemuProcess& process) { return process.stop(); }, std::move(done));
}
void SimQemu::cont(Done done) {
  command([](QemuProcess& process) { return process.cont(); }, std::move(done));
}

void SimQemu::quit(Done done) {
  kill(std::move(done));
}

void SimQemu::kill(Done done) {
  if (process_ == nullptr || !process_->alive()) {
    return executor_.post([done = std::move(done)] { done({}); });
  }
  executor_.start_timer(kMillisecond, [this, process = process_, done = std::move(done)] {
    process->die();
    executor_.post([done] { done({}); });
  });
}

}  // namespace vmferry::sim
