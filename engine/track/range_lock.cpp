// SPDX-License-Identifier: Apache-2.0
#include "engine/track/range_lock.h"

#include "engine/base/assert.h"

namespace vmferry {

namespace {

bool conflict(LockMode a, LockMode b) {
  return a == LockMode::Exclusive || b == LockMode::Exclusive;
}

}  // namespace

void RangeLock::count(RangeLockNode& node) noexcept {
  if (node.chunks_ == 0) ++wide_;
  const uint64_t first = node.range_.offset >> kChunkShift;
  for (uint64_t i = 0; i < node.chunks_; ++i) ++counters_[(first + i) % kCounters];
}

void RangeLock::uncount(RangeLockNode& node) noexcept {
  if (node.chunks_ == 0) --wide_;
  const uint64_t first = node.range_.offset >> kChunkShift;
  for (uint64_t i = 0; i < node.chunks_; ++i) --counters_[(first + i) % kCounters];
}

// The node itself is not counted. Two that overlap share a chunk, unless one of them is wide.
bool RangeLock::alone(const RangeLockNode& node) const noexcept {
  if (wide_ != 0 || node.chunks_ == 0) return head_ == nullptr;
  const uint64_t first = node.range_.offset >> kChunkShift;
  for (uint64_t i = 0; i < node.chunks_; ++i) {
    if (counters_[(first + i) % kCounters] != 0) return false;
  }
  return true;
}

bool RangeLock::acquire(RangeLockNode& node, ByteRange range, LockMode mode) noexcept {
  VF_ASSERT(node.previous_ == nullptr && node.next_ == nullptr && head_ != &node);
  node.range_ = range;
  node.mode_ = mode;
  node.blockers_ = 0;
  VF_ASSERT(!range.empty());
  const uint64_t chunks = ((range.end() - 1) >> kChunkShift) - (range.offset >> kChunkShift) + 1;
  node.chunks_ = chunks <= kChunksMax ? static_cast<uint32_t>(chunks) : 0;
  if (!alone(node)) {
    for (const RangeLockNode* earlier = head_; earlier != nullptr; earlier = earlier->next_) {
      if (conflict(earlier->mode_, mode) && earlier->range_.overlaps(range)) ++node.blockers_;
    }
  }
  count(node);
  node.previous_ = tail_;
  (tail_ != nullptr ? tail_->next_ : head_) = &node;
  tail_ = &node;
  return node.blockers_ == 0;
}

void RangeLock::release(RangeLockNode& node) noexcept {
  VF_ASSERT(node.blockers_ == 0);
  uncount(node);
  // Grants are collected first: range_granted() may release or acquire others, which changes the list under a walk.
  RangeLockNode* granted = nullptr;
  RangeLockNode** granted_tail = &granted;
  RangeLockNode* const first_later = alone(node) ? nullptr : node.next_;
  for (RangeLockNode* later = first_later; later != nullptr; later = later->next_) {
    if (!conflict(later->mode_, node.mode_) || !later->range_.overlaps(node.range_)) continue;
    VF_ASSERT(later->blockers_ > 0);
    if (--later->blockers_ != 0) continue;
    *granted_tail = later;
    granted_tail = &later->granted_next_;
  }
  *granted_tail = nullptr;
  (node.previous_ != nullptr ? node.previous_->next_ : head_) = node.next_;
  (node.next_ != nullptr ? node.next_->previous_ : tail_) = node.previous_;
  node.previous_ = node.next_ = nullptr;
  while (granted != nullptr) {
    RangeLockNode* const next = granted->granted_next_;
    granted->granted_next_ = nullptr;
    granted->range_granted();
    granted = next;
  }
}

}  // namespace vmferry
