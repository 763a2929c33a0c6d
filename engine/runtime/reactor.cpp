// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/reactor.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <time.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "engine/base/assert.h"
#include "engine/runtime/uring.h"
#include "engine/runtime/worker_pool.h"

namespace vmferry {

namespace {

constexpr size_t kScratchSize = 256_KiB;
constexpr int kEventsPerRound = 128;
constexpr WatchId kWakeId = 0;

Nanoseconds read_clock(clockid_t clock) {
  timespec ts{};
  clock_gettime(clock, &ts);
  return static_cast<Nanoseconds>(ts.tv_sec) * kSecond + ts.tv_nsec;
}

}  // namespace

Result<std::unique_ptr<Reactor>> Reactor::create(const ReactorOptions& options) {
  std::unique_ptr<Reactor> reactor(new Reactor);
  reactor->epoll_.reset(epoll_create1(EPOLL_CLOEXEC));
  if (!reactor->epoll_.valid()) return fail(ErrorKind::Internal, "epoll_create1: {}", errno_text(errno));
  reactor->event_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!reactor->event_.valid()) return fail(ErrorKind::Internal, "eventfd: {}", errno_text(errno));
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kWakeId}};
  if (epoll_ctl(reactor->epoll_.get(), EPOLL_CTL_ADD, reactor->event_.get(), &event) != 0)
    return fail(ErrorKind::Internal, "epoll_ctl: {}", errno_text(errno));
  reactor->scratch_.resize(kScratchSize);
  try {
    reactor->workers_ = std::make_unique<WorkerPool>(
        std::max(1U, options.worker_count),
        [self = reactor.get()](Task done) { self->post_from_any_thread(std::move(done)); });
  } catch (const std::system_error& error) {
    return fail(ErrorKind::LimitExceeded, "start worker threads: {}", error.what());
  }
  return reactor;
}

Reactor::~Reactor() {
  workers_.reset();
}

Result<Uring*> Reactor::uring() {
  if (uring_ == nullptr) {
    auto made = Uring::create(epoll_.get());
    if (!made) return tl::unexpected(made.error());
    uring_ = std::move(*made);
  }
  return uring_.get();
}

Nanoseconds Reactor::now() const {
  return read_clock(CLOCK_MONOTONIC);
}

Nanoseconds Reactor::wall_now() const {
  return read_clock(CLOCK_REALTIME);
}

void Reactor::post(Task task) {
  posted_.push_back(std::move(task));
}

TimerId Reactor::start_timer(Nanoseconds delay, Task task) {
  const TimerId id = timer_next_++;
  deadlines_.push({now() + std::max<Nanoseconds>(delay, 0), id});
  timers_.emplace(id, std::move(task));
  return id;
}

void Reactor::cancel_timer(TimerId id) {
  // The task may own what is being destroyed right now: it goes after the table is consistent again.
  const auto it = timers_.find(id);
  if (it == timers_.end()) return;
  const Task doomed = std::move(it->second);
  timers_.erase(it);
  if (deadlines_.size() > 64 && deadlines_.size() > 2 * timers_.size()) drop_cancelled_deadlines();
}

// Timers that are always cancelled before they are due (timeouts of requests) would otherwise pile up in the heap.
void Reactor::drop_cancelled_deadlines() {
  std::vector<Deadline> kept;
  kept.reserve(timers_.size());
  while (!deadlines_.empty()) {
    if (timers_.contains(deadlines_.top().id)) kept.push_back(deadlines_.top());
    deadlines_.pop();
  }
  for (const Deadline& deadline : kept) deadlines_.push(deadline);
}

void Reactor::offload(Task work, Task done) {
  workers_->submit(std::move(work), std::move(done));
}

void Reactor::post_from_any_thread(Task task) {
  bool first = false;
  {
    const std::lock_guard lock(remote_mutex_);
    first = remote_.empty();
    remote_.push_back(std::move(task));
  }
  if (first) wake();
}

void Reactor::wake() {
  const uint64_t one = 1;
  // EAGAIN means that the counter is at its maximum: a wake-up is pending anyway.
  [[maybe_unused]] const ssize_t ignored = ::write(event_.get(), &one, sizeof one);
}

void Reactor::stop() {
  stop_.store(true);
  wake();
}

void Reactor::run() {
  do {
    round(INT64_MAX);
  } while (!stop_.load());
  stop_.store(false);
}

bool Reactor::run_until(const std::function<bool()>& condition, Nanoseconds timeout) {
  const Nanoseconds deadline = now() + timeout;
  while (!condition()) {
    const Nanoseconds left = deadline - now();
    if (left <= 0) return false;
    round(std::min(left, 10 * kMillisecond));  // the condition may become true without an event
  }
  return true;
}

WatchId Reactor::watch(int fd, uint32_t events, FdCallback callback) {
  const WatchId id = watch_next_++;
  watches_.emplace(id, Watch{fd, 0, std::make_shared<FdCallback>(std::move(callback))});
  set_events(id, events);
  return id;
}

void Reactor::set_events(WatchId id, uint32_t events) {
  const auto it = watches_.find(id);
  VF_ASSERT(it != watches_.end());
  Watch& watch = it->second;
  if (watch.events == events) return;
  // With no interest the descriptor leaves epoll, because EPOLLHUP and EPOLLERR would be reported all the time.
  const int operation = events == 0 ? EPOLL_CTL_DEL : watch.events == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
  epoll_event event{.events = events, .data = {.u64 = id}};
  VF_ASSERT(epoll_ctl(epoll_.get(), operation, watch.fd, &event) == 0);
  watch.events = events;
}

