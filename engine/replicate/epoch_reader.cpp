// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/epoch_reader.h"

#include <deque>

namespace vmferry {

// Shared by the reader and every request in flight, so that a request outlives the reader.
struct FrameReader::Core : std::enable_shared_from_this<FrameReader::Core> {
  struct Waiting {
    std::shared_ptr<SendJob> job;
    std::shared_ptr<std::function<void()>> done;
    size_t piece_next = 0;
  };

  struct Operation final : BlockRequest, BlockCompletion {
    std::shared_ptr<Core> core;  // while in flight
    std::shared_ptr<SendJob> job;
    std::shared_ptr<std::function<void()>> done;

    void block_done(BlockRequest&, Errno error) noexcept override {
      const auto keep = std::move(core);
      keep->finish(*this, error);
    }
  };

  std::vector<ReplicaVolume> volumes;
  uint32_t in_flight_max = 0;
  uint32_t in_flight = 0;
  bool closed = false;
  std::deque<Waiting> waiting;
  std::vector<std::unique_ptr<Operation>> operations;
  std::vector<Operation*> idle;

  Operation& take() {
    if (idle.empty()) {
      operations.push_back(std::make_unique<Operation>());
      idle.push_back(operations.back().get());
    }
    Operation& operation = *idle.back();
    idle.pop_back();
    return operation;
  }

  void pump() {
    while (!closed && in_flight < in_flight_max && !waiting.empty()) {
      Waiting& front = waiting.front();
      const FramePiece& piece = front.job->frame.pieces[front.piece_next++];
      if (!piece.hole) {
        Operation& operation = take();
        operation.core = shared_from_this();
        operation.job = front.job;
        operation.done = front.done;
        operation.op = BlockOp::Read;
        operation.range = piece.range;
        operation.data = front.job->frame.data.data() + piece.data_offset;
        operation.completion = &operation;
        ++in_flight;
        TrackedDevice& device = *volumes[piece.volume].device;
        if (front.piece_next == front.job->frame.pieces.size()) waiting.pop_front();
        device.submit_readback(operation);
      } else if (front.piece_next == front.job->frame.pieces.size()) {
        waiting.pop_front();
      }
    }
  }

  void finish(Operation& operation, Errno error) {
    const auto job = std::move(operation.job);
    const auto done = std::move(operation.done);
    --in_flight;
    idle.push_back(&operation);
    if (job->error == 0) job->error = error;
    if (--job->reads_pending == 0 && !closed) {
      job->read = true;
      (*done)();
    }
    pump();
  }
};

FrameReader::FrameReader(std::vector<ReplicaVolume> volumes, uint32_t reads_in_flight_max)
    : core_(std::make_shared<Core>()) {
  core_->volumes = std::move(volumes);
  core_->in_flight_max = std::max(1U, reads_in_flight_max);
}

FrameReader::~FrameReader() {
  core_->closed = true;
  core_->waiting.clear();
}

void FrameReader::read(std::shared_ptr<SendJob> job, std::function<void()> done) {
  size_t size = 0;
  for (auto& piece : job->frame.pieces) {
    if (piece.hole) continue;
    piece.data_offset = size;
    size += piece.range.length;
    ++job->reads_pending;
  }
  job->frame.data.resize(size);
  if (size == 0) {
    job->read = true;
    return done();
  }
  core_->waiting.push_back({std::move(job), std::make_shared<std::function<void()>>(std::move(done)), 0});
  core_->pump();
}

std::optional<Extent> ExtentCache::find(uint16_t volume, uint64_t offset) const {
  if (volume != volume_) return std::nullopt;
  const auto after = std::upper_bound(extents_.begin(), extents_.end(), offset,
                                      [](uint64_t at, const Extent& extent) { return at < extent.range.offset; });
  if (after == extents_.begin()) return std::nullopt;
  const Extent& extent = *std::prev(after);
  if (offset >= extent.range.end()) return std::nullopt;
  return extent;
}

void ExtentCache::query(uint16_t volume, BlockDevice& store, ByteRange range, Alive::Token alive,
                        std::function<void()> done) {
  constexpr size_t kExtentsMax = 4096;
  store.query_extents(
      range, kExtentsMax,
      [this, volume, range, alive, done, generation = generation_](Result<std::vector<Extent>> extents) {
        if (!alive()) return;
        if (generation != generation_) return done();
        volume_ = volume;
        // A store that cannot tell is read, and zeroes are found there.
        extents_ = extents && !extents->empty() ? std::move(*extents) : std::vector<Extent>{{range, false, false}};
        done();
      });
}

}  // namespace vmferry
