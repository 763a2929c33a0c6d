// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/worker_pool.h"

#include <pthread.h>
#include <signal.h>

#include "engine/base/assert.h"

namespace vmferry {

WorkerPool::WorkerPool(unsigned thread_count, std::function<void(Task)> deliver) : deliver_(std::move(deliver)) {
  VF_ASSERT(thread_count > 0);
  // Signals belong to the reactor's thread: the workers are born with all of them blocked, but for the one that a
  // worker gets for what it did itself (SharedMapping). Blocked, that one ends the process instead of running its
  // handler.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  sigdelset(&all, SIGBUS);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (unsigned i = 0; i < thread_count; ++i) threads_.emplace_back([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

WorkerPool::~WorkerPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  ready_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::submit(Task work, Task done) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back({std::move(work), std::move(done)});
  }
  ready_.notify_one();
}

void WorkerPool::run() {
  for (;;) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      ready_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job.work();
    job.work = nullptr;  // what it captured goes here, not on the reactor
    deliver_(std::move(job.done));
  }
}

}  // namespace vmferry
