// SPDX-License-Identifier: Apache-2.0
//
// A TrackedDevice on simulated disks, with a small region size so that few blocks fill the activity log.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <set>

#include "engine/base/log.h"
#include "engine/track/tracked_device.h"
#include "tests/sim/sim_disk.h"

namespace vmferry {

// One request with its own buffer; `error` is set when it completed.
struct TestRequest final : BlockCompletion {
  BlockRequest request;
  Bytes data;
  std::optional<Errno> error;
  std::function<void()> on_done;

  void block_done(BlockRequest&, Errno result) noexcept override {
    EXPECT_FALSE(error) << "completed twice";
    error = result;
    if (on_done) on_done();
  }
  static std::unique_ptr<TestRequest> make(BlockOp op, uint64_t offset, uint64_t length, uint8_t fill = 0) {
    auto made = std::make_unique<TestRequest>();
    made->data.assign(op == BlockOp::WriteZeroes ? 0 : length, fill);
    made->request = {.op = op,
                     .range = {offset, length},
                     .data = op == BlockOp::WriteZeroes || op == BlockOp::Flush ? nullptr : made->data.data(),
                     .completion = made.get()};
    return made;
  }
};

class TrackTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kBlock = 4096;
  static constexpr uint64_t kRegion = 32_KiB;
  static constexpr uint64_t kSize = 2_MiB;  // 64 regions, 512 blocks

  void SetUp() override {
    log::set_sink([](log::Level, std::string_view) {});
  }
  void TearDown() override { log::set_sink({}); }

  void start_world(uint64_t seed, uint64_t size = kSize) {
    device.reset();
    store.reset();
    metadata.reset();
    world = std::make_unique<sim::SimWorld>(seed);
    executor = &world->add_executor("daemon");
    store = std::make_unique<sim::SimDisk>(*executor, size);
    metadata = std::make_unique<sim::SimDisk>(*executor, TrackedDevice::metadata_size(size));
  }
  TrackOptions options() {
    TrackOptions o;
    o.name = "vda";
    o.region_size = kRegion;
    o.active_regions_max = slots;
    o.save_interval = 20 * kMillisecond;
    o.idle_interval = idle_interval;
    o.stamp = [this] { return stamp; };
    o.faults = faults;
    return o;
  }
  Status open_device() {
    device = std::make_unique<TrackedDevice>(*executor, *store, *metadata, options());
    return wait([this](TrackedDevice::Done done) { device->open(std::move(done)); });
  }
  Status wait(const std::function<void(TrackedDevice::Done)>& start) {
    std::optional<Status> result;
    start([&result](Status status) { result = std::move(status); });
    EXPECT_TRUE(world->run_until([&] { return result.has_value(); })) << "never completed";
    return result ? *result : Status(fail(ErrorKind::Timeout, "never completed"));
  }
  Status activate(Baseline baseline) {
    return wait([&](TrackedDevice::Done done) { device->activate_tracking(baseline, std::move(done)); });
  }
  Status close_device() {
    return wait([this](TrackedDevice::Done done) { device->close(std::move(done)); });
  }
  void crash(bool power) {
    executor->kill();
    device.reset();
    power ? store->power_cut() : store->daemon_died();
    power ? metadata->power_cut() : metadata->daemon_died();
  }
  Errno run(TestRequest& request) {
    device->submit(request.request);
    EXPECT_FALSE(request.error) << "completed inline";
    EXPECT_TRUE(world->run_until([&] { return request.error.has_value(); }));
    return request.error.value_or(-1);
  }
  Errno write(uint64_t offset, uint64_t length, uint8_t fill) {
    return run(*TestRequest::make(BlockOp::Write, offset, length, fill));
  }
  std::set<uint64_t> open_blocks() {
    DirtyConsumer& consumer = device->consumer();
    std::set<uint64_t> blocks;
    EXPECT_TRUE(consumer.can_seal());
    consumer.seal();
    uint64_t from = 0;
    while (const auto run = consumer.next_run(from, kRegion)) {
      for (uint64_t at = run->offset; at < run->end(); at += kBlock) blocks.insert(at / kBlock);
      from = run->end();
    }
    consumer.merge_sealed_back();
    return blocks;
  }

  std::unique_ptr<sim::SimWorld> world;
  sim::SimExecutor* executor = nullptr;
  std::unique_ptr<sim::SimDisk> store;
  std::unique_ptr<sim::SimDisk> metadata;
  std::unique_ptr<TrackedDevice> device;
  StoreStamp stamp;
  TrackFaults faults;
  uint32_t slots = 8;
  Nanoseconds idle_interval = 15 * kMillisecond;
};

}  // namespace vmferry
