// SPDX-License-Identifier: Apache-2.0
//
// Reads sealed blocks back for the frames of an epoch, several requests at once, and knows where the holes are.
//
// Flow: Sender decides what a frame holds (FramePiece) -> read() -> TrackedDevice::submit_readback per piece, at most
// `reads_in_flight_max` at the devices -> done when all of the frame is there.
// Threads: the group's executor. Requests of a destroyed reader finish by themselves.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "engine/replicate/epoch_encoder.h"
#include "engine/replicate/replica_state.h"

namespace vmferry {

// A frame on its way from the volumes to the channel.
struct SendJob {
  FrameJob frame;
  bool dropped = false;  // its epoch or connection is gone; nobody waits for it
  size_t reads_pending = 0;
  Errno error = 0;
  bool read = false;
};

class FrameReader {
 public:
  FrameReader(std::vector<ReplicaVolume> volumes, uint32_t reads_in_flight_max);
  ~FrameReader();
  FrameReader(const FrameReader&) = delete;
  FrameReader& operator=(const FrameReader&) = delete;

  // Fills job->frame.data for every piece that is no hole. Frames are read in the order of the calls, as far as the
  // devices keep it. `done` is not called after the reader is gone; inline only when there is nothing to read.
  void read(std::shared_ptr<SendJob> job, std::function<void()> done);

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

// Allocation of the part of one volume that is being walked.
class ExtentCache {
 public:
  // The extent that holds byte `offset`, or nullopt: query() first.
  std::optional<Extent> find(uint16_t volume, uint64_t offset) const;
  void query(uint16_t volume, BlockDevice& store, ByteRange range, Alive::Token alive, std::function<void()> done);
  // Also what was asked and not answered yet: blocks may have been written since the store looked.
  void clear() {
    extents_.clear();
    ++generation_;
  }

 private:
  uint16_t volume_ = 0;
  uint64_t generation_ = 0;
  std::vector<Extent> extents_;
};

}  // namespace vmferry
