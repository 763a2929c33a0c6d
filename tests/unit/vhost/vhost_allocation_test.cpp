// SPDX-License-Identifier: Apache-2.0
//
// Counts what the back-end allocates per request once it is warm: nothing.
#include "perf/micro/counting/counting_new.h"
#include "tests/unit/vhost/vhost_fixture.h"

#if VMFERRY_OWN_NEW

namespace vmferry {
namespace {

// Completes once per round, without a closure per request.
class QuietDisk final : public BlockDevice {
 public:
  explicit QuietDisk(Reactor& reactor) : later_(reactor, [this] { complete(); }) {
    waiting_.reserve(1024);
    running_.reserve(1024);
  }
  uint64_t size() const noexcept override { return 1_GiB; }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override {
    waiting_.push_back(&request);
    later_.schedule();
  }
  void query_extents(ByteRange, size_t, ExtentsDone) override {}

 private:
  void complete() {
    running_.swap(waiting_);
    for (BlockRequest* request : running_) request->completion->block_done(*request, 0);
    running_.clear();
  }
  BlockLimits limits_;
  std::vector<BlockRequest*> waiting_;
  std::vector<BlockRequest*> running_;
  DeferredCall later_;
};

class VhostAllocation : public testing::TestWithParam<virtio::RingOptions> {};

INSTANTIATE_TEST_SUITE_P(Rings, VhostAllocation,
                         testing::Values(virtio::RingOptions{false, true, true}, virtio::RingOptions{true, true, true}),
                         variant_name);

// An allocator on the data path is a lock, a cache miss and, after weeks, a fragmented heap.
TEST_P(VhostAllocation, NoneForARequestOnceWarm) {
  auto reactor = Reactor::create();
  ASSERT_TRUE(reactor);
  QuietDisk disk(**reactor);
  auto server = std::make_unique<VhostServer>(**reactor, VhostExport{.name = "v", .device = &disk});
  auto pair = make_socket_pair();
  ASSERT_TRUE(pair);
  fcntl(pair->first.get(), F_SETFL, fcntl(pair->first.get(), F_GETFL) & ~O_NONBLOCK);
  server->accept(std::move(pair->second));
  std::thread thread([&] {
    counting_new::count_this_thread();
    (*reactor)->run();
  });
  {
    auto frontend = make_frontend({.ring = GetParam()});
    ASSERT_TRUE(frontend->connect(std::move(pair->first)));
    perf::BlkQueue queue(*frontend, 0, 32, 64_KiB);
    const auto load = [&](int requests) {
      int done = 0;
      int sent = 0;
      std::vector<uint16_t> idle;
      for (uint16_t i = 0; i < 32; ++i) idle.push_back(i);
      while (done < requests) {
        while (!idle.empty() && sent < requests) {
          // Data in one buffer and in several, reads and writes.
          const uint32_t piece = sent % 4 == 0 ? 4000U : 0U;
          if (!queue.add(idle.back(), sent % 2 == 0 ? virtio::kBlkIn : virtio::kBlkOut, 8, 16384, piece)) break;
          idle.pop_back();
          ++sent;
        }
        queue.flush();
        while (const auto one = queue.reap()) {
          idle.push_back(one->slot);
          ++done;
        }
        if (done < requests && (idle.empty() || sent == requests)) {
          ASSERT_TRUE(queue.wait(5000));
        }
      }
    };
    // Each request object grows to the largest chain that it has met; then nothing is left to grow.
    uint64_t allocations = 1;
    for (int round = 0; round < 10 && allocations > 0; ++round) {
      counting_new::start();
      load(20000);
      allocations = counting_new::stop();
      EXPECT_LT(allocations, 400U) << "in 20,000 requests";
    }
    EXPECT_EQ(allocations, 0U);
  }
  std::promise<void> drained;
  (*reactor)->post_from_any_thread([&] { server->drain([&] { drained.set_value(); }); });
  drained.get_future().wait();
  (*reactor)->stop();
  thread.join();
  server.reset();
}

}  // namespace
}  // namespace vmferry

#endif
