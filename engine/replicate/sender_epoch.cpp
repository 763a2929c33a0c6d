// SPDX-License-Identifier: Apache-2.0
//
// Sender: when an epoch is sealed, and what ends it.
#include <algorithm>
#include <utility>

#include "engine/base/assert.h"
#include "engine/replicate/epoch_apply.h"
#include "engine/replicate/sender_impl.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kBackoffMin = 1 * kSecond;
constexpr Nanoseconds kBackoffMax = 30 * kSecond;

}  // namespace

void Sender::Impl::pump_soon() {
  executor_.post([this, alive = alive_.token()] {
    if (alive()) pump();
  });
}

void Sender::Impl::pump() {
  if (!started_) return;
  if (connected_ && !paused_) {
    if (!current_ && !preparing_ && !backoff_timer_.running() && wants_epoch()) {
      full_needed_ ? prepare_full() : begin_epoch();
    }
    fill_pipeline();
    pump_encoder();
    maybe_end();
  }
  check_waiters();
}

uint64_t Sender::Impl::open_bytes() const {
  uint64_t bytes = 0;
  for (const auto& volume : volumes_) bytes += volume.device->consumer().open_bytes();
  return bytes;
}

uint64_t Sender::Impl::sealed_bytes() const {
  uint64_t bytes = 0;
  for (const auto& volume : volumes_) bytes += volume.device->consumer().sealed_bytes();
  return bytes;
}

bool Sender::Impl::wants_epoch() const {
  if (final_) return !final_->acknowledged;
  // An unusable copy needs the end of its full copy even when no block is left to send.
  if (full_needed_ || peer_quality_ < CopyQuality::Fuzzy) return true;
  if (open_bytes() == 0) {
    // The copy is whole and lacks nothing: an empty epoch proves that it is the image of this moment (I6).
    return peer_quality_ == CopyQuality::Fuzzy &&
           (consistent_wanted_ || executor_.now() >= sealed_last_ + options_.interval);
  }
  if (sync_wanted_ || !waiters_.empty()) return true;
  return executor_.now() >= sealed_last_ + options_.interval;
}

// Every block is marked and the new lineage recorded, durably, before the copy hears of it: whatever happens then, it
// either still has its old lineage or everything that it lacks is dirty here.
void Sender::Impl::prepare_full() {
  preparing_ = true;
  auto pending = std::make_shared<size_t>(volumes_.size());
  auto first_error = std::make_shared<Status>();
  const auto finished = [this, alive = alive_.token()](Status status) {
    if (!alive()) return;
    preparing_ = false;
    if (!status) {
      refusal_ = status.error().text;
      degraded_ = true;
      return backoff_timer_.start(kBackoffMax, [this] { pump(); });
    }
    if (connected_ && !current_ && full_needed_) begin_epoch();
    pump();
  };
  for (const auto& volume : volumes_) {
    volume.device->mark_all_dirty();
    volume.device->save_dirty([this, alive = alive_.token(), pending, first_error, finished](Status status) {
      if (!alive()) return;
      if (*first_error && !status) *first_error = status;
      if (--*pending > 0) return;
      if (!*first_error) return finished(*first_error);
      tick_open_ = open_bytes();  // of all blocks nobody wrote
      ReplicaRecord record = state_.record();
      record.lineage = executor_.new_id();
      record.epoch = epoch_last_;
      state_.save(record, finished);
    });
  }
}

