// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/group_devices.h"

#include <cerrno>
#include <utility>

#include "engine/base/log.h"
#include "engine/runtime/steps.h"

namespace vmferry {

namespace {

// How late a first write may be noticed. Only `wrote` in the ownership depends on it, and the activity log covers a
// crash in between.
constexpr Nanoseconds kFirstWritePoll = 20 * kMillisecond;
constexpr Nanoseconds kTrackingRetry = 500 * kMillisecond;

}  // namespace

VolumeGroupDevices::VolumeGroupDevices(Executor& executor, std::vector<TrackedDevice*> devices)
    : devices_(std::move(devices)), first_write_timer_(executor), retry_timer_(executor) {}

void VolumeGroupDevices::park_writes() {
  ++gate_generation_;
  for (TrackedDevice* device : devices_) device->set_gate(WriteGate::Parked);
}

void VolumeGroupDevices::quiesce(std::function<void(Status)> done) {
  const auto step = [](TrackedDevice& device, StepDone next) {
    device.quiesce([&device, next] {
      flush_block(device, [next](Errno error) {
        if (error != 0) return next(fail(ErrorKind::Io, "flush before the handover: {}", errno_text(error)));
        next({});
      });
    });
  };
  run_each(devices_, step, std::move(done));
}

void VolumeGroupDevices::accept_writes() {
  const uint64_t generation = ++gate_generation_;
  bool untracked = false;
  for (TrackedDevice* device : devices_) untracked = untracked || !device->tracking();
  if (!tracking_wanted_ || !untracked) return open_gates();
  // The peer has what we have: this side was its copy a moment ago. Writes wait until marks are possible (I1).
  for (TrackedDevice* device : devices_) device->set_gate(WriteGate::Parked);
  const auto step = [](TrackedDevice& device, StepDone next) {
    if (device.tracking()) return next({});
    device.activate_tracking(Baseline::Clean, std::move(next));
  };
  run_each(devices_, step, [this, alive = alive_.token(), generation](const Status& status) {
    if (!alive() || generation != gate_generation_) return;
    if (status) return open_gates();
    log::error("tracking cannot start, writes wait: {}", status.error().text);
    retry_timer_.start(kTrackingRetry, [this, generation] {
      if (generation == gate_generation_) accept_writes();
    });
  });
}

void VolumeGroupDevices::open_gates() {
  for (TrackedDevice* device : devices_) {
    device->set_gate(WriteGate::Open);
    device->release_parked();
  }
}

void VolumeGroupDevices::refuse_writes() {
  ++gate_generation_;
  for (TrackedDevice* device : devices_) {
    device->set_gate(WriteGate::ReadOnly);
    device->fail_parked(EPERM);
  }
}

uint64_t VolumeGroupDevices::mutation_count() const {
  uint64_t count = 0;
  for (const TrackedDevice* device : devices_) count += device->mutation_counter();
  return count;
}

void VolumeGroupDevices::notice_first_write(std::function<void()> noticed) {
  first_write_noticed_ = std::move(noticed);
  first_write_base_ = mutation_count();
  look_for_write();
}

void VolumeGroupDevices::look_for_write() {
  if (first_write_noticed_ == nullptr) return;
  if (mutation_count() != first_write_base_) return std::exchange(first_write_noticed_, nullptr)();
  first_write_timer_.start(kFirstWritePoll, [this] { look_for_write(); });
}

}  // namespace vmferry
