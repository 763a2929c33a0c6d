// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/group_replication.h"

#include "engine/daemon/group.h"

namespace vmferry {

void GroupReplicationLink::ensure_started(std::function<void(Status)> done) {
  ReplicationConfig config = group_.record_.replication;
  config.paused = false;
  group_.start_replication(config, std::move(done));
}

RoundProgress GroupReplicationLink::progress() const {
  RoundProgress progress;
  progress.connected = group_.channel_.connected() && group_.hello_accepted_;
  progress.raw_bytes = totals_.raw_bytes;
  progress.wire_bytes = totals_.wire_bytes;
  if (group_.sender_ == nullptr) return progress;
  const SenderStatus status = group_.sender_->status();
  progress.initial_done = status.peer_quality == CopyQuality::Fuzzy || status.peer_quality == CopyQuality::Consistent;
  progress.remaining_bytes = status.remaining_bytes;
  progress.predicted_bytes = group_.sender_->predicted_round_bytes();
  progress.dirty_rate = status.dirty_rate;
  progress.send_rate = std::max(status.wire_rate, group_.channel_.figures().send_rate);
  progress.raw_bytes += status.raw_bytes;
  progress.wire_bytes += status.wire_bytes;
  return progress;
}

void GroupReplicationLink::run_round_now(const RoundOptions& options, std::function<void(Status)> done) {
  if (group_.sender_ == nullptr) {
    return group_.parts_.executor.post(
        [done = std::move(done)] { done(fail(ErrorKind::Unavailable, "not replicating")); });
  }
  group_.sender_->run_round_now(std::move(done), options.urgent ? TrafficClass::Urgent : TrafficClass::Bulk,
                                options.consistent);
}

void GroupReplicationLink::send_final_epoch(const Id128& attempt, std::function<void(Result<uint64_t>)> done) {
  if (group_.sender_ == nullptr) {
    return group_.parts_.executor.post(
        [done = std::move(done)] { done(fail(ErrorKind::Unavailable, "not replicating")); });
  }
  group_.sender_->send_final_epoch(attempt, TrafficClass::Urgent, std::move(done));
}

void GroupReplicationLink::cancel_final_epoch() {
  if (group_.sender_ != nullptr) group_.sender_->cancel_final_epoch();
}

void GroupReplicationLink::prepare_to_follow(uint64_t epoch, std::function<void(Status)> done) {
  group_.prepare_to_follow(epoch, std::move(done));
}

void GroupReplicationLink::prepare_to_own(const OwnOptions& options, std::function<void(Status)> done) {
  group_.close_receiver([this, options, done = std::move(done)](const Status& status) {
    if (status || options.accept_inconsistent) return done({});
    group_.open_copy();
    done(status);
  });
}

void GroupReplicationLink::set_final_epoch_listener(std::function<void(const Id128& attempt, uint64_t epoch)> durable) {
  group_.final_listener_ = std::move(durable);
}

Id128 GroupReplicationLink::durable_final_attempt(uint64_t& epoch) const {
  // Also as the new primary, after a restart without a receiver: the predecessor asks which epoch it may follow from.
  epoch = group_.state_.record().epoch;
  return group_.state_.record().final_attempt;
}

bool GroupReplicationLink::copy_is_consistent() const {
  return group_.copy_is_consistent();
}

bool GroupReplicationLink::copy_is_whole() const {
  return group_.copy_is_consistent() || group_.copy_quality() == CopyQuality::Fuzzy;
}

bool GroupReplicationLink::holds_unsent_writes() const {
  return group_.copy_quality() == CopyQuality::Source && !group_.peer_has_everything();
}

}  // namespace vmferry
