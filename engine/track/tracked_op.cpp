// SPDX-License-Identifier: Apache-2.0
#include "engine/track/tracked_op.h"

#include <algorithm>

#include "engine/base/assert.h"
#include "engine/track/track_metadata.h"

namespace vmferry {

using track::ActivityLog;

void TrackedDevice::Op::begin(BlockRequest& parent, Kind kind) noexcept {
  kind_ = kind;
  parent_ = &parent;
  piece_ = parent;
  piece_.completion = this;
  region_count_ = 0;
}

void TrackedDevice::Op::start_mutation(BlockRequest& parent) noexcept {
  begin(parent, Kind::Mutation);
  step_ = Step::Lock;
  if (device_.locks_.acquire(*this, device_.lock_range(parent.range), LockMode::Exclusive)) advance(0);
}

void TrackedDevice::Op::start_read(BlockRequest& parent) noexcept {
  begin(parent, Kind::Read);
  step_ = Step::Store;
  device_.store_.submit(piece_);
}

void TrackedDevice::Op::start_readback(BlockRequest& parent) noexcept {
  begin(parent, Kind::ReadBack);
  if (device_.options_.faults.readback_unlocked) {
    kind_ = Kind::Read;
    step_ = Step::Store;
    return device_.store_.submit(piece_);
  }
  step_ = Step::Lock;
  if (device_.locks_.acquire(*this, device_.lock_range(parent.range), LockMode::Shared)) advance(0);
}

void TrackedDevice::Op::advance(Errno error) noexcept {
  if (kind_ == Kind::Mutation) return advance_mutation(error);
  if (step_ == Step::Lock) {
    step_ = Step::Store;
    return device_.store_.submit(piece_);
  }
  finish(error);
}

void TrackedDevice::Op::advance_mutation(Errno error) noexcept {
  switch (step_) {
    case Step::Lock:
      piece_.range = {parent_->range.offset, 0};
      return next_piece();
    case Step::Activate:
      if (late_activation_) {  // planted fault only: data first, then the log
        late_activation_ = false;
        if (error == 0) device_.metadata_->log().release(region_first_, region_count_);
        region_count_ = 0;
        return finish(late_error_ != 0 ? late_error_ : error);
      }
      // Without a durable record the write must not reach the store: a crash would forget it.
      if (error != 0) {
        region_count_ = 0;
        return finish(error);
      }
      return submit_piece();
    case Step::Store:
      if (device_.tracking_) {
        // The second mark, also after an error, because then the range may hold anything. Before the reply.
        device_.mark_completed(piece_.range, submitted_);
        if (late_activation_) {
          step_ = Step::Activate;
          late_error_ = error;
          if (device_.metadata_->log().acquire(*this, region_first_, region_count_)) advance_mutation(0);
          return;
        }
        device_.metadata_->log().release(region_first_, region_count_);
        region_count_ = 0;
      }
      if (error != 0) return finish(error);
      // What follows a carried out piece can no longer be "refused with the content unchanged".
      piece_.fast_only = false;
      return next_piece();
  }
}

// Takes the next piece of the request, or finishes it.
void TrackedDevice::Op::next_piece() noexcept {
  const uint64_t offset = piece_.range.end();
  const uint64_t end = parent_->range.end();
  if (offset == end) return finish(0);
  if (!device_.tracking_) {
    piece_.range = {offset, end - offset};
    return submit_piece();
  }
  const uint64_t region_size = device_.options_.region_size;
  const uint64_t piece_end =
      std::min(end, round_down(offset, region_size) + ActivityLog::kRegionsPerRequestMax * region_size);
  piece_.range = {offset, piece_end - offset};
  if (parent_->data != nullptr) piece_.data = parent_->data + (offset - parent_->range.offset);
  region_first_ = offset / region_size;
  region_count_ = (piece_end - 1) / region_size - region_first_ + 1;
  if (device_.options_.faults.activity_log_after_data) {
    late_activation_ = true;
    return submit_piece();
  }
  step_ = Step::Activate;
  if (device_.metadata_->log().acquire(*this, region_first_, region_count_)) submit_piece();
}

void TrackedDevice::Op::submit_piece() noexcept {
  step_ = Step::Store;
  if (device_.tracking_) submitted_ = device_.mark(piece_.range);
  device_.store_.submit(piece_);
}

// The operation is free before the reply, because the reply may submit the next request at once.
void TrackedDevice::Op::finish(Errno error) noexcept {
  BlockRequest& parent = *parent_;
  TrackedDevice& device = device_;
  const Alive::Token alive = device.alive_.token();
  const Kind kind = kind_;
  const bool locked = kind != Kind::Read;
  parent_ = nullptr;
  if (locked) device.locks_.release(*this);
  device.give_back(*this);
  parent.completion->block_done(parent, error);
  if (!alive()) return;
  if (kind == Kind::Mutation) {
    device.mutation_finished();
  } else {
    device.read_finished();
  }
}

}  // namespace vmferry
