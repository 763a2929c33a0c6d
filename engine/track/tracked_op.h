// SPDX-License-Identifier: Apache-2.0
//
// One guest request, or one reading back, on its way through a TrackedDevice. Pooled; never allocated per request.
//
// Flow: see tracked_device.h. A mutating request passes in pieces of at most ActivityLog::kRegionsPerRequestMax
// regions, so that discarding a whole disk needs no more slots than a large write.
// Threads: the volume's home executor.
#pragma once

#include "engine/track/activity_log.h"
#include "engine/track/tracked_device.h"

namespace vmferry {

class TrackedDevice::Op final : public BlockCompletion, public RangeLockNode, public track::ActivityLog::Waiter {
 public:
  explicit Op(TrackedDevice& device) : device_(device) {}

  void start_mutation(BlockRequest& parent) noexcept;
  void start_read(BlockRequest& parent) noexcept;
  void start_readback(BlockRequest& parent) noexcept;

 private:
  enum class Step : uint8_t { Lock, Activate, Store };
  enum class Kind : uint8_t { Mutation, Read, ReadBack };

  void range_granted() noexcept override { advance(0); }
  void regions_ready(Errno error) noexcept override { advance(error); }
  void block_done(BlockRequest&, Errno error) noexcept override { advance(error); }

  void begin(BlockRequest& parent, Kind kind) noexcept;
  void advance(Errno error) noexcept;
  void advance_mutation(Errno error) noexcept;
  void next_piece() noexcept;
  void submit_piece() noexcept;
  void finish(Errno error) noexcept;

  TrackedDevice& device_;
  Kind kind_ = Kind::Mutation;
  Step step_ = Step::Lock;
  BlockRequest* parent_ = nullptr;
  BlockRequest piece_{};  // what the store sees
  uint64_t region_first_ = 0;
  uint64_t region_count_ = 0;  // 0: nothing pinned
  EpochId submitted_ = 0;
  bool late_activation_ = false;  // planted fault: the log is written after the data
  Errno late_error_ = 0;
};

}  // namespace vmferry
