// SPDX-License-Identifier: Apache-2.0
//
// Two hosts, each with a daemon (a HandoverCoordinator and fakes of what it drives) and a QEMU, and a link, on one
// virtual clock. Deterministic: no seed, events in the order of their time.
//
// Fault model: the link is cut and comes back (what is in flight is lost); a daemon dies and a new one starts from the
// last durable record (a save in flight is lost); a QEMU process dies. A fake QEMU behaves as docs/migration.md says
// that real ones do: it runs the guest again by itself when cancelled at pre-switchover or when its socket closes
// during the tail, does not notice a socket that closes at pre-switchover, and cannot be loaded twice. After every
// event the world checks: never two running guests, a guest at the peer has its whole memory and every acknowledged
// write, and no two sides accept writes. Threads: one.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "engine/migrate/coordinator.h"

namespace vmferry::fake {

class Clock {
 public:
  using Key = std::pair<Nanoseconds, uint64_t>;
  Nanoseconds now() const { return now_; }
  Key at(Nanoseconds when, Task task);
  void cancel(const Key& key) { tasks_.erase(key); }
  bool step();  // runs the next task; false: none is left
  bool empty() const { return tasks_.empty(); }
  Nanoseconds next_time() const { return tasks_.begin()->first.first; }

 private:
  Nanoseconds now_ = kSecond;
  uint64_t next_ = 1;
  std::map<Key, Task> tasks_;
};

class FakeExecutor final : public Executor {
 public:
  FakeExecutor(Clock& clock, uint64_t& ids) : clock_(clock), ids_(ids) {}
  ~FakeExecutor() override {
    for (const auto& [id, key] : timers_) clock_.cancel(key);
  }
  Nanoseconds now() const override { return clock_.now(); }
  Nanoseconds wall_now() const override { return clock_.now(); }
  void post(Task task) override { start_timer(0, std::move(task)); }
  TimerId start_timer(Nanoseconds delay, Task task) override;
  void cancel_timer(TimerId id) override;
  void offload(Task work, Task done) override {
    work();
    post(std::move(done));
  }
  Id128 new_id() override;

 private:
  Clock& clock_;
  uint64_t& ids_;
  TimerId next_ = 1;
  std::map<TimerId, Clock::Key> timers_;
};

class World;
struct Host;

constexpr const char* kCapabilities = "events,xbzrle";  // of a QEMU whose operator migrates it in other ways, too

// The process; outlives daemons.
struct QemuProcess {
  uint64_t number = 0;
  bool alive = true;
  RunState run = RunState::Running;
  MigrationState migration = MigrationState::None;
  bool fresh_incoming = false;  // started with -incoming
  bool loaded = false;          // has the whole memory of the guest
  bool socket_open = false;
  bool refuses_cont = false;
  Nanoseconds migrate_delay = 0;  // how long `migrate` takes to be carried out
  bool fits_into_socket = false;  // a guest so small that its whole memory is written before anybody reads
  bool hangs = false;             // does not answer
  bool long_tail = false;         // the tail does not fit between QEMU and the link: written only as the peer takes it
  bool was_running = true;        // when its migration began
  std::string capabilities = kCapabilities;
  int announced = 0;             // times
  bool announced_early = false;  // while the guest did not run
  bool guest_runs() const { return alive && run == RunState::Running; }
};

class FakeQemu final : public Qemu {
 public:
  FakeQemu(World& world, Host& host) : world_(world), host_(host) {}
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

  void tell_run(RunState run);
  void tell_migration(MigrationState state);
  void tell_dead();
  void try_pre_switchover();

 private:
  // Runs on the process when it answers, if it is alive then.
  void command(Done done, std::function<Status(QemuProcess&)> act, Nanoseconds delay = 0);
  static bool writes_in_vain(Host& host, const QemuProcess& process);
  static void end_tail(Host& host, uint64_t to);

