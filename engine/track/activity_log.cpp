// SPDX-License-Identifier: Apache-2.0
#include "engine/track/activity_log.h"

#include <algorithm>
#include <unordered_set>

#include "engine/base/assert.h"

namespace vmferry::track {

namespace {

constexpr size_t kSavePages = 256;      // pages of the bitmap that are saved with one flush: 1 MiB
constexpr uint32_t kSaveSlotsMin = 64;  // regions to save at least, if there are so many
constexpr uint32_t kLowMin = 16;
constexpr uint32_t kRetiredMax = kUpdatesMax / 2;  // updates of one transaction; the rest is left to waiting requests

}  // namespace

ActivityLog::ActivityLog(Executor& executor, BlockDevice& metadata, SavedBitmap& bitmap, uint32_t region_size,
                         Nanoseconds idle_interval)
    : metadata_(metadata),
      bitmap_(bitmap),
      region_size_(region_size),
      idle_interval_(idle_interval),
      idle_timer_(executor) {}

// Below this many replaceable slots regions are saved ahead of need: a save is two flushes long, a transaction one, and
// each may take kUpdatesMax slots.
uint32_t ActivityLog::replaceable_low() const noexcept {
  return std::max(kLowMin, static_cast<uint32_t>(slots_.size()) / 16);
}

void ActivityLog::reset(uint64_t generation, uint32_t slot_count, uint64_t device_size) {
  VF_ASSERT(idle() && slot_count >= kSlotCountMin && slot_count <= kSlotCountMax);
  generation_ = generation;
  durable_sequence_ = 0;
  slots_.assign(slot_count, Slot{});
  slot_of_region_.assign(div_up(device_size, region_size_), kNoSlot);
  replaceable_ = {};
  unsaved_ = {};
  changed_.clear();
  in_writing_.clear();
  starving_ = false;
  retiring_ = false;
  tick_ = 0;
  occupied_ = 0;
  idle_timer_.cancel();
}

void ActivityLog::start_generation(uint64_t generation, uint32_t slot_count, uint64_t device_size) {
  reset(generation, slot_count, device_size);
  for (uint32_t i = 0; i < slot_count; ++i) push_back(replaceable_, static_cast<SlotIndex>(i));
}

void ActivityLog::resume_generation(uint64_t generation, const RecoveredLog& recovered, uint64_t device_size) {
  reset(generation, static_cast<uint32_t>(recovered.slots.size()), device_size);
  durable_sequence_ = recovered.sequence;
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    const auto index = static_cast<SlotIndex>(i);
    const uint64_t region = recovered.slots[i];
    // A region may stand in two slots when a transaction failed before the crash: the first one keeps it.
    if (region < slot_of_region_.size() && find(region) == kNoSlot) {
      slots_[i].region = region;
      slots_[i].saved = false;
      slot_of_region_[region] = index;
      push_back(unsaved_, index);
      ++occupied_;
    } else {
      push_back(replaceable_, index);
    }
  }
  start_idle_timer();
}

void ActivityLog::grow(uint64_t device_size) {
  slot_of_region_.resize(div_up(device_size, region_size_), kNoSlot);
}

std::vector<uint64_t> ActivityLog::active_regions() const {
  std::vector<uint64_t> regions;
  for (const Slot& slot : slots_) {
    if (slot.region != kNoRegion) regions.push_back(slot.region);
  }
  return regions;
}

void ActivityLog::push_back(SlotList& list, SlotIndex index) noexcept {
  Slot& slot = slots_[index];
  slot.previous = list.tail;
  slot.next = kNoSlot;
  (list.tail != kNoSlot ? slots_[list.tail].next : list.head) = index;
  list.tail = index;
  ++list.size;
}

void ActivityLog::remove(SlotList& list, SlotIndex index) noexcept {
  Slot& slot = slots_[index];
  (slot.previous != kNoSlot ? slots_[slot.previous].next : list.head) = slot.next;
  (slot.next != kNoSlot ? slots_[slot.next].previous : list.tail) = slot.previous;
  slot.previous = slot.next = kNoSlot;
  --list.size;
}

void ActivityLog::pin(SlotIndex index) noexcept {
  Slot& slot = slots_[index];
  if (slot.pins++ == 0) remove(list_of(slot), index);
  slot.saved = false;
  slot.saving = false;
}

void ActivityLog::unpin(SlotIndex index) noexcept {
  Slot& slot = slots_[index];
  VF_ASSERT(slot.pins > 0);
  if (--slot.pins != 0) return;
  slot.used_tick = tick_;
  push_back(unsaved_, index);
}

