// SPDX-License-Identifier: Apache-2.0
//
// Keeps the union of open and sealed sets on the metadata device, page by page, as lazily as I2 allows.
//
// A bit that is cleared on disk says "the peer has what the store has". After a power cut the store may have lost what
// was never flushed, while the peer still has it. So each page is a snapshot first, then the store is flushed, then the
// page is written: what the peer acknowledged before the snapshot is durable here too. A page that only gained bits
// since it was written promises nothing new and needs no flush of the store.
//
// Flow: ActivityLog saves the pages of regions that it wants to forget; TrackMetadata saves all changed pages on
// save_dirty() and close() and, after a while, those whose blocks were acknowledged. A page's snapshot is taken
// when its job runs; whoever needs a bit to be in it marked that bit before it asked.
// Threads: one; the device's home executor. Jobs run one after the other.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "blockdev/block_device.h"
#include "engine/runtime/executor.h"
#include "engine/track/epoch_tracker.h"
#include "engine/track/metadata_layout.h"

namespace vmferry::track {

class SavedBitmap {
 public:
  using Done = std::function<void(Errno)>;

  SavedBitmap(Executor& executor, BlockDevice& store, BlockDevice& metadata, EpochTracker& epochs);

  static uint64_t page_count(uint64_t device_size, uint32_t block_size);
  uint64_t page_of(uint64_t offset) const { return offset / bytes_per_page_; }

  // Generation of pages written from here on; nothing is stale afterwards. No job may be under way.
  void start_generation(uint64_t generation, uint64_t device_size);
  // Reads all pages of `generation` and marks what they hold in the open set; pages and sectors never written in this
  // generation mean `baseline`, damaged ones dirty.
  void load(uint64_t generation, uint64_t device_size, Baseline baseline, Done done);
  void grow(uint64_t device_size);  // pages from the old last one on become stale

  // The pages on the disk lack bits, or have bits too many.
  void note_marked(ByteRange range) noexcept;
  void note_cleared(ByteRange range) noexcept;

  // Writes these pages and flushes. Unchanged ones are left out; with none to write nothing is flushed.
  void save(std::vector<uint64_t> pages, Done done);
  void save_all(Done done);
  bool idle() const { return jobs_.empty(); }
  uint64_t pages_written() const { return pages_written_; }

 private:
  struct Job {
    std::vector<uint64_t> pages;  // ascending
    bool all = false;             // pages is filled when the job starts
    Done done;
    size_t next = 0;
    bool written = false;  // something, so a flush is due
    Errno error = 0;
  };
  // Pages on their way to the disk: a bounded part of a job.
  struct Snapshot {
    std::vector<uint64_t> pages;
    Bytes images;
    size_t written = 0;
    bool cleared = false;  // some page calls a block clean that it called dirty before
  };
  void start_job();
  void take_snapshot();
  void write_run(const std::shared_ptr<Snapshot>& snapshot);
  void flush_metadata();
  void distrust(const std::vector<uint64_t>& pages);
  void finish_job();
  void fill_page(uint64_t page, MutableByteSpan out) const;
  void load_next(uint64_t page, Baseline baseline, std::shared_ptr<Bytes> buffer, Done done);

  Executor& executor_;
  BlockDevice& store_;
  BlockDevice& metadata_;
  EpochTracker& epochs_;
  uint64_t bytes_per_page_;
  uint64_t generation_ = 0;
  uint64_t pages_ = 0;
  uint64_t device_size_ = 0;
  std::vector<bool> stale_;    // differs from memory
  std::vector<bool> cleared_;  // of the stale ones: bits are gone from memory that the disk has
  std::deque<Job> jobs_;       // front is running
  uint64_t pages_written_ = 0;
  std::shared_ptr<int> anchor_ = std::make_shared<int>(0);
};

}  // namespace vmferry::track
