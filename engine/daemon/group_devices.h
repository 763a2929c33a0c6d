// SPDX-License-Identifier: Apache-2.0
//
// The volumes of one group as the handover sees them: one gate for all, and tracking that is on before the first write
// of a new primary is let through.
// Threads: the group's executor.
#pragma once

#include <functional>
#include <vector>

#include "engine/migrate/interfaces.h"
#include "engine/runtime/executor.h"
#include "engine/track/tracked_device.h"

namespace vmferry {

class VolumeGroupDevices final : public GroupDevices {
 public:
  // The devices outlive this.
  VolumeGroupDevices(Executor& executor, std::vector<TrackedDevice*> devices);

  // Whether writes have to be tracked for a peer. Turning it on makes accept_writes() wait for tracking.
  void set_tracking_wanted(bool wanted) { tracking_wanted_ = wanted; }

  void park_writes() override;
  void quiesce(std::function<void(Status)> done) override;
  void accept_writes() override;
  void refuse_writes() override;
  void notice_first_write(std::function<void()> noticed) override;
  bool wrote() const override { return mutation_count() != first_write_base_; }

  uint64_t mutation_count() const;
  const std::vector<TrackedDevice*>& devices() const { return devices_; }

 private:
  void open_gates();
  void look_for_write();

  std::vector<TrackedDevice*> devices_;
  bool tracking_wanted_ = false;
  uint64_t gate_generation_ = 0;  // a later order of the coordinator overrides an opening that is under way
  std::function<void()> first_write_noticed_;
  uint64_t first_write_base_ = 0;
  Timer first_write_timer_;
  Timer retry_timer_;
  Alive alive_;
};

}  // namespace vmferry
