// SPDX-License-Identifier: Apache-2.0
//
// Sender: rates, status, prediction.
#include "engine/replicate/sender_impl.h"

namespace vmferry {

namespace {

double seconds(Nanoseconds duration) {
  return static_cast<double>(duration) / 1e9;
}

}  // namespace

// Once a second: samples the counters, and seals when the interval is over.
void Sender::Impl::tick() {
  const Nanoseconds now = executor_.now();
  const Nanoseconds elapsed = now - tick_at_;
  raw_rate_.add(totals_.raw_bytes - tick_raw_, elapsed);
  wire_rate_.add(wire_bytes_ - tick_wire_, elapsed);
  const uint64_t open = open_bytes();
  dirty_rate_.add(open - std::min(open, tick_open_), elapsed);
  tick_at_ = now;
  tick_raw_ = totals_.raw_bytes;
  tick_wire_ = wire_bytes_;
  tick_open_ = open;
  if (!current_ && open == 0 && peer_quality_ >= CopyQuality::Fuzzy && !full_needed_) clean_at_ = now;
  look_after_verify();
  pump();
  tick_timer_.start(kSecond, [this] { tick(); });
}

uint64_t Sender::Impl::remaining_bytes() const {
  uint64_t sealed = 0;
  if (current_ && !current_->acknowledged) {
    sealed = current_->sealed_bytes - std::min(current_->sealed_bytes, current_->walked_bytes);
  }
  return open_bytes() + sealed;
}

uint64_t Sender::Impl::predicted_round_bytes() const {
  return static_cast<uint64_t>(static_cast<double>(remaining_bytes()) * reduction_);
}

SenderStatus Sender::Impl::status() const {
  SenderStatus status = totals_;
  status.peer_quality = peer_quality_;
  status.epoch = state_.record().epoch;
  status.remaining_bytes = remaining_bytes();
  status.wire_bytes = wire_bytes_;
  status.raw_rate = raw_rate_.bytes_per_second();
  status.wire_rate = wire_rate_.bytes_per_second();
  status.dirty_rate = dirty_rate_.bytes_per_second();
  status.reduction = reduction_;
  status.reason = refusal_;
  status.verified_bytes = verified_bytes();
  status.index_blocks = learner_.learnt_blocks();
  status.index_complete = learner_.finished();

  const bool lacks_something = current_ || open_bytes() > 0 || peer_quality_ < CopyQuality::Fuzzy || full_needed_;
  const Nanoseconds age = executor_.now() - clean_at_;
  status.rpo_s = lacks_something ? seconds(age) : 0;
  if (status.remaining_bytes == 0) {
    status.estimate_s = 0;
  } else if (raw_rate_.value() > dirty_rate_.value()) {
    status.estimate_s = static_cast<double>(status.remaining_bytes) / (raw_rate_.value() - dirty_rate_.value());
  }

  if (paused_) {
    status.state = ReplicationState::Paused;
    if (status.reason.empty()) status.reason = "by `vmferry replicate pause`; `vmferry replicate resume` goes on";
  } else if (!connected_) {
    // Also after a restart in the first copy, before the peer has told: no epoch was ever acknowledged.
    const bool unusable = peer_quality_ == CopyQuality::Inconsistent ||
                          (state_.record().epoch == 0 && !state_.record().lineage.is_none());
    status.state = unusable ? ReplicationState::Inconsistent : ReplicationState::Disconnected;
  } else if (degraded_) {
    status.state = ReplicationState::Degraded;
  } else if (peer_quality_ < CopyQuality::Fuzzy || full_needed_ || (current_ && current_->begin.full)) {
    status.state = ReplicationState::Initial;
  } else {
    const bool late = lacks_something && age > 2 * options_.interval + kSecond;
    status.state = late ? ReplicationState::CatchingUp : ReplicationState::InSync;
  }
  return status;
}

}  // namespace vmferry
