// SPDX-License-Identifier: Apache-2.0
//
// What an operator asks of a group.
#include "engine/base/log.h"
#include "engine/daemon/group.h"
#include "engine/runtime/steps.h"

namespace vmferry {

void Group::start_replication(ReplicationConfig config, Done done) {
  if (record_.peer.empty()) {
    return parts_.executor.post(
        [done = std::move(done)] { done(fail(ErrorKind::InvalidArgument, "the group has no peer")); });
  }
  if (!open_) {
    return parts_.executor.post(
        [done = std::move(done)] { done(fail(ErrorKind::Unavailable, "the daemon is shutting down")); });
  }
  config.active = true;
  change_replication(config);
  devices_.set_tracking_wanted(true);
  accept_waiters_.push_back(std::move(done));
  accept_timer_.start(options_.accept_timeout, [this] {
    finish_accept(fail(ErrorKind::Timeout, "peer '{}' {} within {}", record_.peer,
                       channel_.connected() ? "did not accept the volumes" : "was not reachable",
                       format_duration(options_.accept_timeout)));
  });
  if (sender_ == nullptr) return start_sender();
  sender_->set_overwrite_peer(config.overwrite_peer);
  if (refusal_ && channel_.connected()) {
    // Asked again, perhaps with --overwrite-peer: say hello again, so that both sides judge anew.
    send_hello();
  }
  if (sender_started_) feed_hello();
}

void Group::change_replication(const ReplicationConfig& config) {
  record_.replication = config;
  if (sender_ != nullptr) {
    sender_->set_interval(std::max<Nanoseconds>(config.rpo / 2, 100 * kMillisecond));
    if (config.paused)
      sender_->pause();
    else
      sender_->resume();
  }
  if (events_.config_changed) events_.config_changed(record_);
}

Status Group::may_stop_replication() const {
  const std::string& name = record_.members.front();
  if (coordinator_->migrating()) {
    return fail(ErrorKind::Busy, "a migration is under way; see: vmferry migrate cancel");
  }
  // Without the peer nobody would remember whose writes count.
  if (ownership().split_brain) {
    return fail(ErrorKind::Fenced,
                "split brain: decide first which side's writes count, with `vmferry resolve {0} --discard-local` or "
                "`vmferry resolve {0} --discard-peer`; then stop",
                name);
  }
  switch (ownership().state) {
    case HandoverState::Own:
    case HandoverState::Running:
    case HandoverState::Started:
    case HandoverState::Secondary:
    case HandoverState::Aborted:
      return {};
    default:
      return fail(ErrorKind::Fenced, "volume '{}' cannot be without its peer now: {}", name, explain(ownership()));
  }
}

void Group::say_stopped() {
  finish_accept(fail(ErrorKind::Unavailable, "replication was stopped"));
  if (!channel_.connected()) return;
  const GroupReject stopped{.kind = ErrorKind::Unavailable, .reason = "replication was stopped there"};
  channel_.send(TrafficClass::Control, MessageType::GroupReject, encode(stopped));
}

void Group::finish_accept(const Status& status) {
  accept_timer_.cancel();
  const auto waiters = std::move(accept_waiters_);
  accept_waiters_.clear();
  for (const Done& waiter : waiters) waiter(status);
}

std::string Group::no_contact() const {
  return channel_.connected() ? fmt::format("peer '{}' has not said yet what it holds", record_.peer)
                              : fmt::format("no connection to peer '{}'; see: vmferry peer list", record_.peer);
}

std::string Group::paused_there(Nanoseconds duration) const {
  return fmt::format(
      "by the other side, {} s ago, with `vmferry replicate pause` at peer '{}'; `vmferry replicate "
      "resume` there goes on",
      duration / kSecond, record_.peer);
}

Json Group::replication_status() const {
  Json volumes = Json::array();
  for (const ReplicaVolume& volume : volumes_) {
    Json entry{{"name", volume.name}, {"peer", record_.peer}, {"mode", record_.replication.mode}};
    if (ownership().split_brain) {
      entry["state"] = "split-brain";
      entry["reason"] = explain(ownership());
    } else if (sender_ != nullptr) {
      const SenderStatus status = sender_->status();
      // The group moves as one: figures are the group's.
      entry["state"] = std::string(to_string(status.state));
      entry["epoch"] = status.epoch;
      entry["rpo_s"] = status.rpo_s;
      entry["remaining_bytes"] = status.remaining_bytes;
      entry["wire_bytes"] = status.wire_bytes;
      entry["raw_bytes"] = status.raw_bytes;
      entry["literal_bytes"] = status.literal_bytes;
      entry["reference_bytes"] = status.reference_bytes;
      entry["index_blocks"] = status.index_blocks;
      entry["index_complete"] = status.index_complete;
      entry["send_rate"] = status.wire_rate;
      entry["dirty_rate"] = status.dirty_rate;
      entry["estimate_s"] = status.estimate_s;
      entry["epochs"] = status.epochs_acknowledged;
      entry["reason"] = refusal_ ? refusal_->text : status.reason;
      const bool apart =
          status.state == ReplicationState::Disconnected || status.state == ReplicationState::Inconsistent;
      if (apart && entry["reason"] == "") entry["reason"] = no_contact();
    } else if (receiver_ != nullptr && record_.replication.active) {
      const ReceiverStatus status = receiver_->status();
      const bool usable = status.quality == CopyQuality::Fuzzy || status.quality == CopyQuality::Consistent;
      const bool apart = !channel_.connected() || !hello_accepted_ || refusal_;
      const bool trouble = !status.reason.empty();
      const bool paused = !apart && status.source_paused;
      // As at the source, paused comes first: trouble here is not tried again before it goes on.
      entry["state"] = !usable   ? "inconsistent"
                       : apart   ? "disconnected"
                       : paused  ? "paused"
                       : trouble ? "degraded"
                                 : "in-sync";
      entry["epoch"] = status.epoch;
      // While all is well only the source knows. Otherwise the copy is at least as old as the trouble.
      entry["rpo_s"] = nullptr;
      const Nanoseconds now = parts_.executor.now();
      Nanoseconds since = now;
      if (apart) since = apart_since_.value_or(now);
      if (paused) since = status.source_paused_since;
      if (trouble) since = std::min(since, status.reason_since);
      const bool behind = (apart && apart_since_) || paused || trouble;
      if (usable && behind) entry["rpo_s"] = static_cast<double>(now - since) / 1e9;
      entry["remaining_bytes"] = 0;
      entry["wire_bytes"] = status.received_wire_bytes;
      entry["raw_bytes"] = status.received_body_bytes;
      entry["consistent"] = status.quality == CopyQuality::Consistent;
      entry["reference_mismatches"] = status.reference_mismatches;
      entry["reason"] = refusal_  ? refusal_->text
                        : trouble ? status.reason
                        : apart   ? no_contact()
                        : paused  ? paused_there(now - status.source_paused_since)
                                  : "";
    } else {
      continue;  // not replicated
    }
    entry["direction"] = sender_ != nullptr ? "sending" : "receiving";
    volumes.push_back(std::move(entry));
  }
  return volumes;
}

void Group::wait_in_sync(Done done) {
  if (sender_ == nullptr) {
    return parts_.executor.post([done = std::move(done)] {
      done(fail(ErrorKind::Unavailable, "not replicating from here; see: vmferry replicate start"));
    });
  }
  sender_->wait_in_sync(std::move(done));
}

void Group::verify(std::function<void(Result<std::vector<VerifyDifference>>)> done) {
  if (sender_ == nullptr) {
    return parts_.executor.post([done = std::move(done)] {
      done(fail(ErrorKind::Unavailable, "not replicating from here; verify runs at the primary"));
    });
  }
  sender_->verify(std::move(done));
}

bool Group::holds_foreign_data() const {
  return receiver_ != nullptr && receiver_->status().foreign_data;
}

Status Group::migrate(const MigrateRequest& request, HandoverCoordinator::MigrateDone done) {
  return coordinator_->migrate(request, std::move(done));
}

bool Group::handover_under_way() const {
  switch (ownership().state) {
    case HandoverState::Own:
    case HandoverState::Running:
    case HandoverState::Secondary:
    case HandoverState::Aborted:
    case HandoverState::Superseded:
      return coordinator_->migrating();
    default:
      return true;
  }
}

void Group::promote(PromoteOptions options, Done done) {
  options.alone = record_.peer.empty();
  coordinator_->promote(options, std::move(done));
}

void Group::resolve(ResolveChoice choice, bool force, Done done) {
  const bool undecided = ownership().split_brain || ownership().state == HandoverState::Superseded;
  if (choice != ResolveChoice::DiscardLocal || !undecided || copy_quality() != CopyQuality::Source) {
    return coordinator_->resolve(choice, force, std::move(done));
  }
  // The operator gives our writes up: from here on the files are no image of anything until the owner has copied them
  // anew, which needs no further word. Recorded first, so that a crash in between leaves only the command to repeat.
  sender_.reset();
  run_steps({[this](StepDone next) { close_receiver(std::move(next)); },
             [this](StepDone next) {
               ReplicaRecord record = state_.record();
               record.quality = CopyQuality::Inconsistent;
               record.lineage = {};
               record.final_attempt = {};
               state_.save(record, std::move(next));
             },
             [this, choice, force](StepDone next) { coordinator_->resolve(choice, force, std::move(next)); }},
            std::move(done));
}

}  // namespace vmferry
