// SPDX-License-Identifier: Apache-2.0
#include "tests/unit/migrate/fake_world.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/migrate/handover.h"

namespace vmferry::fake {

Daemon::Daemon(Host& host, CoordinatorOptions options)
    : executor(host.world.clock(), host.world.ids),
      store(host, executor),
      channel(host),
      devices(host, executor),
      replication(host, executor),
      memory(host, executor),
      qemu(host.world, host) {
  coordinator = std::make_unique<HandoverCoordinator>(
      HandoverCoordinator::Parts{.executor = executor,
                                 .store = store,
                                 .channel = channel,
                                 .devices = devices,
                                 .replication = replication,
                                 .memory = memory,
                                 .qemu_at = [this](const std::string&) { return &qemu; },
                                 .default_qmp_path = "/qmp"},
      host.record, std::move(options),
      CoordinatorEvents{.role_changed = [this](Role role) { roles.push_back(role); },
                        .ownership_changed = {},
                        .phase_changed = [this](MigratePhase phase) { phases.push_back(phase); },
                        .alert = [this](const std::string& text) { alerts.push_back(text); }});
}

Host& Host::other() {
  return index == 0 ? world.peer() : world.source();
}

World::World(WorldOptions options_in) : options(std::move(options_in)) {
  hosts_[0] = std::make_unique<Host>(*this, 0);
  hosts_[1] = std::make_unique<Host>(*this, 1);
  source().record.term = 3;
  source().record.attempt = {};
  peer().record.role = Role::Secondary;
  peer().record.owner = Owner::Peer;
  peer().record.state = HandoverState::Secondary;
  peer().record.term = 3;
  source().qemu_now = next_qemu_++;
  source().qemus[source().qemu_now] = {.number = source().qemu_now};
  if (!options.guest_running) source().qemu()->run = RunState::Paused;
  source().qemu()->loaded = options.guest_running;
  start_fresh_qemu(peer());
  start_daemon(source());
  start_daemon(peer());
  connect();
  guest_writes();
}

World::~World() {
  for (const auto& host : hosts_) host->daemon.reset();
}

uint64_t World::start_fresh_qemu(Host& host) {
  host.qemu_now = next_qemu_++;
  host.qemus[host.qemu_now] = {.number = host.qemu_now,
                               .alive = true,
                               .run = RunState::InMigrate,
                               .migration = MigrationState::None,
                               .fresh_incoming = true};
  return host.qemu_now;
}

void World::in_order(Task deliver) {
  const uint64_t generation = generation_;
  clock_.at(clock_.now() + kDelay, [this, generation, deliver = std::move(deliver)] {
    if (up_ && generation == generation_) deliver();
  });
}

void World::when_up(Task task) {
  if (up_) return task();
  waiting_for_link_.push_back(std::move(task));
}

void World::connect() {
  if (up_ || !source().daemon || !peer().daemon) return;
  up_ = true;
  ++generation_;
  for (const auto& host : hosts_) {
    Host& to = host->other();
    const PeerOwnership hello = host->daemon->coordinator->hello();
    in_order([&to, hello] {
      if (to.daemon) (void)to.daemon->coordinator->on_hello(hello);
    });
  }
  std::vector<Task> waiting;
  waiting.swap(waiting_for_link_);
  for (Task& task : waiting) task();
}

void World::cut() {
  if (!up_) return;
  up_ = false;
  ++generation_;
  for (const auto& host : hosts_)
    if (host->daemon) host->daemon->coordinator->on_disconnected();
}

void World::restore() {
  connect();
}

void World::kill_daemon(Host& host) {
  if (!host.daemon) return;
  const std::unique_ptr<Daemon> dead = std::move(host.daemon);
  cut();
  host.parked.clear();  // the clients' connections are gone with it
  host.gate = Gate::Refused;
}

void World::start_daemon(Host& host) {
  host.daemon = std::make_unique<Daemon>(host, options.coordinator);
  host.daemon->coordinator->resume();
}

void World::kill_qemu(Host& host) {
  QemuProcess* process = host.qemu();
  if (!process || !process->alive) return;
  process->alive = false;
  if (host.daemon) host.daemon->qemu.tell_dead();
}

void World::migrate(MigrateRequest request) {
  const Status ok = source().daemon->coordinator->migrate(request, [this](const MigrateResult& r) { result = r; });
  if (!ok) violations.push_back("migrate refused: " + ok.error().text);
}

bool World::guest_runs(Host& host) {
  return std::any_of(host.qemus.begin(), host.qemus.end(), [](const auto& entry) { return entry.second.guest_runs(); });
}

// The running guest writes; an acknowledged write must be on the disk of whoever runs next.
void World::guest_writes() {
  for (const auto& host : hosts_) {
    if (!guest_runs(*host) || !host->daemon) continue;
    write_to(*host);
  }
  // Dense around the switchover, which is in the first seconds; thin in the long waits of the limits.
  clock_.at(clock_.now() + (clock_.now() < 4 * kSecond ? 7 * kMillisecond : 700 * kMillisecond),
            [this] { guest_writes(); });
}

void World::write_to(Host& host) {
  const uint64_t number = new_write();
  if (host.gate == Gate::Open) {
    host.disk.insert(number);
    acknowledged.insert(number);
    host.daemon->devices.note_write();
  } else if (host.gate == Gate::Parked) {
    host.parked.push_back(number);
  }
}

void World::check() {
  if (split_allowed) return;
  if (source_runs() && peer_runs()) violations.push_back("two running guests: " + describe());
  if (source().gate == Gate::Open && peer().gate == Gate::Open && source().daemon && peer().daemon)
    violations.push_back("two sides accept writes: " + describe());
  if (peer_runs()) {
    if (options.guest_running && !peer().qemu()->loaded) violations.push_back("a guest without its memory");
  }
  // At the moment when a guest begins to run; later its own writes are on its own disk.
  for (const auto& host : hosts_) {
    const bool runs = guest_runs(*host);
    bool& ran = ran_[static_cast<size_t>(host->index)];
    if (runs && !ran && lacks_writes(*host)) violations.push_back("a guest lacks acknowledged writes: " + describe());
    ran = runs;
    if (runs && host->failed_writes_of == host->qemu_now)
      violations.push_back("a guest runs on after its parked writes were failed: " + describe());
    const HandoverState state = host->record.state;
    if (runs && (state == HandoverState::Secondary || state == HandoverState::Prepared ||
                 state == HandoverState::Primary || state == HandoverState::Aborted))
      violations.push_back("a guest runs without a durable right: " + describe());
  }
}

bool World::guest_began(Host& host) {
  const QemuProcess* process = host.qemu();
  return process && process->alive && process->run != RunState::InMigrate;
}

bool World::lacks_writes(Host& host) const {
  return !std::includes(host.disk.begin(), host.disk.end(), acknowledged.begin(), acknowledged.end());
}

bool World::step() {
  if (!clock_.step()) return false;
  ++steps_;
  if (violations.empty()) check();
  return true;
}

void World::run_for(Nanoseconds duration) {
  const Nanoseconds end = clock_.now() + duration;
  while (!clock_.empty() && clock_.next_time() <= end) step();
}

std::string World::describe() {
  std::string text = fmt::format("t={}ms link={}", clock_.now() / kMillisecond, up_ ? "up" : "down");
  for (const auto& host : hosts_) {
    const QemuProcess* process = host->qemu();
    text += fmt::format("; {} {} term {} gate {} qemu {} run {} migration {}", host->index == 0 ? "source" : "peer",
                        to_string(host->record.state), host->record.term, static_cast<int>(host->gate),
                        process && process->alive ? "alive" : "dead", process ? static_cast<int>(process->run) : -1,
                        process ? static_cast<int>(process->migration) : -1);
  }
  return text;
}

}  // namespace vmferry::fake