bool ActivityLog::acquire(Waiter& waiter, uint64_t first_region, uint64_t count) noexcept {
  VF_ASSERT(count >= 1 && count <= kRegionsPerRequestMax && first_region + count <= slot_of_region_.size());
  bool hot = !starving_;
  for (uint64_t region = first_region; region < first_region + count && hot; ++region) {
    hot = find(region) != kNoSlot && durable(find(region));
  }
  if (hot) {
    for (uint64_t region = first_region; region < first_region + count; ++region) pin(find(region));
    return true;
  }
  waiter.first_ = first_region;
  waiter.count_ = count;
  waiter.pinned_ = 0;
  waiter.ready_at_ = 0;
  waiters_.push_back(&waiter);
  pump();
  return false;
}

void ActivityLog::release(uint64_t first_region, uint64_t count) noexcept {
  for (uint64_t region = first_region; region < first_region + count; ++region) {
    VF_ASSERT(find(region) != kNoSlot);
    unpin(find(region));
  }
  if (starving_) pump();
}

// Gives slots to waiters in order, as far as there are replaceable ones; then writes a transaction if one is needed.
void ActivityLog::pump() noexcept {
  starving_ = false;
  while (assigned_ < waiters_.size() && assign(*waiters_[assigned_])) ++assigned_;
  if (replaceable_.size < replaceable_low()) save_regions(Save::LeastRecentlyUsed);
  // Waiters whose regions all became durable by earlier transactions still need one completion that is not inline:
  // an empty transaction is the rare and simple way, and it keeps the log's context rotating.
  if (!writing_ && (assigned_ > 0 || (!waiters_.empty() && !changed_.empty()))) write_transaction();
}

// Pins the waiter's regions one by one. Only the first waiter without slots holds some of its pins while it waits for
// more, so two waiters never hold what the other needs.
bool ActivityLog::assign(Waiter& waiter) noexcept {
  while (waiter.pinned_ < waiter.count_) {
    const uint64_t region = waiter.first_ + waiter.pinned_;
    SlotIndex index = find(region);
    if (index == kNoSlot) {
      // Both together fit into one transaction, because a failed one is repeated with what came after it.
      if (changed_.size() + in_writing_.size() >= kUpdatesMax) return false;
      index = replaceable_.head;
      if (index == kNoSlot) {
        starving_ = true;
        return false;
      }
      Slot& slot = slots_[index];
      if (slot.region != kNoRegion) {
        slot_of_region_[slot.region] = kNoSlot;
      } else {
        ++occupied_;
        start_idle_timer();
      }
      slot.region = region;
      slot.logged_at = durable_sequence_ + (writing_ ? 2 : 1);
      slot_of_region_[region] = index;
      changed_.push_back(index);
    }
    pin(index);
    waiter.ready_at_ = std::max(waiter.ready_at_, slots_[index].logged_at);
    ++waiter.pinned_;
  }
  return true;
}

void ActivityLog::write_transaction() {
  writing_ = true;
  in_writing_.swap(changed_);
  changed_.clear();
  Transaction t;
  t.generation = generation_;
  t.sequence = durable_sequence_ + 1;
  t.slot_count = static_cast<uint32_t>(slots_.size());
  for (const SlotIndex index : in_writing_) t.updates.push_back({index, slots_[index].region});
  const uint32_t part = static_cast<uint32_t>((t.sequence - 1) % context_cycle(t.slot_count));
  t.context_first = part * kContextSlots;
  const uint32_t end = std::min(t.slot_count, t.context_first + kContextSlots);
  for (uint32_t slot = t.context_first; slot < end; ++slot) t.context.push_back(slots_[slot].region);
  auto image = std::make_shared<Bytes>(kTransactionSize);
  encode(t, *image);
  const uint64_t at = kLogOffset + t.sequence % kTransactionCount * kTransactionSize;
  write_block(metadata_, at, image->data(), image->size(), true,
              [this, image, alive = std::weak_ptr<int>(anchor_)](Errno error) {
                if (!alive.expired()) transaction_done(error);
              });
}

