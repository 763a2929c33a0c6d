// SPDX-License-Identifier: Apache-2.0
//
// Which regions (4 MiB) may have been written since their bits were last saved (I2).
//
// Flow: TrackedDevice acquires the regions of a mutating request before its first mark and releases them after its
// second. A cold region waits for a transaction that is durable; the slot it takes belonged to a region with no request
// in flight whose bits are durable in the saved bitmap, so forgetting that region forgets no dirty block. Regions that
// nobody writes to any more leave by and by, so that a crash sends again what was written last and not the whole
// window. Threads: one; the device's home executor. Layout: docs/on-disk.md section 2.2.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "blockdev/block_device.h"
#include "engine/runtime/executor.h"
#include "engine/track/metadata_layout.h"
#include "engine/track/saved_bitmap.h"

namespace vmferry::track {

class ActivityLog {
 public:
  // Embedded in the request that waits.
  class Waiter {
   public:
    // Regions are pinned and durable in the log; or, with an error, nothing is pinned.
    virtual void regions_ready(Errno error) noexcept = 0;

   protected:
    ~Waiter() = default;

   private:
    friend class ActivityLog;
    uint64_t first_ = 0;
    uint64_t count_ = 0;
    uint64_t pinned_ = 0;    // of count_, while it is at the head of the queue
    uint64_t ready_at_ = 0;  // transaction that has to be durable
  };

  // A region leaves after one to two `idle_interval` without a write.
  ActivityLog(Executor& executor, BlockDevice& metadata, SavedBitmap& bitmap, uint32_t region_size,
              Nanoseconds idle_interval);

  // Begins empty in a generation that was never used. slot_count: kSlotCountMin..kSlotCountMax.
  void start_generation(uint64_t generation, uint32_t slot_count, uint64_t device_size);
  // Continues after a crash: the recovered regions are hot, not pinned, and not saved.
  void resume_generation(uint64_t generation, const RecoveredLog& recovered, uint64_t device_size);
  void grow(uint64_t device_size);
  // Nobody acquires from here on until the next generation: regions no longer leave.
  void stop() noexcept { idle_timer_.cancel(); }

  // A request may touch at most this many regions at a time.
  static constexpr uint64_t kRegionsPerRequestMax = 8;
  static_assert(kRegionsPerRequestMax <= kSlotCountMin);

  // True: all regions are durable in the log already, now pinned. False: regions_ready() comes later, never inline.
  bool acquire(Waiter& waiter, uint64_t first_region, uint64_t count) noexcept;
  void release(uint64_t first_region, uint64_t count) noexcept;

  bool idle() const { return waiters_.empty() && !writing_ && !saving_; }
  uint64_t transactions() const { return durable_sequence_; }
  std::vector<uint64_t> active_regions() const;

 private:
  using SlotIndex = uint16_t;
  static constexpr SlotIndex kNoSlot = 0xffff;

  struct Slot {
    uint64_t region = kNoRegion;
    uint64_t logged_at = 0;  // transaction that names this region here
    uint32_t pins = 0;
    uint32_t used_tick = 0;  // in which the last pin was given back
    bool saved = true;       // its bits are durable in the saved bitmap, and nothing was written since
    bool saving = false;     // being saved; a request in between resets it
    SlotIndex previous = kNoSlot;
    SlotIndex next = kNoSlot;
  };
  // Slots without a request in flight, least recently used first.
  struct SlotList {
    SlotIndex head = kNoSlot;
    SlotIndex tail = kNoSlot;
    uint32_t size = 0;
  };

  void reset(uint64_t generation, uint32_t slot_count, uint64_t device_size);
  void push_back(SlotList& list, SlotIndex index) noexcept;
  void remove(SlotList& list, SlotIndex index) noexcept;
  SlotList& list_of(const Slot& slot) { return slot.saved ? replaceable_ : unsaved_; }
  SlotIndex find(uint64_t region) const noexcept { return slot_of_region_[region]; }
  bool durable(SlotIndex index) const noexcept { return slots_[index].logged_at <= durable_sequence_; }
  void pin(SlotIndex index) noexcept;
  void unpin(SlotIndex index) noexcept;
  void pump() noexcept;
  bool assign(Waiter& waiter) noexcept;
  void write_transaction();
  void transaction_done(Errno error);
  enum class Save : uint8_t { LeastRecentlyUsed, Idle };
  void save_regions(Save which);
  void tick();
  void retire();
  void start_idle_timer();
  bool idle_slot(const Slot& slot) const noexcept { return tick_ - slot.used_tick >= 2; }
  uint32_t replaceable_low() const noexcept;
  void saved(const std::vector<SlotIndex>& batch, Errno error);
  void fail_waiters(uint64_t count, Errno error);

  BlockDevice& metadata_;
  SavedBitmap& bitmap_;
  const uint64_t region_size_;
  const Nanoseconds idle_interval_;
  uint64_t generation_ = 0;
  uint64_t durable_sequence_ = 0;  // newest durable transaction; the next one is this + 1
  std::vector<Slot> slots_;
  std::vector<SlotIndex> slot_of_region_;
  SlotList replaceable_;
  SlotList unsaved_;
  std::vector<SlotIndex> changed_;     // slots whose region no durable transaction names yet
  std::vector<SlotIndex> in_writing_;  // of changed_, in the transaction under way
  std::deque<Waiter*> waiters_;        // in the order of arrival; the first assigned_ have all their slots
  size_t assigned_ = 0;
  bool writing_ = false;
  bool saving_ = false;
  bool starving_ = false;  // the next waiter found no replaceable slot: nobody overtakes it
  bool retiring_ = false;  // more idle regions wait for the next transaction
  uint32_t tick_ = 0;      // counts idle intervals
  uint32_t occupied_ = 0;  // slots with a region
  Timer idle_timer_;
  std::shared_ptr<int> anchor_ = std::make_shared<int>(0);
};

}  // namespace vmferry::track
