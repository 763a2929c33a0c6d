// SPDX-License-Identifier: Apache-2.0
//
// I1 and I2 under random writes, epochs, acknowledgements, crashes and power cuts: whatever the store holds afterwards,
// every block in which the peer's copy differs from it is dirty.
#include <cstring>

#include "tests/unit/track/track_fixture.h"

namespace vmferry {
namespace {

class PowerCutTest : public TrackTest {
 protected:
  // One life after the other on the same disks. Nullopt: nothing was violated.
  std::optional<std::string> run_seed(uint64_t seed) {
    start_world(seed);
    Random& random = world->random();
    peer.assign(kSize, 0);
    const auto opened = open_device();
    EXPECT_TRUE(opened);
    EXPECT_TRUE(activate(Baseline::Clean));
    for (int life = 0; life < 4; ++life) {
      live();
      const uint64_t kind = random.below(4);
      if (kind == 0) {
        world->run_until([this] { return writes_in_flight == 0 && !sending; });
        EXPECT_TRUE(close_device());
        device.reset();
      } else {
        crash(kind != 1);
      }
      writes_in_flight = 0;
      sending = false;
      requests.clear();
      if (const Status status = open_device(); !status) return status.error().text;
      if (const auto stale = find_stale()) {
        return fmt::format("life {}: block {} differs from the peer's and is clean", life, *stale);
      }
    }
    return std::nullopt;
  }

  void live() {
    Random& random = world->random();
    const uint64_t steps = 200 + random.below(600);
    for (uint64_t step = 0; step < steps; ++step) {
      if (random.chance(1, 6) && writes_in_flight < 12) submit_write();
      if (random.chance(1, 30)) flush();
      if (random.chance(1, 40) && !sending) send_epoch();
      world->step();
    }
  }
  void submit_write() {
    Random& random = world->random();
    // Few hot regions and a long tail, so that regions leave the log and come back.
    const uint64_t region = random.chance(1, 2) ? random.below(4) : random.below(kSize / kRegion);
    const uint64_t offset = region * kRegion + random.below(8) * kBlock + random.below(8) * 512;
    const uint64_t length = std::min<uint64_t>(kSize - offset, 512 * (1 + random.below(12)));
    const bool zeroes = random.chance(1, 8);
    requests.push_back(TestRequest::make(zeroes ? BlockOp::WriteZeroes : BlockOp::Write, offset, length));
    TestRequest& request = *requests.back();
    for (auto& byte : request.data) byte = static_cast<uint8_t>(random.next());
    request.request.fua = random.chance(1, 10);
    ++writes_in_flight;
    request.on_done = [this] { --writes_in_flight; };
    device->submit(request.request);
  }
  void flush() {
    requests.push_back(TestRequest::make(BlockOp::Flush, 0, 0));
    device->submit(requests.back()->request);
  }
  // Seals, reads everything back, then the peer has it durably, or the link is cut.
  void send_epoch() {
    DirtyConsumer& consumer = device->consumer();
    consumer.seal();
    sending = true;
    read_next(0);
  }
  void read_next(uint64_t from) {
    const auto run = device->consumer().next_run(from, 4 * kBlock);
    if (!run || world->random().chance(1, 20)) {
      // Acknowledged up to here, whole blocks; the rest returns.
      if (from > 0) {
        for (const auto& [range, data] : received) {
          std::memcpy(&peer[range.offset], data.data(), data.size());
          device->consumer().clear_sealed(range);
        }
      }
      received.clear();
      device->consumer().merge_sealed_back();
      sending = false;
      return;
    }
    requests.push_back(TestRequest::make(BlockOp::Read, run->offset, run->length));
    TestRequest& request = *requests.back();
    request.on_done = [this, &request] {
      received.emplace_back(request.request.range, request.data);
      // The acknowledgement takes its time.
      executor->start_timer(static_cast<Nanoseconds>(world->random().below(2000)) * kMicrosecond,
                            [this, end = request.request.range.end()] { read_next(end); });
    };
    device->submit_readback(request.request);
  }
  std::optional<uint64_t> find_stale() {
    received.clear();
    const std::set<uint64_t> dirty = open_blocks();
    for (uint64_t block = 0; block < kSize / kBlock; ++block) {
      if (dirty.contains(block)) continue;
      if (std::memcmp(&peer[block * kBlock], &store->content()[block * kBlock], kBlock) != 0) return block;
    }
    return std::nullopt;
  }
  // Seeds until the first violation; nullopt when there is none.
  std::optional<uint64_t> first_violation(uint64_t seeds) {
    for (uint64_t seed = 1; seed <= seeds; ++seed) {
      if (run_seed(seed)) return seed;
    }
    return std::nullopt;
  }

  Bytes peer;
  uint64_t writes_in_flight = 0;
  bool sending = false;
  std::vector<std::unique_ptr<TestRequest>> requests;
  std::vector<std::pair<ByteRange, Bytes>> received;
};

TEST_F(PowerCutTest, NoCrashForgetsADirtyBlock) {
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    const auto violation = run_seed(seed);
    ASSERT_FALSE(violation) << "seed=" << seed << ' ' << *violation;
  }
}

// The tests of the test: each protection, taken away, has to be missed.
TEST_F(PowerCutTest, LogWrittenAfterTheDataIsFound) {
  faults.activity_log_after_data = true;
  EXPECT_TRUE(first_violation(300));
}

// The range lock keeps reading back and writing apart, so that the second mark is a second line of defence: with the
// lock alone, or with the second mark alone, nothing is lost; with neither, a block goes stale.
TEST_F(PowerCutTest, MissingSecondMarkIsFoundWhereTheReadBackLockIsMissingToo) {
  faults.second_mark_removed = true;
  faults.readback_unlocked = true;
  EXPECT_TRUE(first_violation(300));
}
TEST_F(PowerCutTest, SecondMarkAloneLosesNothing) {
  faults.readback_unlocked = true;
  EXPECT_FALSE(first_violation(100));
}

}  // namespace
}  // namespace vmferry
