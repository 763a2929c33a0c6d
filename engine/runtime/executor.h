// SPDX-License-Identifier: Apache-2.0
//
// The one thread that a group of objects lives on: now, later, after a while, and "compute this elsewhere".
//
// Real: Reactor (epoll + io_uring or libaio). In tests/sim: SimExecutor, which runs every task of two daemons, a guest
// and a link in one thread in an order drawn from a seed. Everything above the runtime sees only this interface.
// Threads: all calls from the executor's own thread, except where Reactor offers more.
#pragma once

#include <functional>
#include <memory>

#include "engine/base/id.h"
#include "engine/base/units.h"

namespace vmferry {

using Task = std::function<void()>;

// Names one started timer; 0 is never given out, so it can mean "none".
using TimerId = uint64_t;

class Executor {
 public:
  virtual ~Executor() = default;

  // Monotonic time. Constant within one task in the simulator.
  virtual Nanoseconds now() const = 0;
  // Wall clock, nanoseconds since 1970, for stamps that people read. Never for ordering.
  virtual Nanoseconds wall_now() const = 0;

  // Runs `task` soon, never inline. Tasks posted from one task run in the order posted.
  virtual void post(Task task) = 0;

  // Runs `task` once, not before now() + delay. A cancelled timer never runs, not even when already due.
  virtual TimerId start_timer(Nanoseconds delay, Task task) = 0;
  virtual void cancel_timer(TimerId id) = 0;  // unknown, run or 0: no effect

  // Runs `work` on a CPU worker (it must touch only what it owns), then `done` on this thread. Jobs may finish in any
  // order; who needs an order submits one job at a time. At the worker limit jobs queue.
  virtual void offload(Task work, Task done) = 0;

  // Random but never none; deterministic in the simulator.
  virtual Id128 new_id() = 0;
};

// A timer that dies with its owner. Restarting cancels the earlier one.
class Timer {
 public:
  explicit Timer(Executor& executor) : executor_(executor) {}
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() { cancel(); }

  void start(Nanoseconds delay, Task task) {
    cancel();
    id_ = executor_.start_timer(delay, [this, run = std::move(task)] {
      id_ = 0;
      run();  // may restart or destroy this timer: nothing is touched afterwards
    });
  }
  void cancel() {
    if (id_ != 0) executor_.cancel_timer(id_);
    id_ = 0;
  }
  bool running() const { return id_ != 0; }

 private:
  Executor& executor_;
  TimerId id_ = 0;
};

// Guards callbacks against an owner that died meanwhile: `[alive = alive_.token(), this] { if (!alive()) return; ...
// }`.
class Alive {
 public:
  class Token {
   public:
    explicit Token(std::weak_ptr<const int> weak) : weak_(std::move(weak)) {}
    bool operator()() const { return !weak_.expired(); }

   private:
    std::weak_ptr<const int> weak_;
  };
  Token token() const { return Token(anchor_); }

 private:
  std::shared_ptr<const int> anchor_ = std::make_shared<const int>(0);
};

}  // namespace vmferry
