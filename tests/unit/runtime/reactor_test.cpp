// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/reactor.h"

#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <set>
#include <thread>

#include "engine/runtime/gate.h"
#include "tests/unit/runtime/reactor_fixture.h"

namespace vmferry {
namespace {

class ReactorTest : public testing::TestWithParam<WaitsIn> {
 protected:
  std::unique_ptr<Reactor> make_reactor(unsigned workers = 2) { return vmferry::make_reactor(GetParam(), workers); }
};
INSTANTIATE_TEST_SUITE_P(All, ReactorTest, kBothLoops, name_of);

// Layers above rely on "never inline" and on the order of what they post.
TEST_P(ReactorTest, PostedTasksRunLaterAndInOrder) {
  auto reactor = make_reactor();
  std::vector<int> order;
  reactor->post([&] {
    order.push_back(1);
    reactor->post([&] { order.push_back(3); });
    order.push_back(2);
  });
  EXPECT_TRUE(order.empty());
  ASSERT_TRUE(reactor->run_until([&] { return order.size() == 3; }, kSecond));
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

// A timer that runs early, out of order, or after its cancellation acts on objects that are gone.
TEST_P(ReactorTest, TimersRunInOrderOfDeadlineAndNeverAfterCancel) {
  auto reactor = make_reactor();
  std::vector<int> order;
  const Nanoseconds started = reactor->now();
  Nanoseconds fired = 0;
  reactor->start_timer(20 * kMillisecond, [&] {
    order.push_back(2);
    fired = reactor->now();
  });
  const TimerId cancelled = reactor->start_timer(5 * kMillisecond, [&] { order.push_back(9); });
  reactor->start_timer(10 * kMillisecond, [&] { order.push_back(1); });
  reactor->cancel_timer(cancelled);
  reactor->cancel_timer(0);
  ASSERT_TRUE(reactor->run_until([&] { return order.size() == 2; }, kSecond));
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
  EXPECT_GE(fired - started, 20 * kMillisecond);
}

// Both due in the same round: the first cancels the second, which must then not run.
TEST_P(ReactorTest, DueTimerCancelledByAnotherInTheSameRoundDoesNotRun) {
  auto reactor = make_reactor();
  bool second_ran = false;
  TimerId second = 0;
  bool first_ran = false;
  reactor->start_timer(0, [&] {
    first_ran = true;
    reactor->cancel_timer(second);
  });
  second = reactor->start_timer(0, [&] { second_ran = true; });
  ASSERT_TRUE(reactor->run_until([&] { return first_ran; }, kSecond));
  EXPECT_FALSE(reactor->run_until([&] { return second_ran; }, 5 * kMillisecond));
}

// Request timeouts are started and cancelled millions of times; the heap must not keep them.
TEST_P(ReactorTest, ManyCancelledTimersDoNotDelayOthers) {
  auto reactor = make_reactor();
  bool ran = false;
  reactor->start_timer(kMillisecond, [&] { ran = true; });
  for (int i = 0; i < 100'000; ++i) reactor->cancel_timer(reactor->start_timer(3600 * kSecond, [] {}));
  EXPECT_TRUE(reactor->run_until([&] { return ran; }, kSecond));
}

// `done` on a worker thread would race with everything that lives on the reactor.
TEST_P(ReactorTest, OffloadRunsWorkElsewhereAndDoneHere) {
  auto reactor = make_reactor();
  const auto here = std::this_thread::get_id();
  int finished = 0;
  for (int i = 0; i < 100; ++i) {
    auto worker = std::make_shared<std::thread::id>();
    reactor->offload([worker] { *worker = std::this_thread::get_id(); },
                     [&, worker] {
                       EXPECT_NE(*worker, here);
                       EXPECT_EQ(std::this_thread::get_id(), here);
                       ++finished;
                     });
  }
  EXPECT_TRUE(reactor->run_until([&] { return finished == 100; }, 5 * kSecond));
}

// Destroyed with work queued: no job may run against freed memory, and the destructor must not hang.
TEST_P(ReactorTest, DestructionDropsQueuedJobs) {
  std::atomic<int> done{0};
  {
    auto reactor = make_reactor(1);
    for (int i = 0; i < 1000; ++i) reactor->offload([] {}, [&] { ++done; });
  }
  EXPECT_EQ(done.load(), 0);
}

TEST_P(ReactorTest, PostFromAnotherThreadWakesTheLoopAndStopEndsIt) {
  auto reactor = make_reactor();
  int count = 0;
  std::thread other([&] {
    for (int i = 0; i < 1000; ++i) reactor->post_from_any_thread([&] { ++count; });
    reactor->post_from_any_thread([&] { reactor->stop(); });
  });
  reactor->run();
  other.join();
  EXPECT_EQ(count, 1000);
}

// What a callback leaves unread has to be reported again, or a connection that was read in part hangs for ever.
TEST_P(ReactorTest, ReadyDescriptorIsReportedUntilItIsRead) {
  auto reactor = make_reactor();
  const UniqueFd fd(eventfd(1, EFD_NONBLOCK));
  int calls = 0;
  const WatchId id = reactor->watch(fd.get(), EPOLLIN, [&](uint32_t) { ++calls; });
  EXPECT_TRUE(reactor->run_until([&] { return calls == 5; }, kSecond));
  reactor->unwatch(id);
}

// More ready descriptors than one look at epoll returns: none of them may starve.
TEST_P(ReactorTest, HundredsOfReadyDescriptorsAllGetTheirTurn) {
  auto reactor = make_reactor();
  std::vector<UniqueFd> fds;
  std::set<int> called;
  for (int i = 0; i < 400; ++i) {
    fds.emplace_back(eventfd(1, EFD_NONBLOCK));
    reactor->watch(fds.back().get(), EPOLLIN, [&called, i, fd = fds.back().get()](uint32_t) {
      uint64_t count = 0;
      EXPECT_EQ(::read(fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
      called.insert(i);
    });
  }
  EXPECT_TRUE(reactor->run_until([&] { return called.size() == 400; }, 20 * kSecond)) << called.size();
}

// A loop that polls while nothing happens heats a host for nothing.
TEST_P(ReactorTest, IdleLoopSleeps) {
  auto reactor = make_reactor();
  const UniqueFd fd(eventfd(1, EFD_NONBLOCK));
  int calls = 0;
  reactor->watch(fd.get(), EPOLLIN, [&](uint32_t) {
    uint64_t count = 0;
    if (++calls < 100) return;
    EXPECT_EQ(::read(fd.get(), &count, sizeof count), static_cast<ssize_t>(sizeof count));
  });
  timespec before{};
  timespec after{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
  reactor->run_until([] { return false; }, 500 * kMillisecond);
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
  EXPECT_LT((after.tv_sec - before.tv_sec) * kSecond + after.tv_nsec - before.tv_nsec, 50 * kMillisecond);
  EXPECT_EQ(calls, 100);
}

// epoll hands out a batch: a descriptor unwatched by an earlier callback of the batch must stay silent.
TEST_P(ReactorTest, UnwatchInsideACallbackSilencesTheOthersOfTheBatch) {
  auto reactor = make_reactor();
  const UniqueFd a(eventfd(1, EFD_NONBLOCK));
  const UniqueFd b(eventfd(1, EFD_NONBLOCK));
  int calls = 0;
  WatchId first = 0;
  WatchId second = 0;
  const auto once = [&](uint32_t) {
    ++calls;
    reactor->unwatch(first);
    reactor->unwatch(second);
  };
  first = reactor->watch(a.get(), EPOLLIN, once);
  second = reactor->watch(b.get(), EPOLLIN, once);
  reactor->run_until([] { return false; }, 10 * kMillisecond);
  EXPECT_EQ(calls, 1);
}

TEST_P(ReactorTest, DeferredCallRunsOncePerRoundAndNotAfterDestruction) {
  auto reactor = make_reactor();
  int runs = 0;
  auto call = std::make_unique<DeferredCall>(*reactor, [&] { ++runs; });
  auto gone = std::make_unique<DeferredCall>(*reactor, [&] { runs += 100; });
  reactor->post([&] {
    call->schedule();
    call->schedule();
    gone->schedule();
    gone.reset();
  });
  EXPECT_TRUE(reactor->run_until([&] { return runs > 0; }, kSecond));
  EXPECT_EQ(runs, 1);
}

// A guest whose requests all end at once keeps its queue's calls going: timers, descriptors and file I/O of everybody
// else would never have their turn.
TEST_P(ReactorTest, DeferredCallsThatScheduleEachOtherLeaveTheLoopItsTurn) {
  auto reactor = make_reactor();
  int runs = 0;
  bool timer_ran = false;
  std::unique_ptr<DeferredCall> second;
  DeferredCall first(*reactor, [&] { second->schedule(); });
  second = std::make_unique<DeferredCall>(*reactor, [&] {
    if (++runs < 1'000'000) first.schedule();
  });
  reactor->start_timer(0, [&] { timer_ran = true; });
  first.schedule();
  EXPECT_TRUE(reactor->run_until([&] { return timer_ran; }, 5 * kSecond));
  EXPECT_LT(runs, 1'000) << "the timer had to wait for them";
  first.cancel();
  second->cancel();
}

TEST_P(ReactorTest, SignalWatchDeliversABlockedSignalOnTheLoop) {
  auto reactor = make_reactor();
  int seen = 0;
  auto watch = SignalWatch::create(*reactor, {SIGUSR1}, [&](int signal) { seen = signal; });
  ASSERT_TRUE(watch.has_value());
  raise(SIGUSR1);
  EXPECT_TRUE(reactor->run_until([&] { return seen == SIGUSR1; }, kSecond));
}

// An owner that frees itself while an operation is inside gets a use after free.
TEST(Gate, ClosesWhenTheLastOperationLeaves) {
  Gate gate;
  ASSERT_TRUE(gate.enter());
  ASSERT_TRUE(gate.enter());
  bool closed = false;
  gate.close([&] { closed = true; });
  EXPECT_FALSE(gate.enter());
  gate.leave();
  EXPECT_FALSE(closed);
  gate.leave();
  EXPECT_TRUE(closed);
}

}  // namespace
}  // namespace vmferry
