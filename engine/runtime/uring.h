// SPDX-License-Identifier: Apache-2.0
//
// The io_uring of one reactor: carries the file I/O of all its stores, and is what the reactor waits in.
//
// A round costs one system call here: it hands over what was submitted, waits, and runs the completion work that was
// put off. Descriptors stay in epoll; one poll request on the epoll descriptor makes their readiness a completion like
// any other. Before blocking the ring may be polled in memory for a short time (adaptive, see spin_max).
// Threads: the reactor's.
#pragma once

#include <liburing.h>

#include "engine/runtime/io_queue.h"

namespace vmferry {

class Uring {
 public:
  // Fails where the kernel or a sandbox refuses io_uring.
  static Result<std::unique_ptr<Uring>> create(int epoll_fd);
  ~Uring();  // nothing may be in flight

  // Goes to the kernel with the next wait().
  void submit(IoRequest& request) noexcept { waiting_.push(request); }

  // Completes what is finished, waiting at most `wait_max` (0: not at all) if nothing is. True: descriptors in epoll
  // may be ready.
  bool wait(Nanoseconds wait_max);

  // At most this long is polled before blocking; 0 turns polling off.
  void set_spin_max(Nanoseconds spin_max) { spin_max_ = spin_max; }

 private:
  Uring() = default;
  void fill();
  bool work_pending() const;
  bool spin(Nanoseconds wait_max);
  void enter(Nanoseconds wait_max);
  bool reap();
  void adapt(Nanoseconds waited);

  io_uring ring_{};
  bool ring_made_ = false;
  bool disabled_ = false;       // until the thread that runs the reactor enters it first
  bool has_work_flag_ = false;  // the kernel shows put-off work in memory
  int epoll_fd_ = -1;
  bool poll_armed_ = false;
  unsigned in_flight_ = 0;
  unsigned in_flight_max_ = 0;
  IoQueue waiting_;
  Nanoseconds spin_max_ = 50 * kMicrosecond;
  Nanoseconds spin_ = 0;
  unsigned depth_ = 0;  // mean of the requests in flight when we wait, times kDepthScale
};

}  // namespace vmferry
