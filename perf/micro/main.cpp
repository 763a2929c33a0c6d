// SPDX-License-Identifier: Apache-2.0
//
// vmferry-micro: what one request costs in the layer between export and store: allocations and instructions.
//
//   vmferry-micro --path tracked-write --requests 100000
// The store completes at once and keeps nothing, so that only our own work is left. Instructions come from the
// processor's counter where there is one; perf/micro/instructions counts them with valgrind anywhere.
// Threads: one.
#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstring>
#include <deque>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/log.h"
#include "engine/base/random.h"
#include "engine/runtime/unique_fd.h"
#include "engine/track/tracked_device.h"
#include "perf/micro/counting/counting_new.h"

namespace vmferry::perf {
namespace {

constexpr uint64_t kVolumeSize = 1_GiB;
constexpr uint32_t kBlock = 4096;

// Runs what was posted; timers never come due, because a measurement is shorter than any of them.
class QuietExecutor final : public Executor {
 public:
  Nanoseconds now() const override { return 0; }
  Nanoseconds wall_now() const override { return 0; }
  void post(Task task) override { posted_.push_back(std::move(task)); }
  TimerId start_timer(Nanoseconds, Task) override { return ++timer_; }
  void cancel_timer(TimerId) override {}
  void offload(Task work, Task done) override {
    work();
    post(std::move(done));
  }
  Id128 new_id() override { return random_id(); }
  bool run() {
    if (posted_.empty()) return false;
    const Task task = std::move(posted_.front());
    posted_.pop_front();
    task();
    return true;
  }

 private:
  std::deque<Task> posted_;
  TimerId timer_ = 0;
};

// Completes in the order of submission when asked to. With `keep` it is a disk in memory, for the metadata.
class QuietDisk final : public BlockDevice {
 public:
  QuietDisk(uint64_t size, bool keep) : size_(size), content_(keep ? size : 0) {
    waiting_.reserve(1024);
    running_.reserve(1024);
  }
  uint64_t size() const noexcept override { return size_; }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override { waiting_.push_back(&request); }
  void query_extents(ByteRange, size_t, ExtentsDone) override {}
  bool complete() {
    if (waiting_.empty()) return false;
    running_.swap(waiting_);
    for (BlockRequest* request : running_) {
      if (!content_.empty() && request->op == BlockOp::Read)
        std::memcpy(request->data, &content_[request->range.offset], request->range.length);
      if (!content_.empty() && request->op == BlockOp::Write)
        std::memcpy(&content_[request->range.offset], request->data, request->range.length);
      request->completion->block_done(*request, 0);
    }
    running_.clear();
    return true;
  }

 private:
  const uint64_t size_;
  BlockLimits limits_;
  Bytes content_;
  std::vector<BlockRequest*> waiting_;
  std::vector<BlockRequest*> running_;
};

// `depth` requests in flight, each followed by the next, as an export has them.
class Load final : public BlockCompletion {
 public:
  Load(TrackedDevice& device, BlockOp op, size_t depth) : device_(device), data_(kBlock), requests_(depth) {
    for (BlockRequest& request : requests_) {
      request.op = op;
      request.data = data_.data();
      request.completion = this;
    }
  }
  void start(uint64_t count) {
    left_ = count;
    for (BlockRequest& request : requests_) next(request);
  }
  bool done() const { return left_ == 0 && in_flight_ == 0; }
  void block_done(BlockRequest& request, Errno error) noexcept override {
    --in_flight_;
    failed_ = failed_ || error != 0;
    next(request);
  }
  bool failed() const { return failed_; }

 private:
  void next(BlockRequest& request) noexcept {
    if (left_ == 0) return;
    --left_;
    ++in_flight_;
    request.range = {random_.below(kVolumeSize / kBlock) * kBlock, kBlock};
    device_.submit(request);
  }
  TrackedDevice& device_;
  Bytes data_;
  std::vector<BlockRequest> requests_;
  Random random_{1};
  uint64_t left_ = 0;
  uint64_t in_flight_ = 0;
  bool failed_ = false;
};

class InstructionCounter {
 public:
  InstructionCounter() {
    perf_event_attr attributes{};
    attributes.size = sizeof attributes;
    attributes.type = PERF_TYPE_HARDWARE;
    attributes.config = PERF_COUNT_HW_INSTRUCTIONS;
    attributes.exclude_kernel = 1;
    attributes.exclude_hv = 1;
    fd_.reset(static_cast<int>(syscall(SYS_perf_event_open, &attributes, 0, -1, -1, PERF_FLAG_FD_CLOEXEC)));
  }
  std::optional<uint64_t> read() const {
    uint64_t value = 0;
    if (!fd_.valid() || ::read(fd_.get(), &value, sizeof value) != sizeof value) return std::nullopt;
    return value;
  }

