// SPDX-License-Identifier: Apache-2.0
//
// Control actions of TrackedDevice: each waits until no mutating request is in flight, one after the other, while new
// mutating requests wait. Threads: the volume's home executor.
#include <algorithm>
#include <cerrno>
#include <utility>

#include "engine/base/assert.h"
#include "engine/track/track_metadata.h"
#include "engine/track/tracked_op.h"

namespace vmferry {

void TrackedDevice::begin_control(std::function<void()> action) {
  control_actions_.push_back(std::move(action));
  if (control_actions_.size() == 1) run_control();
}

void TrackedDevice::run_control() {
  if (control_running_ || control_actions_.empty() || mutations_in_flight_ != 0) return;
  control_running_ = true;
  executor_.post([this, alive = alive_.token()] {
    if (alive()) control_actions_.front()();
  });
}

void TrackedDevice::end_control() {
  control_running_ = false;
  control_actions_.pop_front();
  if (!control_actions_.empty()) return run_control();
  for (BlockRequest* request : std::exchange(waiting_for_control_, {})) submit(*request);
}

void TrackedDevice::activate_tracking(Baseline baseline, Done done) {
  begin_control([this, baseline, done = std::move(done)] {
    metadata_->activate(store_.size(), baseline, [this, done](Status status) {
      if (status) tracking_ = true;
      done(status);
      end_control();
    });
  });
}

void TrackedDevice::deactivate_tracking(Done done) {
  begin_control([this, done = std::move(done)] {
    auto finished = [this, done](Status status) {
      if (status) tracking_ = false;
      done(status);
      end_control();
    };
    if (!tracking_) return finished({});
    metadata_->deactivate(std::move(finished));
  });
}

void TrackedDevice::mark_dirty(ByteRange range) {
  VF_ASSERT(tracking_);
  mark(range);
}

void TrackedDevice::save_dirty(Done done) {
  VF_ASSERT(tracking_);
  metadata_->save_dirty(std::move(done));
}

void TrackedDevice::resize(uint64_t new_size, Done done) {
  if (new_size < size()) {
    return executor_.post([this, new_size, done = std::move(done)] {
      done(fail(ErrorKind::InvalidArgument, "volume '{}' has {} bytes and cannot shrink to {}", options_.name, size(),
                new_size));
    });
  }
  begin_control([this, new_size, done = std::move(done)] {
    epochs_.grow(std::max(new_size, epochs_.open_map().device_size()));
    auto finished = [this, done](Status status) {
      done(status);
      end_control();
    };
    if (!tracking_) return finished({});
    metadata_->grow(std::max(new_size, metadata_->tracked_size()), std::move(finished));
  });
}

void TrackedDevice::close(Done done) {
  VF_ASSERT(phase_ == Phase::Ready);
  fail_parked(ESHUTDOWN);
  hold_reads(false);
  begin_control([this, done = std::move(done)]() mutable { close_when_drained(std::move(done)); });
}

// Runs as the last control action and never ends it: what waits behind it is refused.
void TrackedDevice::close_when_drained(Done done) {
  phase_ = Phase::Closing;
  for (BlockRequest* request : std::exchange(waiting_for_control_, {})) complete_later(*request, ESHUTDOWN);
  quiesce_reads([this, done = std::move(done)]() mutable {
    flush_block(store_, [this, done = std::move(done)](Errno error) mutable {
      if (error != 0) return done(fail(ErrorKind::Io, "flush '{}': {}", options_.name, errno_text(error)));
      metadata_->close([this, done = std::move(done)](Status status) {
        phase_ = Phase::Closed;
        done(status);
      });
    });
  });
}

}  // namespace vmferry