void Sender::Impl::begin_epoch() {
  for (const auto& volume : volumes_) VF_ASSERT(volume.device->consumer().can_seal());
  current_.emplace();
  SentEpoch& epoch = *current_;
  // All volumes in one task: no completion can fall between (I7).
  for (const auto& volume : volumes_) {
    epoch.mutations.push_back(volume.device->mutation_counter());
    epoch.mutated = epoch.mutated || volume.device->mutations_in_flight() > 0;
    volume.device->consumer().seal();
  }
  epoch.sealed_at = sealed_last_ = executor_.now();
  epoch.sealed_bytes = sealed_bytes();
  epoch.acked_frame = frame_next_ - 1;
  epoch.traffic = final_ ? final_->traffic : std::exchange(traffic_next_, TrafficClass::Bulk);
  epoch.begin = {.epoch = ++epoch_last_,
                 .session = session_,
                 .lineage = state_.record().lineage,
                 .kind = kind_next_,
                 .full = full_needed_,
                 .overwrite = options_.overwrite_peer,
                 .resume = false,
                 .final_attempt = final_ ? final_->attempt : Id128{},
                 .first_frame = frame_next_,
                 .dirty_bytes = epoch.sealed_bytes};
  index_clear_ = index_clear_ || full_needed_;
  full_needed_ = false;
  if (kind_next_ == EpochKind::Direct) peer_quality_ = CopyQuality::Inconsistent;  // until it is acknowledged
  sync_wanted_ = false;
  tick_open_ = 0;
  for (auto& waiter : waiters_) {
    if (waiter.epoch == 0) waiter.epoch = epoch.begin.epoch;
  }
  extents_.clear();
  announce(epoch.begin);
  log::debug("epoch={} sealed bytes={} direct={}", epoch.begin.epoch, epoch.sealed_bytes,
             epoch.begin.kind == EpochKind::Direct);
}

// Lanes overtake each other: a begin that is there before our hello would find no connection and be dropped. The first
// credit says that the copy has our hello, and without credit no data may follow anyway.
void Sender::Impl::announce(const EpochBegin& begin) {
  if (granted_ == 0) {
    begin_held_ = begin;
    return;
  }
  send(current_->traffic, MessageType::EpochBegin, begin);
}

bool Sender::Impl::mutated_since_seal() const {
  if (current_->mutated) return true;
  for (size_t i = 0; i < volumes_.size(); ++i) {
    if (volumes_[i].device->mutation_counter() != current_->mutations[i]) return true;
  }
  return false;
}

void Sender::Impl::maybe_end() {
  if (!current_ || begin_held_ || current_->end_sent || !current_->walk_done || !current_->heals.empty()) return;
  if (!jobs_.empty() || encoding_ || encoder_restart_) return;
  current_->end_sent = true;
  send(current_->traffic, MessageType::EpochEnd,
       EpochEnd{.epoch = current_->begin.epoch, .last_frame = frame_next_ - 1, .consistent = !current_->mutated});
}

void Sender::Impl::clear_walked(WalkPosition from, WalkPosition to) {
  for (size_t v = from.volume; v < volumes_.size() && v <= to.volume; ++v) {
    const uint64_t size = volumes_[v].device->size();
    const uint64_t begin = v == from.volume ? from.offset : 0;
    const uint64_t end = v == to.volume ? std::min(to.offset, size) : size;
    if (begin < end) volumes_[v].device->consumer().clear_sealed({begin, end - begin});
  }
}

void Sender::Impl::segment_acknowledged(const EpochSegmentAck& ack) {
  if (!current_ || current_->begin.epoch != ack.epoch || ack.frame < current_->acked_frame) return;
  if (ack.frame >= frame_next_) return;
  WalkPosition position = current_->acked;
  while (!current_->marks.empty() && current_->marks.front().frame <= ack.frame) {
    position = current_->marks.front().after;
    current_->acked_bytes = current_->marks.front().walked_bytes;
    current_->marks.pop_front();
  }
  // A staged epoch is forgotten as a whole, when it is applied; until then the mark only says where to go on.
  if (current_->begin.kind == EpochKind::Direct) {
    flush_stores(executor_, volumes_,
                 [this, alive = alive_.token(), epoch = ack.epoch, from = current_->acked, position](Errno error) {
                   if (!alive() || error != 0 || !current_ || current_->begin.epoch != epoch) return;
                   clear_walked(from, position);
                 });
  }
  current_->acked = position;
  current_->acked_frame = ack.frame;
}

