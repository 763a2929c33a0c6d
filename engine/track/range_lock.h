// SPDX-License-Identifier: Apache-2.0
//
// Serialises overlapping requests from submission to completion, in the order in which they asked (I4).
//
// Flow: TrackedDevice takes it exclusively for each mutating request and shared for the reading back of sealed blocks.
// Every node counts the earlier nodes that it conflicts with and is granted when the count reaches zero, so the order
// is fair by construction: nobody overtakes an earlier request that it overlaps. A filter says of most requests that
// nobody else is near; otherwise acquire and release look at every node present, at most a few hundred because the
// exports bound their requests.
// Threads: one; the device's home executor.
#pragma once

#include <array>
#include <cstdint>

#include "engine/base/units.h"

namespace vmferry {

enum class LockMode : uint8_t { Shared, Exclusive };

// Embedded in the request that waits; lives from acquire() to release().
class RangeLockNode {
 public:
  virtual void range_granted() noexcept = 0;

 protected:
  ~RangeLockNode() = default;

 private:
  friend class RangeLock;
  ByteRange range_{};
  RangeLockNode* previous_ = nullptr;
  RangeLockNode* next_ = nullptr;
  RangeLockNode* granted_next_ = nullptr;  // while release() hands out grants
  uint32_t chunks_ = 0;                    // that it is counted in; 0: wide
  uint32_t blockers_ = 0;
  LockMode mode_ = LockMode::Exclusive;
};

class RangeLock {
 public:
  // True: granted at once, range_granted() is not called. False: it is called later, from within a release().
  bool acquire(RangeLockNode& node, ByteRange range, LockMode mode) noexcept;
  void release(RangeLockNode& node) noexcept;
  bool idle() const { return head_ == nullptr; }

 private:
  // Nodes present by the chunks of the disk that they touch, several chunks to a counter. Whoever touches many is
  // counted as wide, and meets everybody.
  static constexpr uint32_t kChunkShift = 12;  // TrackedDevice rounds ranges to at least this
  static constexpr uint64_t kChunksMax = 8;
  static constexpr uint64_t kCounters = 4096;  // at depth 32 one in a hundred meets another by chance

  void count(RangeLockNode& node) noexcept;
  void uncount(RangeLockNode& node) noexcept;
  bool alone(const RangeLockNode& node) const noexcept;  // for certain

  RangeLockNode* head_ = nullptr;  // oldest
  RangeLockNode* tail_ = nullptr;
  std::array<uint32_t, kCounters> counters_{};
  uint32_t wide_ = 0;
};

}  // namespace vmferry
