// SPDX-License-Identifier: Apache-2.0
//
// Everything durable about one volume's tracking: superblock, activity log, saved bitmap (I2).
//
// Flow: TrackedDevice opens it before the first request, brackets each mutating request with acquire() and release(),
// and closes it after the last. Only this file decides what a crash, a clean stop or a changed store mean.
// Threads: one; the device's home executor. See docs/on-disk.md section 2.
#pragma once

#include <functional>

#include "blockdev/durable_record.h"
#include "engine/runtime/executor.h"
#include "engine/track/activity_log.h"
#include "engine/track/metadata_layout.h"
#include "engine/track/saved_bitmap.h"

namespace vmferry {

class TrackMetadata {
 public:
  using Done = std::function<void(Status)>;

  TrackMetadata(Executor& executor, BlockDevice& store, BlockDevice& metadata, EpochTracker& epochs,
                const TrackOptions& options);

  // `store_size` as it is now. Fills the open set.
  void open(uint64_t store_size, Done done);
  OpenOutcome outcome() const { return outcome_; }
  bool active() const { return superblock_.active; }
  uint64_t tracked_size() const { return superblock_.tracked_size; }

  // No mutating request is in flight for these.
  void activate(uint64_t store_size, Baseline baseline, Done done);
  void deactivate(Done done);
  void grow(uint64_t new_size, Done done);  // epochs have grown already
  void close(Done done);                    // the store is flushed

  void save_dirty(Done done);

  track::ActivityLog& log() { return log_; }
  void note_marked(ByteRange range) noexcept { bitmap_.note_marked(range); }
  void note_cleared(ByteRange range);

 private:
  bool is_cut_off() const;
  void restore(uint64_t store_size, Done done);
  void recover_active_regions(Done done);
  void begin_whole_dirty(uint64_t store_size, std::string_view reason, Done done);
  void start_generations();
  void save_superblock(const track::Superblock& next, Done done);
  void stop_timers() noexcept;
  void when_idle(std::function<void()> action);
  StoreStamp stamp() const { return options_.stamp ? options_.stamp() : StoreStamp{}; }

  Executor& executor_;
  BlockDevice& metadata_;
  EpochTracker& epochs_;
  const TrackOptions& options_;
  DurableRecord record_;
  track::SavedBitmap bitmap_;
  track::ActivityLog log_;
  track::Superblock superblock_;
  OpenOutcome outcome_ = OpenOutcome::New;
  Timer save_timer_;
  Alive alive_;
};

}  // namespace vmferry
