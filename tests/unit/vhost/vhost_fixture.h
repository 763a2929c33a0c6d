// SPDX-License-Identifier: Apache-2.0
//
// A back-end on a reactor thread, on a disk in memory that can hold, refuse and count requests; the front-end of
// perf/vhost drives it from the test's thread.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "blockdev/vhost/vhost_server.h"
#include "engine/runtime/endpoint.h"
#include "perf/vhost/driver/blk_queue.h"

namespace vmferry {

// Lives on the reactor's thread; the switches are set from the test's.
class TestDisk final : public BlockDevice {
 public:
  TestDisk(Executor& executor, uint64_t size) : executor_(executor), content_(size) {}

  uint64_t size() const noexcept override { return size_shown_ != 0 ? size_shown_.load() : content_.size(); }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override {
    ++submitted;
    {
      const std::lock_guard lock(seen_mutex_);
      seen_.push_back(request);
    }
    if (hold) return held_.push_back(&request);
    executor_.post([this, &request] { finish(request); });
  }
  void query_extents(ByteRange, size_t, ExtentsDone done) override { done(std::vector<Extent>{}); }

  // On the reactor's thread.
  void release() {
    hold = false;
    for (BlockRequest* request : std::exchange(held_, {})) finish(*request);
  }
  size_t held() const { return held_.size(); }

  std::vector<BlockRequest> seen() {
    const std::lock_guard lock(seen_mutex_);
    return seen_;
  }
  uint8_t* content() { return content_.data(); }
  void show_size(uint64_t size) { size_shown_ = size; }

  std::atomic<bool> hold{false};
  std::atomic<Errno> error{0};
  std::atomic<uint64_t> lost_offset{UINT64_MAX};  // writes there are answered and not carried out
  std::atomic<uint64_t> submitted{0};

 private:
  void finish(BlockRequest& request) {
    uint8_t* at = content_.data() + request.range.offset;
    if (error == 0 && request.op != BlockOp::Flush && request.range.end() <= content_.size()) {
      if (request.op == BlockOp::Read) std::memcpy(request.data, at, request.range.length);
      if (request.op == BlockOp::Write && request.range.offset != lost_offset)
        std::memcpy(at, request.data, request.range.length);
      if (request.op == BlockOp::WriteZeroes) std::memset(at, 0, request.range.length);
    }
    request.completion->block_done(request, error);
  }

  Executor& executor_;
  std::vector<uint8_t> content_;
  std::atomic<uint64_t> size_shown_{0};
  BlockLimits limits_;
  std::vector<BlockRequest*> held_;
  std::mutex seen_mutex_;
  std::vector<BlockRequest> seen_;
};

class VhostBackend {
 public:
  explicit VhostBackend(uint64_t disk_size = 8_MiB, const VhostExport& settings = {}, const VhostLimits& limits = {}) {
    auto reactor = Reactor::create();
    EXPECT_TRUE(reactor);
    reactor_ = std::move(*reactor);
    disk = std::make_unique<TestDisk>(*reactor_, disk_size);
    thread_ = std::thread([this] { reactor_->run(); });
    settings_ = settings;
    limits_ = limits;
    restart();
  }
  ~VhostBackend() {
    disk->error = 0;
    run([this] { disk->release(); });
    drain();
    run([this] { server_.reset(); });
    reactor_->stop();
    thread_.join();
  }

  // Runs on the reactor's thread and waits.
  template <typename Work>
  void run(Work work) {
    std::promise<void> done;
    reactor_->post_from_any_thread([&] {
      work();
      done.set_value();
    });
    done.get_future().wait();
  }
  void drain() {
    if (server_ == nullptr) return;
    auto done = std::make_shared<std::promise<void>>();
    auto future = done->get_future();
    run([&] {
      server_->drain([this, done] {
        reactor_->post([this, done] {
          server_.reset();
          done->set_value();
        });
      });
    });
    future.wait();
  }
  // A new server, as after a restart of the daemon.
  void restart() {
    run([&] {
      VhostExport config = settings_;
      if (config.name.empty()) config.name = "test-volume";
      config.device = disk.get();
      server_ = std::make_unique<VhostServer>(*reactor_, config, limits_);
    });
  }
  UniqueFd dial() {
    auto pair = make_socket_pair();
    EXPECT_TRUE(pair);
    const int flags = fcntl(pair->first.get(), F_GETFL);
    fcntl(pair->first.get(), F_SETFL, flags & ~O_NONBLOCK);
    run([&] { server_->accept(std::move(pair->second)); });
    return std::move(pair->first);
  }
  VhostStats stats() {
    VhostStats stats;
    run([&] { stats = server_->stats(); });
    return stats;
  }
  VhostServer& server() { return *server_; }
  template <typename Condition>
  bool eventually(Condition condition) {
    for (int i = 0; i < 15000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }

  std::unique_ptr<TestDisk> disk;

 private:
  std::unique_ptr<Reactor> reactor_;
  std::thread thread_;
  VhostExport settings_;
  VhostLimits limits_;
  std::unique_ptr<VhostServer> server_;
};

inline std::unique_ptr<perf::Frontend> make_frontend(const perf::FrontendOptions& options) {
  auto frontend = perf::Frontend::create(options);
  EXPECT_TRUE(frontend) << (frontend ? "" : frontend.error().text);
  return std::move(*frontend);
}

inline std::string variant_name(const testing::TestParamInfo<virtio::RingOptions>& info) {
  std::string name = info.param.packed ? "Packed" : "Split";
  if (info.param.indirect) name += "Indirect";
  if (info.param.event_idx) name += "EventIdx";
  return name;
}

}  // namespace vmferry
