// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/sender.h"

#include "engine/base/assert.h"
#include "engine/replicate/sender_impl.h"
#include "engine/replicate/sender_verify.h"

namespace vmferry {

namespace {

uint64_t total_size(const std::vector<ReplicaVolume>& volumes) {
  uint64_t size = 0;
  for (const auto& volume : volumes) size += volume.device->size();
  return size;
}

}  // namespace

std::string_view to_string(ReplicationState state) noexcept {
  switch (state) {
    case ReplicationState::Initial:
      return "initial";
    case ReplicationState::CatchingUp:
      return "catching-up";
    case ReplicationState::InSync:
      return "in-sync";
    case ReplicationState::Degraded:
      return "degraded";
    case ReplicationState::Paused:
      return "paused";
    case ReplicationState::Disconnected:
      return "disconnected";
    case ReplicationState::Inconsistent:
      return "inconsistent";
  }
  return "unknown";
}

Sender::Impl::Impl(Executor& executor, GroupChannel& channel, ReplicaState& state, std::vector<ReplicaVolume> volumes,
                   SenderOptions options)
    : executor_(executor),
      channel_(channel),
      state_(state),
      volumes_(std::move(volumes)),
      options_(options),
      session_(executor.new_id()),
      encoder_(std::make_shared<EpochEncoder>(EpochEncoder::Options{.codec = options.codec,
                                                                    .urgent_window_log = options.urgent_window_log,
                                                                    .index_bytes_max = options.index_bytes_max,
                                                                    .group_bytes = total_size(volumes_)})),
      reader_(volumes_, options.reads_in_flight_max),
      seal_timer_(executor),
      backoff_timer_(executor),
      tick_timer_(executor),
      learner_({.executor = executor,
                .volumes = volumes_,
                .blocks_max = encoder_->index_blocks_max(),
                .idle = [this] { return may_learn(); },
                .known = [this](uint16_t volume, ByteRange range) { return encoder_->known_bytes(volume, range); },
                .learn = [this](uint16_t volume, uint64_t offset,
                                const auto& blocks) { return encoder_->learn(volume, offset, blocks); }}) {}

Sender::Impl::~Impl() {
  if (!current_) return;
  for (const auto& volume : volumes_) volume.device->consumer().merge_sealed_back();
}

void Sender::Impl::start(Done done) {
  VF_ASSERT(!started_);
  clean_at_ = tick_at_ = executor_.now();
  activate_volumes(0, [this, done = std::move(done)](Status status) {
    if (!status) return done(status);
    save_source(done);
  });
}

void Sender::Impl::activate_volumes(size_t index, Done done) {
  if (index == volumes_.size()) return done({});
  TrackedDevice& device = *volumes_[index].device;
  if (device.tracking()) return activate_volumes(index + 1, std::move(done));
  device.activate_tracking(Baseline::Dirty, [this, alive = alive_.token(), index, done](Status status) {
    if (!alive()) return;
    if (!status) return done(fail_with(status.error(), volumes_[index].name));
    activate_volumes(index + 1, done);
  });
}

// A former copy goes on with the lineage and epoch that it shares with its peer; an unfinished copy shares nothing.
void Sender::Impl::save_source(Done done) {
  ReplicaRecord record = state_.record();
  if (record.quality == CopyQuality::Inconsistent) record.lineage = {};
  record.quality = CopyQuality::Source;
  record.quality_epoch = 0;
  // final_attempt stays: until the next epoch is acknowledged, a restarted new owner has to tell its predecessor which
  // epoch was the last one, or that one could not follow.
  record.session = {};
  epoch_last_ = record.epoch;
  const auto saved = [this, alive = alive_.token(), done](const Status& status) {
    if (!alive()) return;
    if (!status) return done(status);
    started_ = true;
    // What was dirty before is no rate of writes.
    tick_at_ = executor_.now();
    tick_open_ = open_bytes();
    tick();
    learner_.start();
    done({});
  };
  state_.save(record, saved);
}

void Sender::Impl::fill_hello(GroupHello& hello) const {
  hello.volumes.clear();
  for (const auto& volume : volumes_) hello.volumes.push_back({volume.name, volume.device->size()});
  const ReplicaRecord& record = state_.record();
  hello.quality = record.quality;
  hello.lineage = record.lineage;
  hello.epoch = record.epoch;
  hello.quality_epoch = record.quality_epoch;
  hello.session = session_;
}

Status Sender::Impl::on_peer_hello(const GroupHello& hello) {
  VF_ASSERT(started_);
  on_disconnected();
  if (Status planned = plan(hello); !planned) {
    refusal_ = planned.error().text;
    return planned;
  }
  refusal_.clear();
  peer_ = hello;
  peer_quality_ = hello.quality;
  connected_ = true;
  degraded_ = false;
  backoff_count_ = 0;
  epoch_last_ = std::max({epoch_last_, hello.epoch, hello.staged_epoch});
  refuse_early_final();
  if (current_) continue_current(hello);
  restart_pipeline(current_ ? frame_next_ - 1 : frame_applied_);
  if (paused_) say_paused();
  pump_soon();
  return {};
}

void Sender::Impl::set_paused(bool paused) {
  if (paused_ != paused) {
    paused_ = paused;
    paused_at_ = executor_.now();
    if (connected_) say_paused();
  }
  pump_soon();
}

// An older peer would refuse the message; it goes on calling its copy in sync.
void Sender::Impl::say_paused() {
  if (!channel_.peer_has(kFeatureSourceState)) return;
  const auto paused_ns = static_cast<uint64_t>(paused_ ? executor_.now() - paused_at_ : 0);
  send(TrafficClass::Control, MessageType::SourceState, SourceState{.paused = paused_, .paused_ns = paused_ns});
}

// Decides whether the copy fits our dirty state, and how the next epoch may reach it.
Status Sender::Impl::plan(const GroupHello& hello) {
  if (Status same = check_volumes(volumes_, hello.volumes); !same) return same;
  const ReplicaRecord& record = state_.record();
  const bool usable = hello.quality >= CopyQuality::Fuzzy;
  const bool same_lineage = !record.lineage.is_none() && hello.lineage == record.lineage && !hello.diverged &&
                            hello.quality >= CopyQuality::Inconsistent;
  // A copy that is behind what it once acknowledged was replaced by an older one: our dirty state does not fit it.
  const bool behind = same_lineage && usable && hello.epoch < record.epoch;
  full_needed_ = !same_lineage || behind;
  if (full_needed_ && !options_.overwrite_peer) {
    if (hello.diverged) {
      return fail(ErrorKind::Denied,
                  "the peer's volumes hold writes that this side never had; --overwrite-peer discards them");
    }
    if (hello.foreign_data) {
      return fail(ErrorKind::Denied,
                  "the peer's volumes hold data that is no earlier copy; --overwrite-peer replaces it");
    }
    if (usable && !same_lineage) {
      return fail(
          ErrorKind::Denied,
          "the peer's volumes hold a copy, as of its epoch {}, but this side does not know what has changed since "
          "(another group, another source, or copied elsewhere in between), so that it is no earlier copy; "
          "--overwrite-peer replaces it",
          hello.epoch);
    }
  }
  // A usable copy is replaced as a whole, unless the operator accepts that it is unusable meanwhile (I6).
  kind_next_ = usable && !(full_needed_ && options_.overwrite_peer) ? EpochKind::Staged : EpochKind::Direct;
  return {};
}

// After a cut: the epoch that was under way is acknowledged, resumed, or taken back to be sealed anew.
void Sender::Impl::continue_current(const GroupHello& hello) {
  if (current_->acknowledged) return;
  const uint64_t epoch = current_->begin.epoch;
  const bool same_lineage = hello.lineage == current_->begin.lineage;
  if (same_lineage && hello.epoch >= epoch && hello.quality >= CopyQuality::Fuzzy) {
    return epoch_acknowledged({epoch, hello.quality});
  }
  const bool staged_here = hello.session == session_ && hello.staged_epoch == epoch;
  // A staged full copy changes the peer's lineage only when it is applied.
  if (staged_here && (current_->begin.full || !full_needed_) && resume_current(hello.staged_frame)) {
    full_needed_ = false;
    return;
  }
  abandon_current(false);
}

bool Sender::Impl::resume_current(uint64_t frame) {
  SentEpoch& epoch = *current_;
  if (frame < epoch.acked_frame || frame >= frame_next_) return false;
  WalkPosition position = epoch.acked;
  while (!epoch.marks.empty() && epoch.marks.back().frame > frame) epoch.marks.pop_back();
  if (!epoch.marks.empty()) position = epoch.marks.back().after;
  epoch.walked = position;
  epoch.walk_done = epoch.end_sent = false;
  epoch.walked_bytes = epoch.marks.empty() ? epoch.acked_bytes : epoch.marks.back().walked_bytes;
  epoch.heals.clear();
  frame_next_ = frame + 1;
  EpochBegin begin = epoch.begin;
  begin.resume = true;
  begin.first_frame = frame_next_;
  announce(begin);
  log::info("epoch={} resumed behind frame {}", epoch.begin.epoch, frame);
  return true;
}

void Sender::Impl::on_disconnected() {
  connected_ = false;
  granted_ = sent_ = 0;
  begin_held_.reset();
  restart_pipeline(frame_applied_);
  backoff_timer_.cancel();
  if (verify_) verify_->fail_with_reason({ErrorKind::Unavailable, "the connection to the peer was lost"});
}

// Whatever is in the pipeline is void; its blocks are still sealed and will be walked again.
void Sender::Impl::restart_pipeline(uint64_t frame) {
  drop_jobs(0);
  extents_.clear();
  encoder_restart_ = frame;
  index_drop_.reset();
}

Status Sender::Impl::on_message(MessageType type, ByteSpan payload) {
  if (!connected_) return {};
  const auto error_of = [](const auto& decoded) { return Status(tl::unexpected<Error>(decoded.error())); };
  switch (type) {
    case MessageType::Credit: {
      const auto credit = decode_credit(payload);
      if (!credit) return error_of(credit);
      if (credit->granted < granted_) return fail(ErrorKind::Corrupt, "peer took back credit");
      granted_ = credit->granted;
      if (const auto begin = std::exchange(begin_held_, std::nullopt)) announce(*begin);
      break;
    }
    case MessageType::EpochSegmentAck: {
      const auto ack = decode_epoch_segment_ack(payload);
      if (!ack) return error_of(ack);
      segment_acknowledged(*ack);
      break;
    }
    case MessageType::EpochAck: {
      const auto ack = decode_epoch_ack(payload);
      if (!ack) return error_of(ack);
      if (ack->epoch > epoch_last_)
        return fail(ErrorKind::Corrupt, "peer acknowledged epoch {} never sent", ack->epoch);
      epoch_acknowledged(*ack);
      break;
    }
    case MessageType::EpochResend: {
      auto resend = decode_epoch_resend(payload);
      if (!resend) return error_of(resend);
      for (const auto& item : resend->ranges) {
        const bool fits = item.volume < volumes_.size() &&
                          fits_in(item.range.offset, item.range.length, volumes_[item.volume].device->size());
        if (!fits) return fail(ErrorKind::Corrupt, "peer asks for blocks outside of volume {}", item.volume);
      }
      if (!current_ || current_->begin.epoch != resend->epoch || resend->frame >= frame_next_) break;
      ++totals_.resent_references;
      ++mismatches_new_;
      current_->heals.push_back({resend->frame, std::move(resend->ranges)});
      break;
    }
    case MessageType::EpochAbandon: {
      const auto abandon = decode_epoch_abandon(payload);
      if (!abandon) return error_of(abandon);
      refused(*abandon);
      break;
    }
    case MessageType::VerifyReply: {
      auto reply = decode_verify_reply(payload);
      if (!reply) return error_of(reply);
      if (verify_) verify_->on_reply(*reply);
      break;
    }
    default:
      return fail(ErrorKind::Mismatch, "message type {} is not for a source", static_cast<uint16_t>(type));
  }
  pump();
  return {};
}

Sender::Sender(Executor& executor, GroupChannel& channel, ReplicaState& state, std::vector<ReplicaVolume> volumes,
               SenderOptions options)
    : impl_(std::make_unique<Impl>(executor, channel, state, std::move(volumes), options)) {}
Sender::~Sender() = default;

void Sender::start(Done done) {
  impl_->start(std::move(done));
}
void Sender::fill_hello(GroupHello& hello) const {
  impl_->fill_hello(hello);
}
Status Sender::on_peer_hello(const GroupHello& hello) {
  return impl_->on_peer_hello(hello);
}
void Sender::on_disconnected() {
  impl_->on_disconnected();
}
Status Sender::on_message(MessageType type, ByteSpan payload) {
  return impl_->on_message(type, payload);
}
void Sender::on_writable(TrafficClass) {
  impl_->pump();
}
void Sender::set_interval(Nanoseconds interval) {
  impl_->options_.interval = interval;
  impl_->pump_soon();
}
void Sender::set_overwrite_peer(bool allowed) {
  impl_->options_.overwrite_peer = allowed;
}
void Sender::pause() {
  impl_->set_paused(true);
}
void Sender::resume() {
  impl_->set_paused(false);
}
void Sender::sync_now() {
  impl_->sync_wanted_ = true;
  impl_->pump_soon();
}
void Sender::wait_in_sync(Done done) {
  impl_->waiters_.push_back({0, std::move(done)});
  impl_->pump_soon();
}
void Sender::run_round_now(Done done, TrafficClass traffic, bool consistent) {
  impl_->traffic_next_ = traffic;
  impl_->consistent_wanted_ = consistent;
  wait_in_sync(std::move(done));
}
uint64_t Sender::predicted_round_bytes() const {
  return impl_->predicted_round_bytes();
}
void Sender::send_final_epoch(const Id128& attempt, TrafficClass traffic, std::function<void(Result<uint64_t>)> done) {
  impl_->send_final_epoch({attempt, traffic, std::move(done), false});
}
void Sender::cancel_final_epoch() {
  impl_->final_.reset();
  impl_->pump_soon();
}
SenderStatus Sender::status() const {
  return impl_->status();
}

}  // namespace vmferry
