// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/qmp_qemu.h"

#include <fcntl.h>

#include "engine/base/log.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kKillTimeout = 10 * kSecond;

}  // namespace

RunState parse_run_state(std::string_view text) {
  if (text == "running") return RunState::Running;
  if (text == "paused" || text == "prelaunch") return RunState::Paused;
  if (text == "inmigrate") return RunState::InMigrate;
  if (text == "postmigrate") return RunState::PostMigrate;
  if (text == "finish-migrate") return RunState::FinishMigrate;
  return text.empty() ? RunState::Unknown : RunState::Other;
}

MigrationState parse_migration_state(std::string_view text) {
  if (text.empty() || text == "none") return MigrationState::None;
  if (text == "setup") return MigrationState::Setup;
  if (text == "active") return MigrationState::Active;
  if (text == "pre-switchover") return MigrationState::PreSwitchover;
  if (text == "device") return MigrationState::Device;
  if (text == "completed") return MigrationState::Completed;
  if (text == "failed") return MigrationState::Failed;
  if (text == "cancelling") return MigrationState::Cancelling;
  if (text == "cancelled") return MigrationState::Cancelled;
  return MigrationState::Other;
}

struct QmpQemu::Setup {
  Side side;
  UniqueFd ours;
  UniqueFd theirs;
  std::string name;
  StreamDone done;
};

QmpQemu::QmpQemu(Reactor& reactor, std::string qmp_path)
    : reactor_(reactor), path_(std::move(qmp_path)), client_(reactor), kill_timeout_(reactor) {
  client_.set_events([this](const qmp::Event& seen) { event(seen); },
                     [this] {
                       if (events_.connection_lost) events_.connection_lost();
                     });
}

void QmpQemu::connect(Done done) {
  client_.connect(
      path_, [this](const PeerCredentials& credentials) { reached(credentials); }, std::move(done));
}

void QmpQemu::reached(const PeerCredentials& credentials) {
  if (process_ && process_->identity().pid == credentials.pid && !process_->is_dead()) return;
  auto process = ProcessHandle::open(reactor_, credentials.pid, [this] { died(); });
  if (!process) {
    log::warn("qmp={} error=\"{}\": the death of this QEMU cannot be proved", path_, process.error().text);
    process_.reset();
    identity_ = {};
    return;
  }
  process_ = std::move(*process);
  identity_ = process_->identity();
}

void QmpQemu::died() {
  kill_timeout_.cancel();
  const auto alive = alive_.token();
  const Done kill_done = std::exchange(kill_done_, nullptr);
  if (events_.process_dead) {
    const auto report = events_.process_dead;
    report();
  }
  if (kill_done) kill_done({});
  if (!alive()) return;
}

ProcessIdentity QmpQemu::identity() const {
  return identity_;
}

ProcessFate QmpQemu::fate(const ProcessIdentity& of) const {
  if (process_ && process_->is_dead() && of.pid == identity_.pid && of.start_time == identity_.start_time &&
      of.boot_id == identity_.boot_id)
    return ProcessFate::Dead;
  return process_fate(of);
}

void QmpQemu::event(const qmp::Event& seen) {
  if (seen.name == "STOP" && events_.run_state) return events_.run_state(RunState::Paused);
  if (seen.name == "RESUME" && events_.run_state) return events_.run_state(RunState::Running);
  if (seen.name == "SHUTDOWN" && events_.run_state) return events_.run_state(RunState::Other);
  if (seen.name == "MIGRATION" && events_.migration_state)
    events_.migration_state(parse_migration_state(qmp::text_of(seen.data, "status")));
}

void QmpQemu::command(std::string_view name, const Json& arguments, Done done) {
  client_.execute(name, arguments, [done = std::move(done)](Result<Json> reply) {
    if (!reply) return done(tl::unexpected(reply.error()));
    done({});
  });
}

void QmpQemu::query(std::function<void(Result<QemuState>)> done) {
  client_.execute("query-status", nullptr, [this, done = std::move(done)](Result<Json> status) {
    if (!status) return done(tl::unexpected(status.error()));
    QemuState state;
    state.run = parse_run_state(qmp::text_of(*status, "status"));
    client_.execute("query-migrate", nullptr, [state, done](Result<Json> migrate) mutable {
      if (!migrate) return done(tl::unexpected(migrate.error()));
      const Json& ram = qmp::object_of(*migrate, "ram");
      state.migration = parse_migration_state(qmp::text_of(*migrate, "status"));
      state.migration_error = qmp::text_of(*migrate, "error-desc");
      state.ram_remaining = qmp::number_of(ram, "remaining");
      state.ram_total = qmp::number_of(ram, "total");
      state.dirty_pages_rate = qmp::number_of(ram, "dirty-pages-rate");
      if (const uint64_t size = qmp::number_of(ram, "page-size"); size != 0) state.page_size = size;
      done(state);
    });
  });
}

