// SPDX-License-Identifier: Apache-2.0
//
// Two hosts, a link and a guest in one thread with virtual time, for the tests of sender and receiver.
//
// Disks lose or tear what was not flushed when their host crashes, the link drops what is under way when it is cut;
// everything is drawn from one seed. Smaller than tests/sim on purpose: only replication lives here.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/base/random.h"
#include "engine/replicate/receiver.h"
#include "engine/replicate/sender.h"
#include "netproto/repl/hello.h"

namespace vmferry::testing {

class TestExecutor final : public Executor {
 public:
  explicit TestExecutor(uint64_t seed) : random(seed) {}

  Nanoseconds now() const override { return now_; }
  Nanoseconds wall_now() const override { return now_; }
  void post(Task task) override { add(0, std::move(task)); }
  TimerId start_timer(Nanoseconds delay, Task task) override {
    return add(std::max<Nanoseconds>(delay, 0), std::move(task));
  }
  void cancel_timer(TimerId id) override;
  void offload(Task work, Task done) override;
  Id128 new_id() override;

  bool run_one();
  void run_for(Nanoseconds duration);
  // False when `limit` of virtual time passed first.
  bool run_until(const std::function<bool()>& condition, Nanoseconds limit = 600 * kSecond);

  Random random;

 private:
  using Key = std::pair<Nanoseconds, uint64_t>;
  TimerId add(Nanoseconds delay, Task task);
  Nanoseconds now_ = 0;
  uint64_t order_ = 0;
  std::map<Key, Task> events_;
  std::map<TimerId, Key> keys_;
};

// A disk in memory whose content survives crash() as far as it was flushed; sectors of 512 bytes are atomic.
class TestDisk final : public BlockDevice {
 public:
  TestDisk(TestExecutor& executor, uint64_t size);
  ~TestDisk() override;

  uint64_t size() const noexcept override { return data.size(); }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override;
  void query_extents(ByteRange range, size_t extents_max, ExtentsDone done) override;

  // Requests in flight never complete; unflushed sectors are old or new.
  void crash();
  bool quiet() const { return in_flight_ == 0; }

  Bytes data;  // what reads see
  Errno write_error = 0;
  uint64_t write_error_from = 0;         // only of writes that reach beyond: space below is allocated already
  uint64_t write_error_to = UINT64_MAX;  // and begin before
  Errno flush_error = 0;
  Errno flush_error_once = 0;   // of the next flush that is submitted
  Nanoseconds query_delay = 0;  // between the look at the extents and the answer
  uint64_t writes = 0;
  uint64_t read_bytes = 0;

 private:
  void complete(BlockRequest& request);
  static constexpr uint64_t kSector = 512;

  TestExecutor& executor_;
  BlockLimits limits_;
  Bytes durable_;
  std::set<uint64_t> unflushed_;  // sectors
  std::set<BlockRequest*> requests_;
  uint64_t in_flight_ = 0;
  uint64_t life_ = 0;
};

class TestLink;

class TestChannel final : public GroupChannel {
 public:
  bool connected() const override;
  bool peer_has(uint64_t feature) const override { return connected() && (features & feature) != 0; }
  void send(TrafficClass traffic, MessageType type, Bytes payload) override;
  uint64_t queued_bytes(TrafficClass traffic) const override { return queued[static_cast<size_t>(traffic)]; }
  uint64_t queue_limit(TrafficClass) const override { return 256 * 1024; }
  LinkFigures figures() const override { return {.rtt = 2 * kMillisecond}; }

