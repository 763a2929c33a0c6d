// SPDX-License-Identifier: Apache-2.0
//
// Writes runs into the stores of a group: one frame of a direct epoch, or a whole committed epoch from staging.
//
// Flow: Receiver -> write_runs() per frame (direct), or EpochApply (staged: read each record back, prove its hash,
// write, flush all stores). Idempotent: a committed epoch is applied again after a crash.
// Threads: the group's executor.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/replicate/replica_state.h"
#include "engine/replicate/staging.h"

namespace vmferry {

// Every run lies inside its volume.
Status check_runs(const std::vector<FrameRun>& runs, const std::vector<ReplicaVolume>& volumes);

// Zero and literal runs into the stores, all at once; references are skipped: their bytes come with a healing frame.
// `literals` and what it points into stay until `done`, which is
// called exactly once and never inline, with the first error.
void write_runs(Executor& executor, const std::vector<ReplicaVolume>& volumes, const FrameBody& body,
                std::function<void(Errno)> done);

// All stores, one flush each, in parallel.
void flush_stores(Executor& executor, const std::vector<ReplicaVolume>& volumes, std::function<void(Errno)> done);

// Applies all records of a staging area, then flushes the stores. Guest reads must be held. Nothing happens any more
// once `alive` says no.
class EpochApply : public std::enable_shared_from_this<EpochApply> {
 public:
  using Done = std::function<void(Status)>;
  static void run(Executor& executor, StagingArea& staging, const std::vector<ReplicaVolume>& volumes,
                  Alive::Token alive, Done done);

 private:
  EpochApply(Executor& executor, StagingArea& staging, const std::vector<ReplicaVolume>& volumes, Alive::Token alive,
             Done done)
      : executor_(executor), staging_(staging), volumes_(volumes), alive_(std::move(alive)), done_(std::move(done)) {}
  void pump();
  void finish_one(Status status);

  static constexpr size_t kInFlightMax = 4;  // records, about 1 MiB each

  Executor& executor_;
  StagingArea& staging_;
  std::vector<ReplicaVolume> volumes_;
  Alive::Token alive_;
  Done done_;
  size_t next_ = 0;
  size_t in_flight_ = 0;
  Status status_{};
};

}  // namespace vmferry