void QmpQemu::migrate_out(const MigrateOptions& options, StreamDone done) {
  auto setup = std::make_shared<Setup>(Setup{Side::Source, {}, {}, {}, std::move(done)});
  set_capabilities(Side::Source, [this, options, setup](Status status) {
    if (!status) return give_up(setup, status.error());
    set_parameters(options, [this, setup](Status set) {
      if (!set) return give_up(setup, set.error());
      start_channel(setup);
    });
  });
}

void QmpQemu::migrate_in(StreamDone done) {
  auto setup = std::make_shared<Setup>(Setup{Side::Destination, {}, {}, {}, std::move(done)});
  query([this, setup](Result<QemuState> state) {
    if (!state) return give_up(setup, state.error());
    if (state->run != RunState::InMigrate || state->migration != MigrationState::None)
      return give_up(setup,
                     {ErrorKind::Mismatch, "the destination QEMU is not fresh: start it anew with '-incoming defer'"});
    set_capabilities(Side::Destination, [this, setup](Status status) {
      if (!status) return give_up(setup, status.error());
      // While inmigrate this only says how loading ends: paused.
      command("stop", nullptr, [this, setup](Status stopped) {
        if (!stopped) return give_up(setup, stopped.error());
        start_channel(setup);
      });
    });
  });
}

void QmpQemu::start_channel(std::shared_ptr<Setup> setup) {
  auto pair = make_socket_pair();
  if (!pair) return give_up(setup, pair.error());
  setup->ours = std::move(pair->first);
  // QEMU sets the mode it wants; some of its versions expect to begin with a blocking one.
  const int flags = fcntl(pair->second.get(), F_GETFL);
  fcntl(pair->second.get(), F_SETFL, flags & ~O_NONBLOCK);
  setup->name = fmt::format("vmferry-{}", channel_next_++);
  const auto started = [this, setup](Result<Json> reply) {
    if (!reply) return give_up(setup, reply.error());
    const std::string peer = fmt::format("{} of {}", setup->name, path_);
    setup->done(std::make_unique<SocketStream>(reactor_, std::move(setup->ours), peer));
  };
  const auto passed = [this, setup, started](Result<Json> reply) {
    if (!reply) return give_up(setup, reply.error());
    const Json uri = {{"uri", "fd:" + setup->name}};
    if (setup->side == Side::Source) return client_.execute("migrate", uri, started);
    // QEMU 9.1 and later can outlive a stream that does not load; earlier ones refuse the argument and then exit.
    Json kept = uri;
    kept["exit-on-error"] = false;
    client_.execute("migrate-incoming", kept, [this, uri, started](Result<Json> answer) {
      const bool unknown = !answer && answer.error().text.find("exit-on-error") != std::string::npos;
      if (!unknown) return started(std::move(answer));
      client_.execute("migrate-incoming", uri, started);
    });
  };
  client_.execute("getfd", {{"fdname", setup->name}}, passed, std::move(pair->second));
}

void QmpQemu::give_up(std::shared_ptr<Setup> setup, Error error) {
  if (!setup->name.empty()) command("closefd", {{"fdname", setup->name}}, [](Status) {});
  // Its settings are put back by whoever gives the attempt up.
  reactor_.post([setup, error = std::move(error)] { setup->done(tl::unexpected(error)); });
}

void QmpQemu::migrate_continue(Done done) {
  command("migrate-continue", {{"state", "pre-switchover"}}, std::move(done));
}

void QmpQemu::migrate_cancel(Done done) {
  command("migrate_cancel", nullptr, std::move(done));
}

void QmpQemu::announce_self(Done done) {
  command("announce-self", {{"initial", 50}, {"max", 550}, {"rounds", 5}, {"step", 100}}, std::move(done));
}

void QmpQemu::stop(Done done) {
  command("stop", nullptr, std::move(done));
}

void QmpQemu::cont(Done done) {
  command("cont", nullptr, std::move(done));
}

void QmpQemu::quit(Done done) {
  client_.execute("quit", nullptr, [done = std::move(done)](Result<Json> reply) {
    // The connection may end before the answer comes.
    if (!reply && reply.error().kind != ErrorKind::Unavailable) return done(tl::unexpected(reply.error()));
    done({});
  });
}