 private:
  UniqueFd fd_;
};

struct Arguments {
  std::string path = "tracked-write";
  uint64_t requests = 100000;
  size_t depth = 32;
  bool check = false;
};

nlohmann::json measure(const Arguments& arguments, const std::string& path) {
  QuietExecutor executor;
  QuietDisk store(kVolumeSize, false);
  QuietDisk metadata(TrackedDevice::metadata_size(kVolumeSize), true);
  TrackOptions options;
  options.name = "micro";
  TrackedDevice device(executor, store, metadata, options);
  const auto run_until = [&](const auto& condition) {
    while (!condition()) {
      // Not one after the other: `||` would starve whoever comes last.
      const bool worked = static_cast<int>(store.complete()) + static_cast<int>(metadata.complete()) +
                              static_cast<int>(executor.run()) !=
                          0;
      if (!worked) return false;
    }
    return true;
  };
  int pending = 1;
  const TrackedDevice::Done ready = [&](const Status& status) { pending = status ? pending - 1 : -1; };
  device.open(ready);
  run_until([&] { return pending <= 0; });
  if (path != "untracked-write") {
    ++pending;
    device.activate_tracking(Baseline::Clean, ready);
    run_until([&] { return pending <= 0; });
  }
  if (pending != 0) return {{"path", path}, {"error", "the device does not open"}};

  Load load(device, path == "read" ? BlockOp::Read : BlockOp::Write, arguments.depth);
  const auto run = [&](uint64_t count) {
    load.start(count);
    return run_until([&] { return load.done(); }) && !load.failed();
  };
  if (!run(arguments.requests)) return {{"path", path}, {"error", "a request failed"}};  // warms up
  const InstructionCounter counter;
  counting_new::count_this_thread();
  const auto before = counter.read();
  counting_new::start();
  const bool good = run(arguments.requests);
  const uint64_t allocations = counting_new::stop();
  const auto after = counter.read();
  if (!good) return {{"path", path}, {"error", "a request failed"}};
  nlohmann::json found = {{"path", path},
                          {"requests", arguments.requests},
                          {"allocations", allocations},
                          {"instructions_per_request", nullptr}};
  if (before && after)
    found["instructions_per_request"] = static_cast<double>(*after - *before) / static_cast<double>(arguments.requests);
  return found;
}

int run(int argc, char** argv) {
  CLI::App app{"Allocations and instructions of a request between export and store. Prints one JSON object per path."};
  Arguments arguments;
  app.add_option("--path", arguments.path, "all, tracked-write, untracked-write or read (of a tracked volume)")
      ->check(CLI::IsMember({"all", "tracked-write", "untracked-write", "read"}));
  app.add_option("--requests", arguments.requests, "measured, after as many to warm up")
      ->check(CLI::Range(1, 100000000));
  app.add_option("--depth", arguments.depth, "requests in flight")->check(CLI::Range(1, 1024));
  app.add_flag("--check", arguments.check, "all paths; ends with 1 unless none allocates");
  CLI11_PARSE(app, argc, argv);
  log::set_sink([](log::Level, std::string_view) {});
  bool passed = true;
  for (const char* path : {"tracked-write", "untracked-write", "read"}) {
    if (!arguments.check && arguments.path != "all" && arguments.path != path) continue;
    const nlohmann::json found = measure(arguments, path);
    std::printf("%s\n", found.dump().c_str());
    passed = passed && !found.contains("error") && (!arguments.check || found["allocations"] == 0);
  }
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace vmferry::perf

int main(int argc, char** argv) {
  return vmferry::perf::run(argc, argv);
}
