// SPDX-License-Identifier: Apache-2.0
#include "engine/track/tracked_device.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "engine/base/assert.h"
#include "engine/track/track_metadata.h"
#include "engine/track/tracked_op.h"

namespace vmferry {

TrackedDevice::TrackedDevice(Executor& executor, BlockDevice& store, BlockDevice& metadata, TrackOptions options)
    : executor_(executor),
      store_(store),
      options_(std::move(options)),
      // The store reads, modifies and writes whole units of its own; two requests inside one must not overlap (I4).
      lock_unit_(std::max<uint64_t>(options_.block_size, store.limits().block_size_min)),
      epochs_({.device_size = store.size(),
               .block_size = options_.block_size,
               .second_mark_removed = options_.faults.second_mark_removed}),
      metadata_(std::make_unique<TrackMetadata>(executor, store, metadata, epochs_, options_)) {
  VF_ASSERT(std::has_single_bit(options_.region_size) && options_.region_size >= track::kRegionSizeMin &&
            options_.region_size <= track::kRegionSizeMax && options_.region_size >= options_.block_size);
  VF_ASSERT(metadata.size() >= metadata_size(store.size(), options_.block_size));
  epochs_.set_on_cleared([this](ByteRange range) { metadata_->note_cleared(range); });
}

TrackedDevice::~TrackedDevice() = default;

uint64_t TrackedDevice::metadata_size(uint64_t store_size, uint32_t block_size) {
  return track::kBitmapOffset + track::SavedBitmap::page_count(store_size, block_size) * track::kPageSize;
}

void TrackedDevice::open(Done done) {
  VF_ASSERT(phase_ == Phase::New);
  phase_ = Phase::Opening;
  metadata_->open(store_.size(), [this, done = std::move(done)](Status status) {
    if (status) {
      phase_ = Phase::Ready;
      tracking_ = metadata_->active();
    }
    done(status);
  });
}

OpenOutcome TrackedDevice::opened_as() const {
  return metadata_->outcome();
}

ByteRange TrackedDevice::lock_range(ByteRange range) const noexcept {
  const uint64_t offset = round_down(range.offset, lock_unit_);
  return {offset, round_up(range.end(), lock_unit_) - offset};
}

// A block that was dirty before is dirty in its page of the saved bitmap, or that page is stale already.
EpochId TrackedDevice::mark(ByteRange range) noexcept {
  const uint64_t before = epochs_.open_bytes();
  const EpochId epoch = epochs_.mark(range);
  if (epochs_.open_bytes() != before) metadata_->note_marked(range);
  return epoch;
}

void TrackedDevice::mark_completed(ByteRange range, EpochId submitted) noexcept {
  const uint64_t before = epochs_.open_bytes();
  epochs_.complete(range, submitted);
  if (epochs_.open_bytes() != before) metadata_->note_marked(range);
}

void TrackedDevice::submit(BlockRequest& request) noexcept {
  if (phase_ != Phase::Ready) return complete_later(request, ESHUTDOWN);
  if (request.op == BlockOp::Flush) return store_.submit(request);
  VF_ASSERT(!request.range.empty() && fits_in(request.range.offset, request.range.length, size()));
  if (is_mutating(request.op)) return admit_mutation(request);
  if (serve_zeroes_) {
    std::memset(request.data, 0, request.range.length);
    return complete_later(request, 0);
  }
  if (hold_reads_) return held_reads_.push_back(&request);
  ++guest_reads_;
  ++reads_in_flight_;
  take_op().start_read(request);
}

void TrackedDevice::admit_mutation(BlockRequest& request) noexcept {
  switch (gate_) {
    case WriteGate::ReadOnly:
      return complete_later(request, EPERM);
    case WriteGate::Parked:
      return parked_.push_back(&request);
    case WriteGate::Open:
      break;
  }
  if (!control_actions_.empty()) return waiting_for_control_.push_back(&request);
  ++mutation_counter_;
  if (write_sample_ != nullptr && request.op == BlockOp::Write) write_sample_->note(request.range);
  ++mutations_in_flight_;
  take_op().start_mutation(request);
}

void TrackedDevice::submit_readback(BlockRequest& request) noexcept {
  VF_ASSERT(request.op == BlockOp::Read && fits_in(request.range.offset, request.range.length, size()));
  if (phase_ != Phase::Ready) return complete_later(request, ESHUTDOWN);
  ++reads_in_flight_;
  take_op().start_readback(request);
}

void TrackedDevice::complete_later(BlockRequest& request, Errno error) {
  executor_.post([&request, error] { request.completion->block_done(request, error); });
}

TrackedDevice::Op& TrackedDevice::take_op() noexcept {
  if (free_ops_.empty()) {
    ops_.push_back(std::make_unique<Op>(*this));
    free_ops_.reserve(ops_.size());
    return *ops_.back();
  }
  Op& op = *free_ops_.back();
  free_ops_.pop_back();
  return op;
}

void TrackedDevice::give_back(Op& op) noexcept {
  free_ops_.push_back(&op);
}

void TrackedDevice::mutation_finished() noexcept {
  VF_ASSERT(mutations_in_flight_ > 0);
  if (--mutations_in_flight_ != 0) return;
  for (auto& waiter : std::exchange(quiesce_waiters_, {})) executor_.post(std::move(waiter));
  run_control();
}

void TrackedDevice::read_finished() noexcept {
  VF_ASSERT(reads_in_flight_ > 0);
  if (--reads_in_flight_ != 0) return;
  for (auto& waiter : std::exchange(read_quiesce_waiters_, {})) executor_.post(std::move(waiter));
}

void TrackedDevice::quiesce(std::function<void()> done) {
  if (mutations_in_flight_ == 0) return executor_.post(std::move(done));
  quiesce_waiters_.push_back(std::move(done));
}

void TrackedDevice::quiesce_reads(std::function<void()> done) {
  if (reads_in_flight_ == 0) return executor_.post(std::move(done));
  read_quiesce_waiters_.push_back(std::move(done));
}

void TrackedDevice::set_gate(WriteGate gate) noexcept {
  gate_ = gate;
  if (gate == WriteGate::Open) writable_ = true;
  if (gate == WriteGate::ReadOnly && std::exchange(writable_, false)) writers_until_ = clients_;
}

void TrackedDevice::serve_zeroes(bool zeroes) noexcept {
  serve_zeroes_ = zeroes;
  zeroes_hidden_from_ = zeroes ? writers_until_ : 0;
}

void TrackedDevice::release_parked() noexcept {
  for (BlockRequest* request : std::exchange(parked_, {})) submit(*request);
}

void TrackedDevice::fail_parked(Errno error) noexcept {
  for (BlockRequest* request : std::exchange(parked_, {})) complete_later(*request, error);
}

void TrackedDevice::hold_reads(bool hold) noexcept {
  hold_reads_ = hold;
  if (hold) return;
  for (BlockRequest* request : std::exchange(held_reads_, {})) submit(*request);
}

void TrackedDevice::query_extents(ByteRange range, size_t extents_max, ExtentsDone done) {
  if (!serve_zeroes_) return store_.query_extents(range, extents_max, std::move(done));
  executor_.post(
      [range, done = std::move(done)] { done(std::vector<Extent>{{.range = range, .hole = true, .zero = true}}); });
}

}  // namespace vmferry
