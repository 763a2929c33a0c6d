// SPDX-License-Identifier: Apache-2.0
//
// The fakes of what a coordinator drives but QEMU: clock, executor, record, channel, devices, replication, memory.
#include <algorithm>

#include "tests/unit/migrate/fake_world.h"

namespace vmferry::fake {

// --- clock and executor

Clock::Key Clock::at(Nanoseconds when, Task task) {
  const Key key{std::max(when, now_), next_++};
  tasks_.emplace(key, std::move(task));
  return key;
}

bool Clock::step() {
  if (tasks_.empty()) return false;
  auto first = tasks_.extract(tasks_.begin());
  now_ = first.key().first;
  first.mapped()();
  return true;
}

TimerId FakeExecutor::start_timer(Nanoseconds delay, Task task) {
  const TimerId id = next_++;
  timers_[id] = clock_.at(clock_.now() + delay, [this, id, task = std::move(task)] {
    timers_.erase(id);
    task();
  });
  return id;
}

void FakeExecutor::cancel_timer(TimerId id) {
  const auto found = timers_.find(id);
  if (found == timers_.end()) return;
  clock_.cancel(found->second);
  timers_.erase(found);
}

Id128 FakeExecutor::new_id() {
  Id128 id;
  const uint64_t number = ++ids_;
  for (size_t i = 0; i < 8; ++i) id.bytes[15 - i] = static_cast<uint8_t>(number >> (8 * i));
  return id;
}

// --- store, channel, devices

void FakeStore::save(const Ownership& ownership, std::function<void(Status)> done) {
  executor_.start_timer(kMillisecond, [this, ownership, done = std::move(done)] {
    host_.record = ownership;
    executor_.post([done] { done({}); });
  });
}

bool FakeChannel::connected() const {
  return host_.world.up();
}

void FakeChannel::send(TrafficClass, MessageType type, Bytes payload) {
  if (!host_.world.up()) return;
  host_.world.sent.push_back(type);
  Host& to = host_.other();
  host_.world.in_order([&to, type, payload = std::move(payload)] {
    if (to.daemon) (void)to.daemon->coordinator->on_message(type, payload);
  });
}

LinkFigures FakeChannel::figures() const {
  return {.rtt = 2 * World::kDelay, .send_rate = 10'000'000, .sent_bytes = 0, .received_bytes = 0};
}

void FakeDevices::quiesce(std::function<void(Status)> done) {
  executor_.start_timer(kMillisecond, [done = std::move(done)] { done({}); });
}

void FakeDevices::park_writes() {
  // One write of the guest is always under way when the gate closes.
  if (host_.gate == Gate::Open && World::guest_began(host_)) host_.parked.push_back(host_.world.new_write());
  host_.gate = Gate::Parked;
}

void FakeDevices::accept_writes() {
  host_.gate = Gate::Open;
  for (const uint64_t number : host_.parked) {
    host_.disk.insert(number);
    host_.world.acknowledged.insert(number);
  }
  host_.parked.clear();
}

void FakeDevices::refuse_writes() {
  host_.gate = Gate::Refused;
  if (!host_.parked.empty()) host_.failed_writes_of = host_.qemu_now;
  host_.parked.clear();
}

// Noticed late, as the daemon does, which looks now and then.
void FakeDevices::note_write() {
  wrote_ = true;
  if (!noticed_) return;
  executor_.start_timer(100 * kMillisecond, std::move(noticed_));
  noticed_ = nullptr;
}

// --- replication

void FakeReplication::ensure_started(std::function<void(Status)> done) {
  executor_.post([done = std::move(done)] { done({}); });
}

RoundProgress FakeReplication::progress() const {
  return {.connected = host_.world.up(),
          .initial_done = true,
          .remaining_bytes = 0,
          .predicted_bytes = host_.world.predicted_bytes,
          .dirty_rate = 0,
          .send_rate = 10'000'000,
          .raw_bytes = 0,
          .wire_bytes = 0};
}

// Sent again after every cut, as long as this daemon lives; `arrived` runs when the acknowledgement is back.
void FakeReplication::copy_to_peer(std::set<uint64_t> snapshot, std::function<void()> arrived) {
  World& world = host_.world;
  const auto alive = std::weak_ptr<int>(token_);
  world.when_up([this, &world, alive, snapshot = std::move(snapshot), arrived = std::move(arrived)] {
    if (alive.expired()) return;
    const uint64_t generation = world.link_generation();
    executor_.start_timer(World::kDelay, [this, &world, generation, snapshot, arrived] {
      if (!world.up() || world.link_generation() != generation || !host_.other().daemon)
        return copy_to_peer(snapshot, arrived);
      if (host_.other().record.role == Role::Secondary) host_.other().disk.insert(snapshot.begin(), snapshot.end());
      executor_.start_timer(World::kDelay, [this, &world, generation, snapshot, arrived] {
        if (!world.up() || world.link_generation() != generation) return copy_to_peer(snapshot, arrived);
        arrived();
      });
    });
  });
}

void FakeReplication::run_round_now(const RoundOptions&, std::function<void(Status)> done) {
  copy_to_peer(host_.disk, [done = std::move(done)] { done({}); });
}

void FakeReplication::send_final_epoch(const Id128& attempt, std::function<void(Result<uint64_t>)> done) {
  const uint64_t number = ++final_number_;
  World& world = host_.world;
  const auto alive = std::weak_ptr<int>(token_);
  const auto send = std::make_shared<std::function<void()>>();
  const std::set<uint64_t> snapshot = host_.disk;
  *send = [this, &world, alive, send = std::weak_ptr(send), snapshot, attempt, number, done] {
    if (alive.expired() || number != final_number_) return;
    const auto again = send.lock();
    world.when_up([this, &world, alive, again, snapshot, attempt, number, done] {
      if (alive.expired() || number != final_number_) return;
      const uint64_t generation = world.link_generation();
      executor_.start_timer(World::kDelay, [this, &world, again, snapshot, attempt, number, generation, done] {
        if (number != final_number_) return;
        Host& to = host_.other();
        if (!world.up() || world.link_generation() != generation || !to.daemon) return (*again)();
        if (to.record.role == Role::Secondary) {
          to.disk = snapshot;
          to.final_attempt = attempt;
          to.final_epoch = 17;
          to.daemon->replication.final_arrived(attempt, 17);
        }
        executor_.start_timer(World::kDelay, [number, this, done] {
          if (number == final_number_) done(uint64_t{17});
        });
      });
    });
  };
  (*send)();
}

void FakeReplication::prepare_to_follow(uint64_t epoch, std::function<void(Status)> done) {
  followed_epoch = epoch;
  executor_.start_timer(kMillisecond, [done = std::move(done)] { done({}); });
}

// --- memory

void FakeMemory::start_source(std::unique_ptr<ByteStream> from_qemu, const Id128& attempt, SourceEvents) {
  source_stream_ = std::move(from_qemu);
  attempt_ = attempt;
  held_ = false;
}

void FakeMemory::hold(bool held) {
  held_ = held;
  if (!held && host_.daemon) host_.daemon->qemu.try_pre_switchover();
}

void FakeMemory::start_sink(std::unique_ptr<ByteStream> to_qemu, const Id128& attempt, SinkEvents events) {
  sink_stream_ = std::move(to_qemu);
  attempt_ = attempt;
  sink_events_ = std::move(events);
}

void FakeMemory::stop() {
  source_stream_.reset();
  sink_stream_.reset();
  sink_events_ = {};
}

void FakeMemory::deliver_tail(const Id128& attempt) {
  World& world = host_.world;
  const auto alive = std::weak_ptr<int>(token_);
  world.when_up([this, &world, attempt, alive] {
    if (alive.expired() || !sourcing(attempt)) return;
    const uint64_t generation = world.link_generation();
    executor_.start_timer(World::kDelay, [this, &world, attempt, generation] {
      if (!sourcing(attempt)) return;
      if (!world.up() || world.link_generation() != generation) return deliver_tail(attempt);
      Host& to = host_.other();
      if (to.daemon && to.daemon->memory.sinking(attempt)) to.daemon->memory.loaded(attempt);
    });
  });
}

void FakeMemory::loaded(const Id128& attempt) {
  if (!sinking(attempt)) return;
  QemuProcess* qemu = host_.qemu();
  if (!qemu || !qemu->alive || !qemu->socket_open) return;
  executor_.start_timer(5 * kMillisecond, [this, attempt] {
    QemuProcess* process = host_.qemu();
    if (!sinking(attempt) || !process || !process->alive) return;
    process->loaded = true;
    process->migration = MigrationState::Completed;
    host_.daemon->qemu.tell_migration(MigrationState::Completed);
    executor_.start_timer(2 * kMillisecond, [this, attempt] {
      QemuProcess* now = host_.qemu();
      if (!sinking(attempt) || !now || !now->alive) return;
      now->run = RunState::Paused;
    });
    sink_events_.complete(true);
  });
}

}  // namespace vmferry::fake