void Reactor::unwatch(WatchId id) {
  const auto it = watches_.find(id);
  if (it == watches_.end()) return;
  if (it->second.events != 0) epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, it->second.fd, nullptr);
  const Watch doomed = std::move(it->second);  // its callback may own the caller
  watches_.erase(it);
}

void Reactor::round(Nanoseconds wait_max) {
  ++round_number_;
  run_posted();
  run_deferred();
  Nanoseconds wait = wait_time(wait_max);
  if (uring_ != nullptr) {
    if (!uring_->wait(wait)) return run_timers();
    wait = 0;
  }
  const timespec timeout{.tv_sec = wait / kSecond, .tv_nsec = wait % kSecond};
  epoll_event events[kEventsPerRound];
  const int count =
      epoll_pwait2(epoll_.get(), events, kEventsPerRound, wait == INT64_MAX ? nullptr : &timeout, nullptr);
  VF_ASSERT(count >= 0 || errno == EINTR);
  for (int i = 0; i < count; ++i) {
    const WatchId id = events[i].data.u64;  // a copy: epoll_event is packed, so this is not aligned
    if (id == kWakeId) {
      take_remote();
      continue;
    }
    const auto it = watches_.find(id);
    if (it == watches_.end()) continue;  // unwatched by an earlier callback of this round
    const std::shared_ptr<FdCallback> callback = it->second.callback;
    (*callback)(events[i].events);
  }
  run_timers();
}

Nanoseconds Reactor::wait_time(Nanoseconds wait_max) {
  if (!posted_.empty() || !deferred_.empty() || stop_.load()) return 0;
  while (!deadlines_.empty() && !timers_.contains(deadlines_.top().id)) deadlines_.pop();
  if (deadlines_.empty()) return wait_max;
  return std::min(wait_max, std::max<Nanoseconds>(0, deadlines_.top().when - now()));
}

void Reactor::run_posted() {
  std::vector<Task> tasks;
  tasks.swap(posted_);  // what these post runs in the next round, so that descriptors get their turn
  for (Task& task : tasks) {
    task();
    task = nullptr;
  }
  if (posted_.empty()) {
    tasks.clear();
    posted_.swap(tasks);  // keeps the capacity
  }
}

void Reactor::run_deferred() {
  // Calls that schedule others (a completion that writes a reply) are served in the same round, but each call once:
  // one that is scheduled again waits for the next, or two of them could keep each other going for ever.
  size_t kept = 0;
  for (size_t i = 0; i < deferred_.size(); ++i) {
    DeferredCall* call = std::exchange(deferred_[i], nullptr);
    if (call == nullptr) continue;
    if (call->ran_in_round_ == round_number_) {
      deferred_[kept++] = call;
      continue;
    }
    call->scheduled_ = false;
    call->ran_in_round_ = round_number_;
    call->task_();
  }
  deferred_.resize(kept);
}

void Reactor::run_timers() {
  if (deadlines_.empty()) return;
  const Nanoseconds current = now();
  while (!deadlines_.empty() && deadlines_.top().when <= current) {
    const TimerId id = deadlines_.top().id;
    deadlines_.pop();
    const auto it = timers_.find(id);
    if (it == timers_.end()) continue;
    const Task task = std::move(it->second);
    timers_.erase(it);
    task();
  }
}

void Reactor::take_remote() {
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t ignored = ::read(event_.get(), &count, sizeof count);
  std::vector<Task> tasks;
  {
    const std::lock_guard lock(remote_mutex_);
    tasks.swap(remote_);
  }
  for (Task& task : tasks) {
    task();
    task = nullptr;
  }
}

void DeferredCall::schedule() {
  if (scheduled_) return;
  scheduled_ = true;
  reactor_.deferred_.push_back(this);
}

void DeferredCall::cancel() {
  if (!scheduled_) return;
  scheduled_ = false;
  for (DeferredCall*& call : reactor_.deferred_)
    if (call == this) call = nullptr;
}

Result<std::unique_ptr<SignalWatch>> SignalWatch::create(Reactor& reactor, const std::vector<int>& signals,
                                                         std::function<void(int)> callback) {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : signals) sigaddset(&set, signal);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  UniqueFd fd(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.valid()) return fail(ErrorKind::Internal, "signalfd: {}", errno_text(errno));
  return std::unique_ptr<SignalWatch>(new SignalWatch(reactor, std::move(fd), std::move(callback)));
}

SignalWatch::SignalWatch(Reactor& reactor, UniqueFd fd, std::function<void(int)> callback)
    : reactor_(reactor), fd_(std::move(fd)), callback_(std::move(callback)) {
  watch_ = reactor_.watch(fd_.get(), EPOLLIN, [this](uint32_t) { readable(); });
}

SignalWatch::~SignalWatch() {
  reactor_.unwatch(watch_);
}

void SignalWatch::readable() {
  signalfd_siginfo info{};
  const auto alive = alive_.token();
  while (alive() && ::read(fd_.get(), &info, sizeof info) == static_cast<ssize_t>(sizeof info))
    callback_(static_cast<int>(info.ssi_signo));
}

}  // namespace vmferry
