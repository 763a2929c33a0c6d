// SPDX-License-Identifier: Apache-2.0
#include "engine/track/saved_bitmap.h"

#include <algorithm>

#include "engine/base/assert.h"

namespace vmferry::track {

namespace {

constexpr size_t kSnapshotPages = 256;  // in memory at a time, and per flush of the store: 1 MiB
constexpr uint64_t kLoadPages = 256;    // read in one piece: 1 MiB

}  // namespace

SavedBitmap::SavedBitmap(Executor& executor, BlockDevice& store, BlockDevice& metadata, EpochTracker& epochs)
    : executor_(executor),
      store_(store),
      metadata_(metadata),
      epochs_(epochs),
      bytes_per_page_(page_bytes_covered(epochs.open_map().block_size())) {}

uint64_t SavedBitmap::page_count(uint64_t device_size, uint32_t block_size) {
  return div_up(device_size, page_bytes_covered(block_size));
}

void SavedBitmap::start_generation(uint64_t generation, uint64_t device_size) {
  VF_ASSERT(idle());
  generation_ = generation;
  device_size_ = device_size;
  pages_ = div_up(device_size, bytes_per_page_);
  VF_ASSERT(fits_in(kBitmapOffset, pages_ * kPageSize, metadata_.size()));
  stale_.assign(pages_, false);
  cleared_.assign(pages_, false);
}

void SavedBitmap::grow(uint64_t device_size) {
  const uint64_t first = device_size_ == 0 ? 0 : page_of(device_size_ - 1);
  device_size_ = device_size;
  pages_ = div_up(device_size, bytes_per_page_);
  VF_ASSERT(fits_in(kBitmapOffset, pages_ * kPageSize, metadata_.size()));
  stale_.resize(pages_, false);
  cleared_.resize(pages_, false);
  // What is on the disk there may say dirty, or nothing: then the baseline speaks.
  for (uint64_t page = first; page < pages_; ++page) stale_[page] = cleared_[page] = true;
}

void SavedBitmap::note_marked(ByteRange range) noexcept {
  if (range.empty() || pages_ == 0) return;
  for (uint64_t page = page_of(range.offset); page <= page_of(range.end() - 1); ++page) stale_[page] = true;
}

void SavedBitmap::note_cleared(ByteRange range) noexcept {
  if (range.empty() || pages_ == 0) return;
  for (uint64_t page = page_of(range.offset); page <= page_of(range.end() - 1); ++page) {
    stale_[page] = cleared_[page] = true;
  }
}

void SavedBitmap::save(std::vector<uint64_t> pages, Done done) {
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  jobs_.push_back({.pages = std::move(pages), .all = false, .done = std::move(done)});
  if (jobs_.size() == 1) start_job();
}

void SavedBitmap::save_all(Done done) {
  jobs_.push_back({.pages = {}, .all = true, .done = std::move(done)});
  if (jobs_.size() == 1) start_job();
}

void SavedBitmap::start_job() {
  Job& job = jobs_.front();
  if (job.all) {
    for (uint64_t page = 0; page < pages_; ++page) {
      if (stale_[page]) job.pages.push_back(page);
    }
  }
  take_snapshot();
}

void SavedBitmap::fill_page(uint64_t page, MutableByteSpan out) const {
  for (uint64_t sector = 0; sector < kPageSectors; ++sector) {
    const uint64_t index = page * kPageSectors + sector;
    SectorWords words;
    for (uint64_t i = 0; i < kSectorWords; ++i) words[i] = epochs_.union_word(index * kSectorWords + i);
    encode_sector(generation_, index, words, out.subspan(sector * kSectorSize, kSectorSize));
  }
}

void SavedBitmap::take_snapshot() {
  Job& job = jobs_.front();
  auto snapshot = std::make_shared<Snapshot>();  // shared: outlives this when the daemon dies mid-write
  while (job.error == 0 && job.next < job.pages.size() && snapshot->pages.size() < kSnapshotPages) {
    const uint64_t page = job.pages[job.next++];
    if (stale_[page]) snapshot->pages.push_back(page);
  }
  if (snapshot->pages.empty()) return flush_metadata();
  snapshot->images.resize(snapshot->pages.size() * kPageSize);
  for (size_t i = 0; i < snapshot->pages.size(); ++i) {
    fill_page(snapshot->pages[i], MutableByteSpan(snapshot->images).subspan(i * kPageSize, kPageSize));
    snapshot->cleared = snapshot->cleared || cleared_[snapshot->pages[i]];
    stale_[snapshot->pages[i]] = cleared_[snapshot->pages[i]] = false;
  }
  job.written = true;
  pages_written_ += snapshot->pages.size();
  if (!snapshot->cleared) return write_run(snapshot);
  flush_block(store_, [this, snapshot, alive = std::weak_ptr<int>(anchor_)](Errno error) {
    if (alive.expired()) return;
    jobs_.front().error = error;
    write_run(snapshot);
  });
}

// Writes the next pages of the snapshot that are neighbours on the disk.
void SavedBitmap::write_run(const std::shared_ptr<Snapshot>& snapshot) {
  const std::vector<uint64_t>& pages = snapshot->pages;
  if (jobs_.front().error != 0) {
    distrust(pages);
    return flush_metadata();
  }
  const size_t first = snapshot->written;
  if (first == pages.size()) return take_snapshot();
  size_t end = first + 1;
  while (end < pages.size() && pages[end] == pages[first] + (end - first)) ++end;
  snapshot->written = end;
  write_block(metadata_, kBitmapOffset + pages[first] * kPageSize, &snapshot->images[first * kPageSize],
              (end - first) * kPageSize, false, [this, snapshot, alive = std::weak_ptr<int>(anchor_)](Errno error) {
                if (alive.expired()) return;
                jobs_.front().error = error;
                write_run(snapshot);
              });
}

// After a failure nobody knows which of two contents a page has on the disk, so the next one is written as if it
// cleared.
void SavedBitmap::distrust(const std::vector<uint64_t>& pages) {
  for (const uint64_t page : pages) stale_[page] = cleared_[page] = true;
}

void SavedBitmap::flush_metadata() {
  if (!jobs_.front().written) {
    return executor_.post([this, alive = std::weak_ptr<int>(anchor_)] {
      if (!alive.expired()) finish_job();
    });
  }
  flush_block(metadata_, [this, alive = std::weak_ptr<int>(anchor_)](Errno error) {
    if (alive.expired()) return;
    if (jobs_.front().error == 0) jobs_.front().error = error;
    finish_job();
  });
}

void SavedBitmap::finish_job() {
  Job job = std::move(jobs_.front());
  if (job.error != 0) {
    // After a failed flush no page of this job is known to be durable.
    distrust(job.pages);
  }
  jobs_.pop_front();
  if (!jobs_.empty()) start_job();
  job.done(job.error);
}

void SavedBitmap::load(uint64_t generation, uint64_t device_size, Baseline baseline, Done done) {
  start_generation(generation, device_size);
  load_next(0, baseline, std::make_shared<Bytes>(), std::move(done));
}

void SavedBitmap::load_next(uint64_t page, Baseline baseline, std::shared_ptr<Bytes> buffer, Done done) {
  if (page == pages_) return done(0);
  const uint64_t count = std::min(kLoadPages, pages_ - page);
  buffer->resize(count * kPageSize);
  auto loaded = [this, page, count, baseline, buffer, done = std::move(done),
                 alive = std::weak_ptr<int>(anchor_)](Errno error) mutable {
    if (alive.expired()) return;
    if (error != 0) return done(error);
    for (uint64_t sector = 0; sector < count * kPageSectors; ++sector) {
      const uint64_t index = page * kPageSectors + sector;
      SectorWords words;
      switch (decode_sector(ByteSpan(*buffer).subspan(sector * kSectorSize, kSectorSize), generation_, index, words)) {
        case SectorState::Current:
          break;
        case SectorState::OtherGeneration:
          words.fill(baseline == Baseline::Dirty ? ~uint64_t{0} : 0);
          break;
        case SectorState::Damaged:
          words.fill(~uint64_t{0});
          stale_[index / kPageSectors] = true;
          break;
      }
      for (uint64_t i = 0; i < kSectorWords; ++i) epochs_.mark_open_word(index * kSectorWords + i, words[i]);
    }
    load_next(page + count, baseline, std::move(buffer), std::move(done));
  };
  read_block(metadata_, kBitmapOffset + page * kPageSize, buffer->data(), buffer->size(), std::move(loaded));
}

}  // namespace vmferry::track
