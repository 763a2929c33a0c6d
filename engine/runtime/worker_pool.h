// SPDX-License-Identifier: Apache-2.0
//
// Threads for hashing, compression and calls that block, behind Executor::offload.
//
// Jobs start in the order submitted, at most thread_count at a time; completions go back through `deliver`.
// Threads: submit() from the owner's thread; `deliver` is called on workers.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/runtime/executor.h"

namespace vmferry {

class WorkerPool {
 public:
  WorkerPool(unsigned thread_count, std::function<void(Task)> deliver);
  ~WorkerPool();  // waits for running jobs, drops queued ones
  void submit(Task work, Task done);

 private:
  struct Job {
    Task work;
    Task done;
  };
  void run();

  std::function<void(Task)> deliver_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Job> jobs_;   // guarded by mutex_
  bool stopping_ = false;  // guarded by mutex_
  std::vector<std::thread> threads_;
};

}  // namespace vmferry