void Sender::Impl::epoch_acknowledged(const EpochAck& ack) {
  if (!current_ || current_->begin.epoch != ack.epoch || current_->acknowledged) return;
  current_->acknowledged = true;
  peer_quality_ = ack.quality;
  if (peer_quality_ == CopyQuality::Consistent) consistent_wanted_ = false;
  kind_next_ = EpochKind::Staged;
  degraded_ = false;
  refusal_.clear();
  backoff_count_ = 0;
  frame_applied_ = frame_next_ - 1;
  if (final_ && !final_->acknowledged && current_->begin.final_attempt == final_->attempt) {
    final_->acknowledged = true;
    if (ack.quality == CopyQuality::Consistent) {
      answer_final(ack.epoch);
    } else {
      answer_final(fail(ErrorKind::Internal, "a volume was written while the last epoch was taken"));
    }
  }
  // The guest's writes of this epoch are durable at the copy, but perhaps not here yet: a block may be called clean
  // only when a power cut at this side cannot turn it back into what the copy no longer has.
  flush_stores(executor_, volumes_, [this, alive = alive_.token(), epoch = ack.epoch](Errno error) {
    if (!alive() || !current_ || current_->begin.epoch != epoch) return;
    if (error == 0) return record_acknowledged(epoch);
    refusal_ = fmt::format("flush the volumes: {}", errno_text(error));
    degraded_ = true;
    abandon_current(false);
    backoff_timer_.start(kBackoffMin, [this] { pump(); });
  });
}

void Sender::Impl::record_acknowledged(uint64_t acknowledged) {
  ReplicaRecord record = state_.record();
  record.epoch = acknowledged;
  record.final_attempt = {};
  state_.save(record, [this, alive = alive_.token(), epoch = acknowledged](const Status& status) {
    if (!alive() || !current_ || current_->begin.epoch != epoch) return;
    if (!status) {
      // Without the record a copy that falls back later would not be noticed, so the blocks stay dirty.
      refusal_ = status.error().text;
      degraded_ = true;
      return abandon_current(false);
    }
    finish_epoch();
  });
}

// The saved bitmap follows lazily, which costs a crash a few seconds of epochs sent again. The end of a full copy would
// cost it all of the copy: it is durable before anybody hears of it.
void Sender::Impl::finish_epoch() {
  for (const auto& volume : volumes_) volume.device->consumer().clear_all_sealed();
  if (!current_->begin.full) return epoch_finished();
  auto pending = std::make_shared<size_t>(volumes_.size());
  for (const auto& volume : volumes_) {
    volume.device->save_dirty([this, alive = alive_.token(), pending, name = volume.name](const Status& status) {
      if (!alive()) return;
      if (!status) log::warn("device={} the end of the copy is not saved yet: {}", name, status.error().text);
      if (--*pending == 0) epoch_finished();
    });
  }
}

void Sender::Impl::epoch_finished() {
  const uint64_t epoch = current_->begin.epoch;
  clean_at_ = std::max(clean_at_, current_->sealed_at);
  ++totals_.epochs_acknowledged;
  current_.reset();
  resolve_waiters(epoch);
  pump();
}

void Sender::Impl::resolve_waiters(uint64_t epoch) {
  std::vector<Done> ready;
  for (auto& waiter : waiters_) {
    if (waiter.epoch != 0 && waiter.epoch <= epoch) ready.push_back(std::move(waiter.done));
  }
  std::erase_if(waiters_, [epoch](const Waiter& waiter) { return waiter.epoch != 0 && waiter.epoch <= epoch; });
  for (auto& done : ready) {
    executor_.post([alive = alive_.token(), done = std::move(done)] {
      if (alive()) done({});
    });
  }
}

bool Sender::Impl::all_acknowledged() const {
  const CopyQuality needed = consistent_wanted_ ? CopyQuality::Consistent : CopyQuality::Fuzzy;
  return connected_ && !current_ && !preparing_ && !full_needed_ && peer_quality_ >= needed && open_bytes() == 0;
}

