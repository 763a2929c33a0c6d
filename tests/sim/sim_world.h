// SPDX-License-Identifier: Apache-2.0
//
// Virtual time and a seeded order of events: several daemons, guests and links in one thread, repeatable from a seed.
//
// A world holds one clock. Each process (daemon, QEMU, the test itself) has a SimExecutor; the world picks among those
// with ready tasks at random, so every interleaving of processes that real scheduling allows can come up, while posted
// tasks of one executor keep their order as on the real reactor. kill() ends a process: none of its tasks runs later.
// Threads: one.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/base/assert.h"
#include "engine/base/random.h"
#include "engine/runtime/executor.h"

namespace vmferry::sim {

class SimWorld;

class SimExecutor final : public Executor {
 public:
  SimExecutor(SimWorld& world, std::string name) : world_(world), name_(std::move(name)) {}

  Nanoseconds now() const override;
  Nanoseconds wall_now() const override { return now() + kWallOffset; }
  void post(Task task) override { ready_.push_back(std::move(task)); }
  TimerId start_timer(Nanoseconds delay, Task task) override;
  void cancel_timer(TimerId id) override { timers_.erase(id); }
  void offload(Task work, Task done) override;
  Id128 new_id() override;

  SimWorld& world() { return world_; }
  const std::string& name() const { return name_; }
  // The process died: everything it still had to do is gone. Its objects are destroyed by the caller.
  void kill() {
    ready_.clear();
    timers_.clear();
  }

 private:
  friend class SimWorld;
  static constexpr Nanoseconds kWallOffset = 1'700'000'000 * kSecond;

  SimWorld& world_;
  const std::string name_;
  std::deque<Task> ready_;
  std::map<TimerId, Task> timers_;
};

class SimWorld {
 public:
  explicit SimWorld(uint64_t seed) : random_(seed) {}

  Random& random() { return random_; }
  Nanoseconds now() const { return now_; }
  uint64_t steps() const { return steps_; }

  SimExecutor& add_executor(std::string name) {
    executors_.push_back(std::make_unique<SimExecutor>(*this, std::move(name)));
    return *executors_.back();
  }

  // Runs one task, advancing the clock when none is ready. False: nothing is left to do.
  bool step() {
    ++steps_;
    size_t ready = 0;
    for (const auto& executor : executors_) ready += executor->ready_.empty() ? 0U : 1U;
    if (ready == 0) {
      if (!advance_clock()) return false;
      return true;
    }
    size_t chosen = ready == 1 ? 0 : static_cast<size_t>(random_.below(ready));
    for (const auto& executor : executors_) {
      if (executor->ready_.empty() || chosen-- != 0) continue;
      const Task task = std::move(executor->ready_.front());
      executor->ready_.pop_front();
      task();
      break;
    }
    return true;
  }

  // The end of the world: nothing runs any more, and what tasks hold is released while everything still exists.
  void kill_all() {
    for (int again = 0; again < 2; ++again) {
      for (const auto& executor : executors_) executor->kill();
    }
  }

  // Runs until `condition` holds; false when it did not within `time_max` of virtual time or nothing is left to do.
  bool run_until(const std::function<bool()>& condition, Nanoseconds time_max = 3600 * kSecond) {
    const Nanoseconds end = now_ + time_max;
    while (!condition()) {
      if (now_ > end || !step()) return condition();
    }
    return true;
  }
  void run_for(Nanoseconds time) {
    // A timer of the world's own, so that the clock stops there even when nothing else happens.
    bool over = false;
    SimExecutor& any = *executors_.front();
    const TimerId id = any.start_timer(time, [&over] { over = true; });
    run_until([&over] { return over; }, time + kSecond);
    any.cancel_timer(id);
  }

 private:
  friend class SimExecutor;

  bool advance_clock() {
    while (!due_.empty()) {
      const auto entry = due_.begin();
      const Due due = entry->second;
      const Nanoseconds at = entry->first.first;
      due_.erase(entry);
      const auto timer = due.executor->timers_.find(due.id);
      if (timer == due.executor->timers_.end()) continue;  // cancelled, or its process died
      now_ = std::max(now_, at);
      Task task = std::move(timer->second);
      due.executor->timers_.erase(timer);
      due.executor->ready_.push_back(std::move(task));
      return true;
    }
    return false;
  }

  struct Due {
    SimExecutor* executor;
    TimerId id;
  };
  Random random_;
  Nanoseconds now_ = kSecond;
  TimerId next_timer_ = 1;
  uint64_t steps_ = 0;
  std::multimap<std::pair<Nanoseconds, uint64_t>, Due> due_;  // time, random order among equals
  std::vector<std::unique_ptr<SimExecutor>> executors_;
};

inline Nanoseconds SimExecutor::now() const {
  return world_.now();
}

inline TimerId SimExecutor::start_timer(Nanoseconds delay, Task task) {
  const TimerId id = world_.next_timer_++;
  timers_.emplace(id, std::move(task));
  world_.due_.emplace(std::pair(world_.now_ + std::max<Nanoseconds>(delay, 0), world_.random_.next()),
                      SimWorld::Due{this, id});
  return id;
}

inline void SimExecutor::offload(Task work, Task done) {
  // The work runs late, so that a caller which reads the result too early is caught.
  start_timer(static_cast<Nanoseconds>(world_.random().below(200)) * kMicrosecond,
              [work = std::move(work), done = std::move(done)] {
                work();
                done();
              });
}

inline Id128 SimExecutor::new_id() {
  Id128 id;
  for (size_t i = 0; i < id.bytes.size(); i += 8) {
    const uint64_t value = world_.random().next() | 1;
    for (size_t j = 0; j < 8; ++j) id.bytes[i + j] = static_cast<uint8_t>(value >> (8 * j));
  }
  return id;
}

}  // namespace vmferry::sim
