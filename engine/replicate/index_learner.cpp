// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/index_learner.h"

#include <algorithm>

#include "engine/base/log.h"

namespace vmferry {

using delta::kDedupBlockSize;

namespace {

// 256 KiB every 8 ms are 32 MiB/s: a table for 4 GiB is full after two minutes of idle time, and one such read delays
// a request of the guest that comes behind it by no more than the disk takes for it.
constexpr uint64_t kReadSize = 256U << 10;
constexpr Nanoseconds kPace = 8 * kMillisecond;
constexpr Nanoseconds kPause = 250 * kMillisecond;
// Since the last look, at least; above it, a guest that does more than this many requests per second is busy.
constexpr uint64_t kGuestRequestsMin = 4;
constexpr uint64_t kGuestRateMax = 500;
constexpr uint64_t kQuerySize = 64U << 20;
constexpr size_t kDirtyRunsMax = kReadSize / kDedupBlockSize;

}  // namespace

// Lives as long as its read and its job on the worker, whatever becomes of the learner.
struct IndexLearner::Piece {
  uint16_t volume = 0;
  ByteRange range;
  Bytes data;
  std::vector<delta::Fingerprint> blocks;
};

IndexLearner::IndexLearner(Environment environment) : env_(std::move(environment)), timer_(env_.executor) {}

void IndexLearner::start() {
  looked_at_ = env_.executor.now();
  later(kPause);
}

void IndexLearner::later(Nanoseconds delay) {
  timer_.start(delay, [this] { step(); });
}

bool IndexLearner::guest_is_busy() {
  uint64_t requests = 0;
  bool waits = false;
  for (const auto& volume : env_.volumes) {
    requests += volume.device->guest_requests();
    waits = waits || volume.device->guest_waits() || volume.device->gate() != WriteGate::Open;
  }
  const uint64_t made = requests - std::exchange(guest_requests_, requests);
  const Nanoseconds now = env_.executor.now();
  const auto elapsed = static_cast<uint64_t>(now - std::exchange(looked_at_, now));
  return waits || made > std::max(kGuestRequestsMin, elapsed * kGuestRateMax / uint64_t{kSecond});
}

void IndexLearner::step() {
  const bool busy = guest_is_busy();
  if (busy || !env_.idle()) return later(kPause);
  while (volume_ < env_.volumes.size() && offset_ + kDedupBlockSize > env_.volumes[volume_].device->size()) {
    ++volume_;
    offset_ = 0;
  }
  if (volume_ == env_.volumes.size() || read_blocks_ >= env_.blocks_max) {
    finished_ = true;
    log::debug("index: learnt {} blocks that the peer holds, of {} read", learnt_blocks_, read_blocks_);
    return;
  }
  TrackedDevice& device = *env_.volumes[volume_].device;
  const auto extent = extents_.find(volume_, offset_);
  if (!extent) {
    const ByteRange range{offset_, std::min(kQuerySize, device.size() - offset_)};
    return extents_.query(volume_, device.store(), range, alive_.token(), [this] { later(kPace); });
  }
  const uint64_t left = extent->range.end() - offset_;
  if (extent->hole || extent->zero) {
    // A block that is a hole in part is read with what follows.
    offset_ += round_down(left, kDedupBlockSize);
    if (left >= kDedupBlockSize) return later(0);
  }
  // After a full copy that is all of it.
  const uint64_t known = env_.known(volume_, {offset_, std::min(left, kQuerySize)});
  offset_ += known;
  if (known > 0) return later(0);
  // Whole blocks; a short last one of the device is never referenced.
  read(round_down(std::min({kReadSize, std::max<uint64_t>(left, kDedupBlockSize), device.size() - offset_}),
                  kDedupBlockSize));
}

// Beside the range locks: no write of the guest waits for it.
void IndexLearner::read(uint64_t length) {
  const auto piece = std::make_shared<Piece>();
  piece->volume = volume_;
  piece->range = {offset_, length};
  piece->data.resize(length);
  read_block(env_.volumes[volume_].device->store(), offset_, piece->data.data(), length,
             [this, alive = alive_.token(), piece](Errno error) {
               if (!alive()) return;
               if (error != 0) {  // who needs the block will say so
                 offset_ = piece->range.end();
                 return later(kPause);
               }
               env_.executor.offload([piece] { delta::scan_blocks(piece->data, piece->blocks); },
                                     [this, alive, piece] {
                                       if (alive()) scanned(*piece);
                                     });
             });
}

void IndexLearner::scanned(const Piece& piece) {
  if (!env_.idle()) return later(kPause);  // and then reads it again
  std::vector<delta::Fingerprint> blocks = piece.blocks;
  std::vector<ByteRange> dirty;
  env_.volumes[piece.volume].device->collect_dirty(DirtySet::Unacknowledged, piece.range, kDirtyRunsMax, dirty);
  for (const ByteRange& run : dirty) {
    const size_t begin = static_cast<size_t>((run.offset - piece.range.offset) / kDedupBlockSize);
    const size_t end = static_cast<size_t>(div_up(run.end() - piece.range.offset, kDedupBlockSize));
    std::fill(blocks.begin() + static_cast<std::ptrdiff_t>(begin), blocks.begin() + static_cast<std::ptrdiff_t>(end),
              delta::kZeroFingerprint);
  }
  read_blocks_ += static_cast<uint64_t>(std::count_if(
      blocks.begin(), blocks.end(), [](delta::Fingerprint content) { return content != delta::kZeroFingerprint; }));
  learnt_blocks_ += env_.learn(piece.volume, piece.range.offset, blocks);
  offset_ = piece.range.end();
  later(kPace);
}

}  // namespace vmferry