// Nothing is dirty: who waits need not wait for an epoch. Otherwise the next epoch, or its time, is what to wait for.
void Sender::Impl::check_waiters() {
  if (all_acknowledged()) {
    for (auto& waiter : waiters_) waiter.epoch = std::max<uint64_t>(waiter.epoch, 1);
    resolve_waiters(UINT64_MAX);
    return;
  }
  if (!connected_ || paused_ || current_ || seal_timer_.running() || open_bytes() == 0) return;
  const Nanoseconds due = sealed_last_ + options_.interval - executor_.now();
  seal_timer_.start(std::max<Nanoseconds>(due, kMillisecond), [this] { pump(); });
}

// The copy cannot take or apply an epoch.
void Sender::Impl::refused(const EpochAbandon& abandon) {
  if (!current_ || current_->begin.epoch != abandon.epoch || current_->acknowledged) return;
  if (abandon.retrying) {
    refusal_ = abandon.reason;
    degraded_ = true;
    return;
  }
  const bool full = current_->begin.full;
  abandon_current(false);
  full_needed_ = full_needed_ || full;
  if (abandon.kind == ErrorKind::Busy) return;  // it could not be resumed: at once anew
  if (abandon.kind == ErrorKind::Corrupt) {
    // It was committed and is only partly applied there: the copy says inconsistent from now on.
    peer_quality_ = CopyQuality::Inconsistent;
    kind_next_ = EpochKind::Direct;
  }
  refusal_ = abandon.reason;
  degraded_ = true;
  const Nanoseconds delay = std::min(kBackoffMax, kBackoffMin << std::min(backoff_count_, 5U));
  ++backoff_count_;
  backoff_timer_.start(delay, [this] { pump(); });
}

// What was sealed is dirty again and goes with the next epoch.
void Sender::Impl::abandon_current(bool tell) {
  const uint64_t epoch = current_->begin.epoch;
  if (tell && connected_) {
    send(current_->traffic, MessageType::EpochAbandon, EpochAbandon{.epoch = epoch, .reason = "superseded"});
  }
  const uint64_t open_before = open_bytes();
  for (const auto& volume : volumes_) volume.device->consumer().merge_sealed_back();
  tick_open_ += open_bytes() - open_before;
  for (auto& waiter : waiters_) {
    if (waiter.epoch == epoch) waiter.epoch = 0;
  }
  ++totals_.epochs_abandoned;
  begin_held_.reset();
  current_.reset();
  // A frame on the worker is sent all the same, because the compression history behind it depends on it.
  drop_jobs(encoding_ ? 1 : 0);
  index_drop_ = frame_applied_;
  extents_.clear();
  sync_wanted_ = true;
}

void Sender::Impl::answer_final(Result<uint64_t> result) {
  executor_.post([alive = alive_.token(), done = std::exchange(final_->done, nullptr), result = std::move(result)] {
    if (alive() && done) done(result);
  });
}

// A final epoch on top of an unfinished copy would stop the guest for the length of a full copy.
bool Sender::Impl::refuse_early_final() {
  if (!final_ || final_->acknowledged || !connected_) return false;
  if (peer_quality_ >= CopyQuality::Fuzzy && !full_needed_) return false;
  answer_final(fail(ErrorKind::Busy, "the first full copy is not finished"));
  final_.reset();
  return true;
}

void Sender::Impl::send_final_epoch(Final final) {
  final_ = std::move(final);
  if (refuse_early_final()) return;
  // With little of the present epoch sent, one epoch with everything is faster than two in a row.
  if (current_ && !current_->acknowledged && !current_->end_sent && current_->begin.kind == EpochKind::Staged &&
      current_->walked_bytes < current_->sealed_bytes / 2) {
    abandon_current(true);
  }
  pump_soon();
}

}  // namespace vmferry