void QmpQemu::kill(Done done) {
  if (!process_ || process_->is_dead()) {
    const ProcessFate known = fate(identity_);
    reactor_.post([done = std::move(done), known] {
      if (known == ProcessFate::Dead) return done({});
      done(fail(ErrorKind::Unavailable, "kill: the QEMU process is not known"));
    });
    return;
  }
  kill_done_ = std::move(done);
  if (Status status = process_->kill(); !status) {
    reactor_.post([done = std::exchange(kill_done_, nullptr), status] { done(status); });
    return;
  }
  kill_timeout_.start(kKillTimeout, [this] {
    const Done late = std::exchange(kill_done_, nullptr);
    late(fail(ErrorKind::Timeout, "QEMU process {} is still there {} s after SIGKILL", identity_.pid,
              kKillTimeout / kSecond));
  });
}

// Answers come in order: those to the questions asked here come after those that preflight_facts asked at once, and
// before those that it asks at the end.
void QmpQemu::find_vhost_disks(const std::shared_ptr<QemuFacts>& facts) {
  auto sockets = std::make_shared<std::map<std::string, std::string>>();
  client_.execute("query-chardev", nullptr, [sockets](const Result<Json>& reply) {
    if (reply) *sockets = parse_chardev_sockets(*reply);
  });
  for (const std::string parent : {"/machine/peripheral", "/machine/peripheral-anon"}) {
    client_.execute("qom-list", {{"path", parent}}, [this, facts, sockets, parent](const Result<Json>& list) {
      if (!list) return;
      for (const std::string& name : parse_vhost_devices(*list)) {
        const std::string path = parent + "/" + name;
        client_.execute("qom-get", {{"path", path}, {"property", "chardev"}},
                        [facts, sockets, path](const Result<Json>& chardev) {
                          QemuDisk disk;
                          disk.device = path;
                          disk.driver = "vhost-user-blk";
                          disk.writable = true;
                          if (chardev && chardev->is_string()) {
                            const auto it = sockets->find(chardev->get<std::string>());
                            if (it != sockets->end()) disk.vhost_socket = it->second;
                          }
                          disk.file = "vhost-user-blk:" + disk.vhost_socket;
                          facts->disks.push_back(std::move(disk));
                        });
      }
    });
  }
}

void QmpQemu::preflight_facts(std::function<void(Result<QemuFacts>)> done) {
  auto facts = std::make_shared<QemuFacts>();
  facts->version_major = client_.greeting().major;
  facts->version_minor = client_.greeting().minor;
  facts->version_micro = client_.greeting().micro;
  facts->reconnect_delay = command_line_has(identity_.pid, "reconnect-delay");
  // All at once: QEMU answers in order, so the last reply completes the picture.
  auto first_error = std::make_shared<std::optional<Error>>();
  const auto ask = [this, first_error](std::string_view name, const Json& arguments,
                                       std::function<void(const Json&)> use) {
    client_.execute(name, arguments, [first_error, use = std::move(use)](Result<Json> reply) {
      if (reply) return use(*reply);
      if (!*first_error) *first_error = reply.error();
    });
  };
  ask("query-migrate", nullptr, [facts](const Json& reply) {
    facts->ever_migrated = !qmp::text_of(reply, "status").empty() && qmp::text_of(reply, "status") != "none";
    for (const Json& reason : qmp::array_of(reply, "blocked-reasons"))
      if (reason.is_string() && facts->blocked_reasons.size() < 32) facts->blocked_reasons.push_back(reason);
  });
  ask("qom-get", {{"path", "/machine"}, {"property", "type"}}, [facts](const Json& reply) {
    if (reply.is_string()) facts->machine = reply;
  });
  ask("query-kvm", nullptr, [facts](const Json& reply) { facts->kvm = qmp::flag_of(reply, "enabled"); });
  ask("query-block", nullptr, [facts](const Json& reply) { facts->disks = parse_disks(reply); });
  find_vhost_disks(facts);
  ask("query-memory-size-summary", nullptr,
      [facts](const Json& reply) { facts->memory_size = qmp::number_of(reply, "base-memory"); });
  client_.execute("query-cpus-fast", nullptr, [this, facts, first_error, done = std::move(done)](Result<Json> cpus) {
    if (!cpus) return done(tl::unexpected(cpus.error()));
    if (*first_error) return done(tl::unexpected(**first_error));
    facts->cpu_count = cpus->is_array() ? cpus->size() : 0;
    const std::string path = cpus->is_array() && !cpus->empty() ? qmp::text_of(cpus->front(), "qom-path") : "";
    client_.execute("qom-get", {{"path", path}, {"property", "type"}}, [this, facts, done](Result<Json> type) {
      if (type && type->is_string()) facts->cpu_model = *type;
      query([facts, done](Result<QemuState> state) {
        if (!state) return done(tl::unexpected(state.error()));
        facts->state = *state;
        done(std::move(*facts));
      });
    });
  });
}

}  // namespace vmferry
