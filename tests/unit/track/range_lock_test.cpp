// SPDX-License-Identifier: Apache-2.0
#include "engine/track/range_lock.h"

#include <gtest/gtest.h>

#include <deque>
#include <vector>

#include "engine/base/random.h"

namespace vmferry {
namespace {

struct Node final : RangeLockNode {
  void range_granted() noexcept override { granted = true; }
  bool granted = false;
};

// Two overlapping writes at the store at once make the order at the store differ from the order sent.
TEST(RangeLock, OverlappingExclusiveWaitsAndDisjointDoesNot) {
  RangeLock lock;
  Node a, b, c;
  EXPECT_TRUE(lock.acquire(a, {0, 10}, LockMode::Exclusive));
  EXPECT_FALSE(lock.acquire(b, {9, 2}, LockMode::Exclusive));
  EXPECT_TRUE(lock.acquire(c, {11, 5}, LockMode::Exclusive));
  lock.release(a);
  EXPECT_TRUE(b.granted);
  lock.release(b);
  lock.release(c);
  EXPECT_TRUE(lock.idle());
}

// A stream of small writes must not starve a large one that came earlier.
TEST(RangeLock, LaterRequestDoesNotOvertakeAnEarlierWaiter) {
  RangeLock lock;
  Node first, large, small;
  EXPECT_TRUE(lock.acquire(first, {0, 1}, LockMode::Exclusive));
  EXPECT_FALSE(lock.acquire(large, {0, 100}, LockMode::Exclusive));
  EXPECT_FALSE(lock.acquire(small, {50, 1}, LockMode::Exclusive)) << "free at the store, but the large one was first";
  lock.release(first);
  EXPECT_TRUE(large.granted);
  EXPECT_FALSE(small.granted);
  lock.release(large);
  EXPECT_TRUE(small.granted);
  lock.release(small);
}

TEST(RangeLock, SharedHoldersCoexistAndKeepWritersOut) {
  RangeLock lock;
  Node a, b, writer, c;
  EXPECT_TRUE(lock.acquire(a, {0, 10}, LockMode::Shared));
  EXPECT_TRUE(lock.acquire(b, {5, 10}, LockMode::Shared));
  EXPECT_FALSE(lock.acquire(writer, {7, 1}, LockMode::Exclusive));
  EXPECT_FALSE(lock.acquire(c, {7, 1}, LockMode::Shared)) << "behind the writer";
  lock.release(a);
  EXPECT_FALSE(writer.granted);
  lock.release(b);
  EXPECT_TRUE(writer.granted);
  lock.release(writer);
  EXPECT_TRUE(c.granted);
  lock.release(c);
}

// A grant that is lost hangs a guest; a grant that is too early corrupts it.
TEST(RangeLock, RandomRequestsNeverOverlapAndAllFinishInOrder) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    Random random(seed);
    RangeLock lock;
    // Inside one block; over some and over many; and where the lock counts different places together.
    const uint64_t unit = seed % 3 == 0 ? 1 : 4096;
    const bool far_apart = seed % 3 == 2;
    struct Entry {
      Node node;
      ByteRange range;
      LockMode mode = LockMode::Exclusive;
    };
    std::deque<Entry> entries(200);
    std::vector<Entry*> present;
    size_t started = 0;
    while (started < entries.size() || !present.empty()) {
      if (started < entries.size() && random.chance(3, 5)) {
        Entry& entry = entries[started++];
        entry.range = {random.below(100) * unit, (1 + random.below(20)) * unit};
        if (far_apart) entry.range.offset += random.below(3) * 16_MiB;
        entry.mode = random.chance(1, 3) ? LockMode::Shared : LockMode::Exclusive;
        entry.node.granted = lock.acquire(entry.node, entry.range, entry.mode);
        present.push_back(&entry);
      } else if (!present.empty()) {
        std::vector<size_t> held;
        for (size_t i = 0; i < present.size(); ++i) {
          if (present[i]->node.granted) held.push_back(i);
        }
        ASSERT_FALSE(held.empty()) << "seed=" << seed << ": everybody waits";
        const size_t chosen = held[random.below(held.size())];
        lock.release(present[chosen]->node);
        present.erase(present.begin() + static_cast<std::ptrdiff_t>(chosen));
      }
      // Granted exactly when no earlier conflicting request is still present.
      for (size_t i = 0; i < present.size(); ++i) {
        bool blocked = false;
        for (size_t j = 0; j < i; ++j) {
          blocked |= present[j]->range.overlaps(present[i]->range) &&
                     (present[j]->mode == LockMode::Exclusive || present[i]->mode == LockMode::Exclusive);
        }
        ASSERT_EQ(present[i]->node.granted, !blocked) << "seed=" << seed;
      }
    }
    ASSERT_TRUE(lock.idle());
  }
}

}  // namespace
}  // namespace vmferry