  World& world_;
  Host& host_;
  QemuEvents events_;
  uint64_t connected_to_ = 0;
};

enum class Gate : uint8_t { Open, Parked, Refused };

struct Daemon;

struct Host {
  explicit Host(World& world_in, int index_in) : world(world_in), index(index_in) {}
  World& world;
  int index;  // 0 source, 1 peer
  // durable
  Ownership record;
  std::set<uint64_t> disk;  // numbers of writes
  Id128 final_attempt{};
  uint64_t final_epoch = 0;
  // processes
  std::map<uint64_t, QemuProcess> qemus;  // all that ever were
  uint64_t qemu_now = 0;                  // behind the QMP path
  std::unique_ptr<Daemon> daemon;
  Gate gate = Gate::Refused;
  std::vector<uint64_t> parked;
  uint64_t failed_writes_of = 0;  // QEMU whose parked writes were failed

  QemuProcess* qemu() { return qemu_now == 0 ? nullptr : &qemus[qemu_now]; }
  Host& other();
};

class FakeStore final : public OwnershipStore {
 public:
  FakeStore(Host& host, Executor& executor) : host_(host), executor_(executor) {}
  void save(const Ownership& ownership, std::function<void(Status)> done) override;

 private:
  Host& host_;
  Executor& executor_;
};

class FakeChannel final : public GroupChannel {
 public:
  explicit FakeChannel(Host& host) : host_(host) {}
  bool connected() const override;
  bool peer_has(uint64_t) const override { return connected(); }
  void send(TrafficClass traffic, MessageType type, Bytes payload) override;
  uint64_t queued_bytes(TrafficClass) const override { return 0; }
  uint64_t queue_limit(TrafficClass) const override { return 1 << 20; }
  LinkFigures figures() const override;

 private:
  Host& host_;
};

class FakeDevices final : public GroupDevices {
 public:
  FakeDevices(Host& host, Executor& executor) : host_(host), executor_(executor) {}
  void park_writes() override;
  void quiesce(std::function<void(Status)> done) override;
  void accept_writes() override;
  void refuse_writes() override;
  void notice_first_write(std::function<void()> noticed) override {
    noticed_ = std::move(noticed);
    wrote_ = false;
  }
  bool wrote() const override { return wrote_; }
  void note_write();

 private:
  Host& host_;
  Executor& executor_;
  std::function<void()> noticed_;
  bool wrote_ = false;
};

class FakeReplication final : public GroupReplication {
 public:
  FakeReplication(Host& host, Executor& executor) : host_(host), executor_(executor) {}
  void ensure_started(std::function<void(Status)> done) override;
  RoundProgress progress() const override;
  void run_round_now(const RoundOptions& options, std::function<void(Status)> done) override;
  void send_final_epoch(const Id128& attempt, std::function<void(Result<uint64_t>)> done) override;
  void cancel_final_epoch() override { ++final_number_; }
  void prepare_to_follow(uint64_t epoch, std::function<void(Status)> done) override;
  void prepare_to_own(const OwnOptions& asked, std::function<void(Status)> done) override {
    const bool refused = half_applied && !asked.accept_inconsistent;
    executor_.post([refused, done = std::move(done)] {
      done(refused ? fail(ErrorKind::Io, "an epoch is applied in part") : Status{});
    });
  }
  void set_final_epoch_listener(std::function<void(const Id128&, uint64_t)> durable) override {
    listener_ = std::move(durable);
  }
  Id128 durable_final_attempt(uint64_t& epoch) const override {
    epoch = host_.final_epoch;
    return host_.final_attempt;
  }
  bool copy_is_consistent() const override { return true; }
  void final_arrived(const Id128& attempt, uint64_t epoch) { listener_(attempt, epoch); }
  uint64_t followed_epoch = 0;
  bool half_applied = false;

 private:
  void copy_to_peer(std::set<uint64_t> snapshot, std::function<void()> arrived);
  Host& host_;
  Executor& executor_;
  std::function<void(const Id128&, uint64_t)> listener_;
  uint64_t final_number_ = 0;
  std::shared_ptr<int> token_ = std::make_shared<int>(0);
};

class FakeMemory final : public MemoryCarrier {
 public:
  FakeMemory(Host& host, Executor& executor) : host_(host), executor_(executor) {}
  void start_source(std::unique_ptr<ByteStream> from_qemu, const Id128& attempt, SourceEvents events) override;
  void hold(bool held) override;
  void start_sink(std::unique_ptr<ByteStream> to_qemu, const Id128& attempt, SinkEvents events) override;
  void stop() override;
  MemoryFigures figures() const override { return {.raw_bytes = 1000, .wire_bytes = 100, .queued_bytes = 0}; }

