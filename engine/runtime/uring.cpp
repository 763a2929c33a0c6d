// SPDX-License-Identifier: Apache-2.0
//
// Flags: SINGLE_ISSUER and DEFER_TASKRUN (Linux 6.1) let completions run only when we ask for them, without
// interrupting the thread; TASKRUN_FLAG (5.19) shows in memory that there are some, so polling needs no system call.
// The ring starts disabled so that its one issuer is the thread that runs the reactor, not the one that made it.
// Older kernels: COOP_TASKRUN (5.19), then none. Requests in flight are bounded by the completion queue, so it cannot
// overflow; the rest waits in a linked list.
//
// The poll on the epoll descriptor is one-shot and armed anew for every wait: arming looks at what is ready now, which
// keeps level-triggered descriptors level-triggered. A multishot poll would report edges of the epoll's own queue only.
//
// How long is polled: like kvm's halt_poll_ns. A block that polling would have spared doubles it, a long one ends it,
// so an idle daemon does not poll at all. Nor does one with many requests in flight: there the next completion is worth
// less than the processor.
#include "engine/runtime/uring.h"

#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>

#include <algorithm>
#include <cerrno>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr unsigned kSubmissionEntries = 256;
constexpr unsigned kInFlightMax = 4096;
constexpr unsigned kReapBatch = 64;
constexpr Nanoseconds kSpinFirst = 10 * kMicrosecond;
constexpr int kLooksPerYield = 64;  // about a microsecond
constexpr unsigned kDepthScale = 16;
constexpr unsigned kSpinDepthMax = 3;  // more in flight on average: not polled
constexpr Nanoseconds kRetryAfter = kMillisecond;

Nanoseconds monotonic() {
  timespec ts{};
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<Nanoseconds>(ts.tv_sec) * kSecond + ts.tv_nsec;
}

void prepare(io_uring_sqe& entry, IoRequest& request) {
  const auto length = static_cast<unsigned>(request.length);
  switch (request.kind) {
    case IoKind::Read:
      return io_uring_prep_read(&entry, request.fd, request.data, length, request.offset);
    case IoKind::Write:
      io_uring_prep_write(&entry, request.fd, request.data, length, request.offset);
      entry.rw_flags = request.flags;
      return;
    case IoKind::DataSync:
      return io_uring_prep_fsync(&entry, request.fd, IORING_FSYNC_DATASYNC);
    case IoKind::Allocate:
      return io_uring_prep_fallocate(&entry, request.fd, request.flags, static_cast<off_t>(request.offset),
                                     static_cast<off_t>(request.length));
  }
}

}  // namespace

Result<std::unique_ptr<Uring>> Uring::create(int epoll_fd) {
  std::unique_ptr<Uring> uring(new Uring);
  constexpr unsigned kBest =
      IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED;
  int result = -EINVAL;
  for (const unsigned flags :
       {kBest, static_cast<unsigned>(IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG), 0U}) {
    io_uring_params params{};
    params.flags = flags | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;
    params.cq_entries = kInFlightMax;
    result = io_uring_queue_init_params(kSubmissionEntries, &uring->ring_, &params);
    if (result == 0) {
      uring->disabled_ = (flags & IORING_SETUP_R_DISABLED) != 0;
      uring->has_work_flag_ = (flags & IORING_SETUP_TASKRUN_FLAG) != 0;
      uring->in_flight_max_ = std::min(kInFlightMax, params.cq_entries) - 2;  // the poll and its cancellation
      break;
    }
    if (result != -EINVAL) break;  // only EINVAL means that a flag is unknown
  }
  if (result != 0) return fail(ErrorKind::Unavailable, "io_uring_queue_init failed: {}", errno_text(-result));
  uring->ring_made_ = true;
  if ((uring->ring_.features & IORING_FEAT_EXT_ARG) == 0)
    return fail(ErrorKind::Unavailable, "io_uring cannot wait with a time limit (Linux 5.11 or later can)");
  uring->epoll_fd_ = epoll_fd;
  return uring;
}

Uring::~Uring() {
  VF_ASSERT(in_flight_ == 0 && waiting_.empty());
  if (ring_made_) io_uring_queue_exit(&ring_);
}