void ActivityLog::transaction_done(Errno error) {
  writing_ = false;
  if (error != 0) {
    // Nobody knows whether it is durable. The next one takes the same place in the ring and repeats its updates; the
    // regions that these slots held before were saved, so it does not matter which of the two a crash finds.
    for (const SlotIndex index : in_writing_) slots_[index].logged_at = durable_sequence_ + 1;
    for (const SlotIndex index : changed_) slots_[index].logged_at = durable_sequence_ + 1;
    changed_.insert(changed_.begin(), in_writing_.begin(), in_writing_.end());
    in_writing_.clear();
    retiring_ = false;
    return fail_waiters(std::max<size_t>(assigned_, 1), error);
  }
  ++durable_sequence_;
  in_writing_.clear();
  std::vector<Waiter*> ready;
  while (assigned_ > 0 && waiters_.front()->ready_at_ <= durable_sequence_) {
    ready.push_back(waiters_.front());
    waiters_.pop_front();
    --assigned_;
  }
  const auto alive = std::weak_ptr<int>(anchor_);
  pump();
  if (retiring_) retire();
  for (Waiter* waiter : ready) {
    if (alive.expired()) return;
    waiter->regions_ready(0);
  }
}

void ActivityLog::fail_waiters(uint64_t count, Errno error) {
  std::vector<Waiter*> failed;
  for (uint64_t i = 0; i < count && !waiters_.empty(); ++i) {
    Waiter* waiter = waiters_.front();
    waiters_.pop_front();
    for (uint64_t region = waiter->first_; region < waiter->first_ + waiter->pinned_; ++region) unpin(find(region));
    failed.push_back(waiter);
  }
  assigned_ -= std::min<size_t>(assigned_, count);
  const auto alive = std::weak_ptr<int>(anchor_);
  for (Waiter* waiter : failed) {
    if (alive.expired()) return;
    waiter->regions_ready(error);
  }
  if (!alive.expired() && !waiters_.empty()) pump();
}

// Saves regions without a request in flight, oldest first, so that their slots become replaceable. Whatever else lies
// on the same pages is saved with them.
void ActivityLog::save_regions(Save which) {
  if (saving_ || unsaved_.size == 0) return;
  const size_t wanted = std::max<size_t>(kSaveSlotsMin, slots_.size() / 8);
  std::vector<SlotIndex> batch;
  std::unordered_set<uint64_t> chosen;
  for (SlotIndex index = unsaved_.head; index != kNoSlot; index = slots_[index].next) {
    const uint64_t page = bitmap_.page_of(slots_[index].region * region_size_);
    if (!chosen.contains(page)) {
      const bool asked = which == Save::Idle ? idle_slot(slots_[index]) : batch.size() < wanted;
      if (!asked || chosen.size() == kSavePages) continue;
      chosen.insert(page);
    }
    slots_[index].saving = true;
    batch.push_back(index);
  }
  if (batch.empty()) return;
  saving_ = true;
  std::vector<uint64_t> pages(chosen.begin(), chosen.end());
  bitmap_.save(std::move(pages), [this, batch = std::move(batch), alive = std::weak_ptr<int>(anchor_)](Errno error) {
    if (!alive.expired()) saved(batch, error);
  });
}

void ActivityLog::saved(const std::vector<SlotIndex>& batch, Errno error) {
  saving_ = false;
  for (const SlotIndex index : batch) {
    Slot& slot = slots_[index];
    if (!slot.saving) continue;  // written again meanwhile
    slot.saving = false;
    if (error != 0) continue;
    remove(unsaved_, index);
    slot.saved = true;
    push_back(replaceable_, index);
  }
  if (error != 0) {
    if (starving_) {
      starving_ = false;
      fail_waiters(assigned_ + 1, error);  // the assigned ones are in the way of the one that starves
    }
    return;
  }
  if (starving_ || assigned_ < waiters_.size()) pump();
}

void ActivityLog::start_idle_timer() {
  if (occupied_ != 0 && !idle_timer_.running()) idle_timer_.start(idle_interval_, [this] { tick(); });
}

// Once per idle interval: what was saved and is still idle leaves, what became idle is saved.
void ActivityLog::tick() {
  ++tick_;
  retire();
  save_regions(Save::Idle);
  start_idle_timer();
}

// Empties slots of saved regions that were not used for a while. In memory at once, so that the next write to such a
// region takes a slot anew; on the disk with the next transaction, until which a crash finds too much.
void ActivityLog::retire() {
  retiring_ = false;
  for (SlotIndex index = replaceable_.head; index != kNoSlot; index = slots_[index].next) {
    Slot& slot = slots_[index];
    if (slot.region == kNoRegion || !idle_slot(slot)) continue;
    if (changed_.size() + in_writing_.size() >= kRetiredMax) {
      retiring_ = true;
      break;
    }
    slot_of_region_[slot.region] = kNoSlot;
    slot.region = kNoRegion;
    slot.logged_at = durable_sequence_ + (writing_ ? 2 : 1);
    changed_.push_back(index);
    --occupied_;
  }
  if (!writing_ && !changed_.empty()) write_transaction();
}

}  // namespace vmferry::track
