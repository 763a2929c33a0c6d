// SPDX-License-Identifier: Apache-2.0
#include "engine/track/epoch_tracker.h"

#include <algorithm>
#include <utility>

#include "engine/base/assert.h"

namespace vmferry {

EpochTracker::EpochTracker(const EpochTrackerOptions& options)
    : open_(options.device_size, options.block_size),
      sealed_(options.device_size, options.block_size),
      second_mark_removed_(options.second_mark_removed) {}

EpochId EpochTracker::mark(ByteRange range) noexcept {
  open_.mark(range);
  return epoch_;
}

void EpochTracker::complete(ByteRange range, EpochId submitted) noexcept {
  VF_ASSERT(submitted <= epoch_);
  if (submitted != epoch_ && !second_mark_removed_) open_.mark(range);
}

EpochId EpochTracker::seal() {
  VF_ASSERT(can_seal());
  std::swap(open_, sealed_);  // the old sealed map is empty: it needs no clearing
  return epoch_++;
}

std::optional<ByteRange> EpochTracker::next_run(uint64_t from, uint64_t length_max) const {
  return sealed_.next_run(from, length_max);
}

void EpochTracker::collect_runs(DirtySet set, ByteRange range, size_t runs_max, std::vector<ByteRange>& runs) const {
  const ByteRange none{range.end(), 0};
  const auto next = [&](const DirtyMap& map, uint64_t from) {
    const auto run = map.next_run(from, range.length);
    return run && run->offset < range.end() ? *run : none;
  };
  ByteRange open = next(open_, range.offset);
  ByteRange sealed = set == DirtySet::Unacknowledged ? next(sealed_, range.offset) : none;
  const size_t first_run = runs.size();
  for (;;) {
    const bool from_open = open.offset <= sealed.offset;
    ByteRange& run = from_open ? open : sealed;
    if (run.offset >= range.end()) return;
    const uint64_t begin = std::max(run.offset, range.offset);
    const uint64_t end = std::min(run.end(), range.end());
    if (runs.size() > first_run && begin <= runs.back().end()) {
      runs.back().length = std::max(end, runs.back().end()) - runs.back().offset;
    } else if (runs.size() - first_run == runs_max) {
      return;
    } else {
      runs.push_back({begin, end - begin});
    }
    run = next(from_open ? open_ : sealed_, run.end());
  }
}

void EpochTracker::clear_sealed(ByteRange range) {
  if (sealed_.clear(range) && on_cleared_) on_cleared_(range);
}

void EpochTracker::clear_all_sealed() {
  const ByteRange whole{0, sealed_.device_size()};
  if (whole.length != 0) clear_sealed(whole);
}

void EpochTracker::merge_sealed_back() {
  open_.merge_and_empty(sealed_);
}

void EpochTracker::reset() noexcept {
  const ByteRange whole{0, open_.device_size()};
  open_.clear(whole);
  sealed_.clear(whole);
  ++epoch_;
}

void EpochTracker::grow(uint64_t device_size) {
  open_.grow(device_size);
  sealed_.grow(device_size);
}

}  // namespace vmferry