void Uring::fill() {
  if (!poll_armed_) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    if (entry != nullptr) {
      io_uring_prep_poll_add(entry, epoll_fd_, POLLIN);
      io_uring_sqe_set_data(entry, nullptr);
      poll_armed_ = true;
    }
  }
  while (!waiting_.empty() && in_flight_ < in_flight_max_) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    if (entry == nullptr) return;  // the rest goes with the next round, which does not wait
    IoRequest& request = waiting_.pop();
    prepare(*entry, request);
    io_uring_sqe_set_data(entry, &request);
    ++in_flight_;
  }
}

bool Uring::work_pending() const {
  return io_uring_cq_ready(&ring_) > 0 ||
         (IO_URING_READ_ONCE(*ring_.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0;
}

bool Uring::wait(Nanoseconds wait_max) {
  if (disabled_) {
    disabled_ = false;
    // By system call: Debian's liburing 2.3 declares io_uring_enable_rings but does not export it.
    VF_ASSERT(syscall(__NR_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0) == 0);
  }
  fill();
  depth_ += in_flight_ - depth_ / kDepthScale;
  if (!waiting_.empty()) wait_max = in_flight_ < in_flight_max_ ? 0 : std::min(wait_max, kRetryAfter);
  const bool pending = work_pending();
  if (pending) wait_max = 0;
  if (wait_max > 0 && spin(wait_max)) wait_max = 0;
  enter(wait_max);
  return reap();
}

// Submits, then looks for completions in memory. Yields now and then: whoever else wants this processor may be the one
// that we are waiting for.
bool Uring::spin(Nanoseconds wait_max) {
  const Nanoseconds limit = std::min(spin_, wait_max);
  if (limit == 0 || !has_work_flag_ || depth_ > kSpinDepthMax * kDepthScale) return false;
  if (io_uring_sq_ready(&ring_) > 0) enter(0);
  const Nanoseconds end = monotonic() + limit;
  do {
    for (int i = 0; i < kLooksPerYield; ++i) {
      if (work_pending()) return true;
      __builtin_ia32_pause();
    }
    sched_yield();
  } while (monotonic() < end);
  return work_pending();
}

void Uring::enter(Nanoseconds wait_max) {
  if (wait_max > 0) {
    const Nanoseconds began = monotonic();
    __kernel_timespec limit{.tv_sec = wait_max / kSecond, .tv_nsec = wait_max % kSecond};
    io_uring_cqe* first = nullptr;
    const int result =
        io_uring_submit_and_wait_timeout(&ring_, &first, 1, wait_max == INT64_MAX ? nullptr : &limit, nullptr);
    VF_ASSERT(result >= 0 || result == -ETIME || result == -EINTR || result == -EAGAIN || result == -EBUSY ||
              result == -ENOMEM);
    return adapt(monotonic() - began);
  }
  if (io_uring_sq_ready(&ring_) > 0) {
    const int result = io_uring_submit(&ring_);
    // Short of memory: what is left in the submission queue goes with the next round.
    VF_ASSERT(result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY || result == -ENOMEM);
  }
  if (!has_work_flag_ || work_pending()) io_uring_get_events(&ring_);  // runs the completion work that was put off
}

void Uring::adapt(Nanoseconds waited) {
  if (waited > 4 * spin_max_) {
    spin_ = 0;
  } else if (waited <= spin_max_) {
    spin_ = std::min(spin_max_, std::max(kSpinFirst, 2 * spin_));
  }
}

bool Uring::reap() {
  bool descriptors = false;
  struct Finished {
    IoRequest* request;
    int result;
  } finished[kReapBatch];
  for (;;) {
    io_uring_cqe* entries[kReapBatch];
    const unsigned count = io_uring_cq_ready(&ring_) == 0 ? 0 : io_uring_peek_batch_cqe(&ring_, entries, kReapBatch);
    if (count == 0) return descriptors;
    for (unsigned i = 0; i < count; ++i)
      finished[i] = {static_cast<IoRequest*>(io_uring_cqe_get_data(entries[i])), entries[i]->res};
    io_uring_cq_advance(&ring_, count);
    for (unsigned i = 0; i < count; ++i) {
      if (finished[i].request == nullptr) {
        poll_armed_ = false;
        descriptors = true;
        continue;
      }
      --in_flight_;
      if (finished[i].result == -EINTR || finished[i].result == -EAGAIN) {
        waiting_.push(*finished[i].request);
        continue;
      }
      finished[i].request->completion->io_done(*finished[i].request, finished[i].result);
    }
  }
}

}  // namespace vmferry