  bool held() const { return held_; }
  bool sourcing(const Id128& attempt) const { return source_stream_ && attempt_ == attempt; }
  const Id128& attempt() const { return attempt_; }
  bool sinking(const Id128& attempt) const { return sink_stream_ && attempt_ == attempt; }
  void deliver_tail(const Id128& attempt);  // at the source: whole stream is on its way, as soon as the link allows
  void loaded(const Id128& attempt);        // at the sink: QEMU got every byte

 private:
  Host& host_;
  Executor& executor_;
  Id128 attempt_{};
  bool held_ = false;
  std::unique_ptr<ByteStream> source_stream_;
  std::unique_ptr<ByteStream> sink_stream_;
  SinkEvents sink_events_;
  std::shared_ptr<int> token_ = std::make_shared<int>(0);
};

struct Daemon {
  Daemon(Host& host, CoordinatorOptions options);
  FakeExecutor executor;
  FakeStore store;
  FakeChannel channel;
  FakeDevices devices;
  FakeReplication replication;
  FakeMemory memory;
  FakeQemu qemu;
  std::vector<Role> roles;
  std::vector<std::string> alerts;
  std::vector<MigratePhase> phases;
  std::unique_ptr<HandoverCoordinator> coordinator;
};

struct WorldOptions {
  CoordinatorOptions coordinator;
  bool guest_running = true;
};

class World {
 public:
  explicit World(WorldOptions options = {});
  ~World();

  Host& source() { return *hosts_[0]; }
  Host& peer() { return *hosts_[1]; }
  Clock& clock() { return clock_; }

  // --- faults
  void cut();
  void restore();
  void kill_daemon(Host& host);
  void start_daemon(Host& host);
  void restart_daemon(Host& host) {
    kill_daemon(host);
    start_daemon(host);
  }
  void kill_qemu(Host& host);
  uint64_t start_fresh_qemu(Host& host);

  void migrate(MigrateRequest request = {});
  std::optional<MigrateResult> result;

  bool step();  // one event, and the checks
  void run_for(Nanoseconds duration);
  template <typename Condition>
  bool run_until(Condition condition, Nanoseconds limit = 600 * kSecond) {
    const Nanoseconds end = clock_.now() + limit;
    while (!condition()) {
      if (clock_.now() > end || !step()) return condition();
    }
    return true;
  }
  uint64_t steps() const { return steps_; }
  HandoverState state(Host& host) const { return host.record.state; }
  bool source_runs() { return guest_runs(source()); }
  bool peer_runs() { return guest_runs(peer()); }
  static bool guest_runs(Host& host);
  static bool guest_began(Host& host);  // its QEMU has a guest, running or stopped
  uint64_t new_write() { return next_write_++; }
  std::string describe();

  // --- for the fakes
  static constexpr Nanoseconds kDelay = 20 * kMillisecond;
  bool up() const { return up_; }
  uint64_t link_generation() const { return generation_; }
  void in_order(Task deliver);  // after the delay, unless the link was cut meanwhile
  void when_up(Task task);      // once, now or at the next connection
  void connect();
  void guest_writes();
  void write_to(Host& host);   // by the guest or another client
  bool split_allowed = false;  // the operator forced a decision
  uint64_t predicted_bytes = 0;
  std::vector<std::string> violations;
  std::vector<MessageType> sent;
  std::set<uint64_t> acknowledged;
  uint64_t ids = 0;
  WorldOptions options;

 private:
  void check();
  bool lacks_writes(Host& host) const;
  Clock clock_;
  std::array<std::unique_ptr<Host>, 2> hosts_;
  bool up_ = false;
  uint64_t generation_ = 0;
  uint64_t steps_ = 0;
  uint64_t next_qemu_ = 100;
  uint64_t next_write_ = 1;
  std::array<bool, 2> ran_{true, false};  // at the last check
  std::vector<Task> waiting_for_link_;
};

}  // namespace vmferry::fake