  TestLink* link = nullptr;
  TestChannel* other = nullptr;
  uint64_t features = kFeaturesKnown;                      // of both sides
  std::function<void(MessageType, const Bytes&)> deliver;  // at this end
  std::function<void(TrafficClass)> writable;
  uint64_t queued[kTrafficClassCount] = {};
  Nanoseconds ready_at[kTrafficClassCount] = {};
  uint64_t sent_messages = 0;
  uint64_t sent_bytes = 0;
  std::function<void(MessageType, Bytes&)> tamper;  // may change what is sent
};

// Both directions; messages of one class keep their order, classes overtake each other.
class TestLink {
 public:
  explicit TestLink(TestExecutor& e) : executor(e) {
    a.link = b.link = this;
    a.other = &b;
    b.other = &a;
  }
  TestExecutor& executor;
  TestChannel a;
  TestChannel b;
  bool up = false;
  uint64_t life = 0;
  Nanoseconds delay = kMillisecond;
  uint64_t bytes_per_second = 100'000'000;
};

struct HostOptions {
  std::vector<uint64_t> volume_sizes{1U << 20};
  uint64_t staging_size = 8U << 20;
};

// One daemon's share of a group. crash() and restart() keep the disks.
struct TestHost {
  TestHost(TestExecutor& executor, const HostOptions& options);

  ~TestHost();
  void boot();  // tracked devices and replica state
  void abandon_devices();
  void crash();  // power cut
  std::vector<ReplicaVolume> volumes() const;

  TestExecutor& executor;
  std::vector<std::unique_ptr<TestDisk>> stores;
  std::vector<std::unique_ptr<TestDisk>> metadata;
  std::unique_ptr<TestDisk> staging;
  std::vector<std::unique_ptr<TrackedDevice>> devices;
  std::unique_ptr<ReplicaState> state;
  std::unique_ptr<Sender> sender;
  std::unique_ptr<Receiver> receiver;
  bool up = false;
};

struct WorldOptions {
  uint64_t seed = 1;
  HostOptions host;
  SenderOptions sender;
  ReceiverOptions receiver;
};

// A request of the guest; kept by the world, because after a crash nobody completes it.
struct GuestRequest final : BlockRequest, BlockCompletion {
  Bytes bytes;
  std::function<void()> done;
  void block_done(BlockRequest&, Errno) noexcept override { done(); }
};

class TestWorld {
  std::vector<std::unique_ptr<GuestRequest>> guest_requests_;  // goes last

 public:
  explicit TestWorld(WorldOptions options);
  ~TestWorld();

  void start_source(TestHost& host);
  void start_copy(TestHost& host);
  // Both hosts as they are: hello in both directions, then messages. The refusal of either side, if any.
  Status connect();
  void cut();
  void crash_source();
  void crash_copy();

  // One guest write of `length` bytes of `fill` (0: zeroes) or random; acknowledged when it returns a done flag set.
  void write(size_t volume, uint64_t offset, Bytes data);
  void zero(size_t volume, ByteRange range);
  void random_write();
  bool writes_done() const { return writes_in_flight == 0; }
  bool sync(Nanoseconds limit = 600 * kSecond);  // wait_in_sync
  bool equal() const;
  // The copy's image now.
  Bytes copy_image() const;
  Bytes source_image() const;

  WorldOptions options;
  TestExecutor executor;
  TestLink link;
  TestHost a;
  TestHost b;
  TestHost* source = nullptr;
  TestHost* copy = nullptr;
  size_t writes_in_flight = 0;
  uint64_t writes_total = 0;
  std::optional<Error> protocol_error;
  std::map<uint64_t, std::pair<CopyQuality, Hash128>> applied;  // epoch -> image of the copy
  std::set<Hash128> quiet_images;                               // of the source whenever no write was in flight
  std::vector<std::pair<Id128, uint64_t>> finals;

 private:
  TestChannel& channel_of(const TestHost& host) { return &host == &a ? link.a : link.b; }
  void deliver(TestHost& host, MessageType type, const Bytes& payload);
  void note_quiet();
  GuestRequest& guest_request();
  uint64_t life_ = 0;  // of the source's guest
};

Bytes pattern(size_t size, uint64_t seed);

// A small window, so that references pay and histories are cheap; epochs every second.
WorldOptions small_world(uint64_t seed = 1);
// Source on `a`, copy on `b`, connected.
void start(TestWorld& world);

}  // namespace vmferry::testing
