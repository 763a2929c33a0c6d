// SPDX-License-Identifier: Apache-2.0
//
// The real Executor: one thread with an epoll loop, timers, posted tasks and a pool of CPU workers behind it.
//
// One round of the loop: posted tasks, then deferred calls (batched socket writes), then waiting (in io_uring once a
// store uses it, else in epoll), then file I/O that finished, then ready descriptors, then due timers. Everything may
// be destroyed from inside any callback, except the Reactor. Threads: all calls on the thread that is in run(), or
// before it starts; post_from_any_thread() and stop() from any.
#pragma once

#include <signal.h>

#include <atomic>
#include <mutex>
#include <queue>
#include <unordered_map>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/result.h"
#include "engine/runtime/executor.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

class DeferredCall;
class Uring;
class WorkerPool;

using WatchId = uint64_t;  // 0 is never given out

struct ReactorOptions {
  unsigned worker_count = 2;  // CPU workers behind offload(); at least 1
};

class Reactor final : public Executor {
 public:
  using FdCallback = std::function<void(uint32_t epoll_events)>;

  // Fails when the process is out of descriptors or threads.
  static Result<std::unique_ptr<Reactor>> create(const ReactorOptions& options = {});
  ~Reactor() override;  // workers finish the job they are at; queued jobs and their `done` are dropped

  Nanoseconds now() const override;
  Nanoseconds wall_now() const override;
  void post(Task task) override;
  TimerId start_timer(Nanoseconds delay, Task task) override;
  void cancel_timer(TimerId id) override;
  void offload(Task work, Task done) override;
  Id128 new_id() override { return random_id(); }

  void post_from_any_thread(Task task);

  // Of the round of the loop that is running: what needs to be looked at once per batch of requests remembers it.
  uint64_t round_number() const { return round_number_; }

  // Runs until stop(). A stop() that came before run() ends it after one round.
  void run();
  void stop();
  // Runs until `condition` holds (checked once per round) or `timeout` is over; true when it holds. For tools and
  // tests.
  bool run_until(const std::function<bool()>& condition, Nanoseconds timeout);

  // Calls back while `fd` is ready (level-triggered EPOLLIN, EPOLLOUT...; EPOLLHUP and EPOLLERR always). The caller
  // keeps the descriptor open until unwatch(). With events == 0 nothing is reported, not even errors.
  WatchId watch(int fd, uint32_t events, FdCallback callback);
  void set_events(WatchId id, uint32_t events);
  void unwatch(WatchId id);  // 0 or unknown: no effect; no callback afterwards, not even one already due

  // Made when it is first asked for; from then on the loop waits in it. The same one, or the same error, every time.
  Result<Uring*> uring();

  // Receive buffer shared by all streams of this thread; valid within one callback.
  MutableByteSpan scratch() { return scratch_; }

 private:
  friend class DeferredCall;
  struct Watch {
    int fd;
    uint32_t events;
    std::shared_ptr<FdCallback> callback;
  };
  struct Deadline {
    Nanoseconds when;
    TimerId id;
    friend bool operator>(const Deadline& a, const Deadline& b) {
      return a.when != b.when ? a.when > b.when : a.id > b.id;
    }
  };

  Reactor() = default;
  void round(Nanoseconds wait_max);
  void run_posted();
  void run_deferred();
  void run_timers();
  Nanoseconds wait_time(Nanoseconds wait_max);
  void drop_cancelled_deadlines();
  void take_remote();
  void wake();

  UniqueFd epoll_;
  UniqueFd event_;
  std::unique_ptr<Uring> uring_;
  std::atomic<bool> stop_{false};
  uint64_t round_number_ = 0;
  std::vector<Task> posted_;
  std::vector<DeferredCall*> deferred_;
  std::unordered_map<WatchId, Watch> watches_;
  WatchId watch_next_ = 1;
  std::priority_queue<Deadline, std::vector<Deadline>, std::greater<>> deadlines_;
  std::unordered_map<TimerId, Task> timers_;
  TimerId timer_next_ = 1;
  std::vector<uint8_t> scratch_;

  std::mutex remote_mutex_;
  std::vector<Task> remote_;  // guarded by remote_mutex_

  std::unique_ptr<WorkerPool> workers_;  // last: its threads post to this object
};

// A call that runs once at the end of the current round however often it is scheduled: for batching. Scheduled again
// after it has run, it waits for the end of the next round.
class DeferredCall {
 public:
  DeferredCall(Reactor& reactor, Task task) : reactor_(reactor), task_(std::move(task)) {}
  DeferredCall(const DeferredCall&) = delete;
  DeferredCall& operator=(const DeferredCall&) = delete;
  ~DeferredCall() { cancel(); }
  void schedule();
  void cancel();

 private:
  friend class Reactor;
  Reactor& reactor_;
  Task task_;
  bool scheduled_ = false;
  uint64_t ran_in_round_ = 0;
};

// Takes signals out of their handlers into the loop: blocks them in the calling thread (so create it before the
// Reactor's workers, which inherit the mask) and calls back with the number of each that arrives.
class SignalWatch {
 public:
  static Result<std::unique_ptr<SignalWatch>> create(Reactor& reactor, const std::vector<int>& signals,
                                                     std::function<void(int)> callback);
  ~SignalWatch();

 private:
  SignalWatch(Reactor& reactor, UniqueFd fd, std::function<void(int)> callback);
  void readable();
  Reactor& reactor_;
  UniqueFd fd_;
  WatchId watch_ = 0;
  std::function<void(int)> callback_;
  Alive alive_;
};

}  // namespace vmferry
