// SPDX-License-Identifier: Apache-2.0
//
// Virtqueues, split and packed, against the driver's side of our own: traffic, notifications, restarts of the device.
#include "netproto/virtio/virtqueue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "tests/unit/netproto/virtqueue_fixture.h"

namespace vmferry::virtio {
namespace {

using Take = Virtqueue::Take;

class VirtqueueTest : public testing::TestWithParam<RingOptions> {};

std::string variant_name(const testing::TestParamInfo<RingOptions>& info) {
  std::string name = info.param.packed ? "Packed" : "Split";
  if (info.param.indirect) name += "Indirect";
  if (info.param.event_idx) name += "EventIdx";
  return name;
}

INSTANTIATE_TEST_SUITE_P(Rings, VirtqueueTest,
                         testing::Values(RingOptions{false, false, false}, RingOptions{false, true, false},
                                         RingOptions{false, false, true}, RingOptions{false, true, true},
                                         RingOptions{true, false, false}, RingOptions{true, true, false},
                                         RingOptions{true, false, true}, RingOptions{true, true, true}),
                         variant_name);

// A chain that arrives with other buffers, or twice, or never, is a lost or misplaced write.
TEST_P(VirtqueueTest, EveryChainArrivesOnceAndComesBackInAnyOrder) {
  RingFixture fixture(GetParam(), 16);
  std::mt19937 random(7);
  std::map<uint16_t, std::vector<Buffer>> added;  // by id
  std::vector<Chain> taken;
  std::vector<uint16_t> free_ids;
  for (uint16_t i = 0; i < 16; ++i) free_ids.push_back(i);
  uint64_t rounds = 0;
  for (int step = 0; step < 20000; ++step) {
    if (random() % 2 == 0 && !free_ids.empty()) {
      const uint16_t id = free_ids.back();
      std::vector<Buffer> buffers;
      const size_t count = 1 + random() % 4;
      for (size_t i = 0; i < count; ++i)
        buffers.push_back({fixture.data_address() + random() % 4096, static_cast<uint32_t>(1 + random() % 512)});
      const size_t readable = random() % (count + 1);
      if (fixture.driver().add(id, std::span(buffers).first(readable), std::span(buffers).subspan(readable))) {
        free_ids.pop_back();
        added[id] = buffers;
        (void)fixture.driver().publish();
      }
    }
    Chain chain;
    while (fixture.device().take(chain) == Take::Taken) {
      std::vector<Buffer> seen = chain.readable;
      seen.insert(seen.end(), chain.writable.begin(), chain.writable.end());
      const bool known = std::any_of(added.begin(), added.end(), [&](const auto& entry) {
        return entry.second.size() == seen.size() &&
               std::equal(seen.begin(), seen.end(), entry.second.begin(), [](const Buffer& a, const Buffer& b) {
                 return a.address == b.address && a.length == b.length;
               });
      });
      ASSERT_TRUE(known);
      taken.push_back(chain);
    }
    ASSERT_EQ(fixture.device().fault(), ChainFault::None);
    if (!taken.empty() && random() % 3 != 0) {
      const size_t pick = random() % taken.size();
      fixture.device().put(taken[pick], static_cast<uint32_t>(random() % 100));
      taken.erase(taken.begin() + static_cast<ptrdiff_t>(pick));
      (void)fixture.device().publish();
    }
    while (const auto used = fixture.driver().reap()) {
      ASSERT_EQ(added.erase(used->id), 1U);
      free_ids.push_back(used->id);
      ++rounds;
    }
    ASSERT_FALSE(fixture.driver().broken());
  }
  EXPECT_GT(rounds, 5000U);
}

// A missed wake-up stops the guest's disk for ever; too many cost speed.
TEST_P(VirtqueueTest, NeitherSideMissesTheOther) {
  RingFixture fixture(GetParam(), 8);
  EXPECT_FALSE(fixture.device().want_notifications());
  bool kick_owed = false;
  bool call_owed = false;
  uint64_t kicks = 0;
  (void)fixture.driver().want_calls();
  for (uint16_t round = 0; round < 500; ++round) {
    const auto id = static_cast<uint16_t>(round % 8);
    ASSERT_TRUE(fixture.driver().add(id, {}, fixture.one_buffer()));
    kick_owed = fixture.driver().publish();
    ASSERT_TRUE(kick_owed) << "the device waits, so it has to be kicked, round " << round;
    ++kicks;
    fixture.device().stop_notifications();
    Chain chain;
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
    fixture.device().put(chain, 1);
    call_owed = fixture.device().publish();
    ASSERT_TRUE(call_owed) << "the driver waits, so it has to be called, round " << round;
    ASSERT_TRUE(fixture.driver().reap());
    ASSERT_FALSE(fixture.driver().want_calls());
    ASSERT_FALSE(fixture.device().want_notifications());
  }
  EXPECT_EQ(kicks, 500U);
  // A chain added before the device asked for a kick is seen by the asking.
  ASSERT_TRUE(fixture.driver().add(0, {}, fixture.one_buffer()));
  (void)fixture.driver().publish();
  EXPECT_TRUE(fixture.device().want_notifications());
}

// Calls that nobody asked for would make a polling driver slower than without polling.
TEST_P(VirtqueueTest, ADriverThatPollsIsNotCalled) {
  RingFixture fixture(GetParam(), 8);
  fixture.driver().stop_calls();
  bool called = false;
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(fixture.driver().add(0, {}, fixture.one_buffer()));
    (void)fixture.driver().publish();
    Chain chain;
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
    fixture.device().put(chain, 1);
    called = fixture.device().publish();
    ASSERT_TRUE(fixture.driver().reap());
  }
  // With EVENT_IDX in a split ring the driver cannot ask for none, only for a late one.
  EXPECT_FALSE(called);
}

// What a killed back-end had taken and not answered must be done by the next one: once, in order, nothing else.
TEST_P(VirtqueueTest, ARestartedDeviceFindsWhatWasInFlight) {
  RingFixture fixture(GetParam(), 16, RingFixture::Inflight::Yes);
  std::mt19937 random(11);
  std::vector<uint16_t> free_ids;
  for (uint16_t i = 0; i < 16; ++i) free_ids.push_back(i);
  std::map<uint64_t, uint16_t> by_address;  // first buffer's address -> id, of what the driver waits for
  std::vector<Chain> taken;
  uint64_t serial = 0;
  for (int step = 0; step < 20000; ++step) {
    if (random() % 2 == 0 && !free_ids.empty()) {
      const Buffer buffers[] = {{fixture.data_address() + serial % 4000, 16}, {fixture.data_address(), 8}};
      const size_t count = 1 + random() % 2;
      if (!by_address.contains(buffers[0].address) && fixture.driver().add(free_ids.back(), std::span(buffers).first(1),
                                                                           std::span(buffers).subspan(1, count - 1))) {
        by_address[buffers[0].address] = free_ids.back();
        free_ids.pop_back();
        (void)fixture.driver().publish();
      }
      ++serial;
    }
    Chain chain;
    if (random() % 2 == 0 && fixture.device().take(chain) == Take::Taken) taken.push_back(chain);
    const auto put_one = [&] {
      const size_t pick = random() % taken.size();
      fixture.device().put(taken[pick], 1);
      taken.erase(taken.begin() + static_cast<ptrdiff_t>(pick));
    };
    if (!taken.empty() && random() % 2 == 0) {
      put_one();
      if (!taken.empty() && random() % 2 == 0) put_one();
      // Killed before the batch was visible: its chains are in flight still.
      if (random() % 10 != 0) (void)fixture.device().publish();
    }
    while (const auto used = fixture.driver().reap()) {
      const auto it = std::find_if(by_address.begin(), by_address.end(), [&](auto& e) { return e.second == used->id; });
      ASSERT_NE(it, by_address.end());
      by_address.erase(it);
      free_ids.push_back(used->id);
    }
    ASSERT_FALSE(fixture.driver().broken()) << step;
    if (random() % 50 == 0) {
      fixture.restart_device();
      ASSERT_EQ(fixture.device().fault(), ChainFault::None);
      taken.clear();
      std::vector<uint64_t> addresses;
      while (fixture.device().take(chain) == Take::Taken) {
        ASSERT_FALSE(chain.readable.empty());
        addresses.push_back(chain.readable[0].address);
        taken.push_back(chain);
      }
      ASSERT_EQ(fixture.device().fault(), ChainFault::None) << to_string(fixture.device().fault());
      std::sort(addresses.begin(), addresses.end());
      std::vector<uint64_t> expected;
      for (const auto& [address, id] : by_address) expected.push_back(address);
      ASSERT_EQ(addresses, expected) << "after the restart in step " << step;
    }
  }
}

// Requests of one guest that were submitted in an order come again in that order.
TEST_P(VirtqueueTest, RecoveredChainsComeInTheOrderTheyWereTaken) {
  RingFixture fixture(GetParam(), 16, RingFixture::Inflight::Yes);
  const uint16_t ids[] = {9, 3, 12, 0, 7};
  Chain chain;
  // Some traffic first, so that descriptors are not in the order of their numbers.
  for (uint16_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(fixture.driver().add(i % 16, fixture.one_buffer(), {}));
    (void)fixture.driver().publish();
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
    fixture.device().put(chain, 0);
    (void)fixture.device().publish();
    ASSERT_TRUE(fixture.driver().reap());
  }
  for (size_t i = 0; i < std::size(ids); ++i) {
    const Buffer buffer{fixture.data_address() + i, 1};
    ASSERT_TRUE(fixture.driver().add(ids[i], std::span(&buffer, 1), {}));
    (void)fixture.driver().publish();
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
  }
  fixture.restart_device();
  EXPECT_TRUE(fixture.device().want_notifications()) << "there is something to do without a kick";
  for (size_t i = 0; i < std::size(ids); ++i) {
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
    EXPECT_EQ(chain.readable[0].address, fixture.data_address() + i);
  }
  EXPECT_EQ(fixture.device().take(chain), Take::Empty);
}

// A migrated guest arrives with a ring in the middle of its life and an empty region. Taking "empty" for "from the
// beginning" loses or repeats a slot as soon as the back-end there is killed.
TEST_P(VirtqueueTest, AnEmptyRegionInTheMiddleOfARingLosesNothingAtTheNextKill) {
  RingFixture fixture(GetParam(), 8, RingFixture::Inflight::Yes);
  Chain chain;
  for (uint16_t i = 0; i < 21; ++i) {
    ASSERT_TRUE(fixture.driver().add(i % 8, fixture.one_buffer(), {}));
    (void)fixture.driver().publish();
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
    fixture.device().put(chain, 0);
    (void)fixture.device().publish();
    ASSERT_TRUE(fixture.driver().reap());
  }
  const uint32_t base = fixture.device().base();
  std::ranges::fill(fixture.region(), uint8_t{0});
  fixture.restart_device(base);
  const auto address = [&](uint16_t id) { return fixture.data_address() + id; };
  for (const uint16_t id : {uint16_t{5}, uint16_t{1}, uint16_t{6}}) {
    const Buffer buffer{address(id), 1};
    ASSERT_TRUE(fixture.driver().add(id, std::span(&buffer, 1), {}));
    (void)fixture.driver().publish();
  }
  ASSERT_EQ(fixture.device().take(chain), Take::Taken);
  ASSERT_EQ(fixture.device().take(chain), Take::Taken);
  fixture.device().put(chain, 0);
  (void)fixture.device().publish();
  const auto answered = fixture.driver().reap();
  ASSERT_TRUE(answered);
  EXPECT_EQ(answered->id, 1);

  fixture.restart_device(base);  // as old as the migration: nobody was asked since
  for (const uint16_t id : {uint16_t{5}, uint16_t{6}}) {
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
    EXPECT_EQ(chain.readable[0].address, address(id));
    fixture.device().put(chain, 0);
  }
  EXPECT_EQ(fixture.device().take(chain), Take::Empty);
  (void)fixture.device().publish();
  EXPECT_TRUE(fixture.driver().reap());
  EXPECT_TRUE(fixture.driver().reap());
  EXPECT_FALSE(fixture.driver().reap());
  EXPECT_FALSE(fixture.driver().broken());
}

// A ring write that is not in the log is missing at the destination: the guest waits there for an answer it had.
TEST_P(VirtqueueTest, WritesToTheRingAreLogged) {
  RingFixture fixture(GetParam(), 16);
  std::vector<uint8_t> bits(64);
  const DirtyLog log(bits.data(), bits.size());
  fixture.device().set_log({&log, 0x3000, 0x5000});
  ASSERT_TRUE(fixture.driver().add(0, {}, fixture.one_buffer()));
  (void)fixture.driver().publish();
  Chain chain;
  ASSERT_EQ(fixture.device().take(chain), Take::Taken);
  EXPECT_EQ(bits[0], 0);
  fixture.device().put(chain, 1);
  (void)fixture.device().publish();
  EXPECT_EQ(bits[0], GetParam().packed ? 1U << 5 : 1U << 3);
  fixture.device().log_all();
  EXPECT_EQ(bits[0] & (1U << 3), 1U << 3);
  EXPECT_FALSE(fixture.device().log_failed());
  fixture.device().set_log({&log, 64 * 8 * 4096, 64 * 8 * 4096});
  fixture.device().log_all();
  EXPECT_TRUE(fixture.device().log_failed()) << "beyond the log";
}

// After a stop the front-end hands the base to the next back-end; a wrong one repeats or skips requests.
TEST_P(VirtqueueTest, TheBaseOfAStoppedRingContinuesIt) {
  RingFixture fixture(GetParam(), 8);
  Chain chain;
  for (uint16_t i = 0; i < 100; ++i) {
    ASSERT_TRUE(fixture.driver().add(i % 8, fixture.one_buffer(), {})) << i;
    (void)fixture.driver().publish();
    ASSERT_EQ(fixture.device().take(chain), Take::Taken);
    fixture.device().put(chain, 0);
    (void)fixture.device().publish();
    ASSERT_TRUE(fixture.driver().reap());
    if (i % 7 == 0) fixture.restart_device(fixture.device().base());
    ASSERT_EQ(fixture.device().take(chain), Take::Empty);
  }
}

}  // namespace
}  // namespace vmferry::virtio
