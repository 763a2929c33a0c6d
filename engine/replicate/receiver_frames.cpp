// SPDX-License-Identifier: Apache-2.0
//
// Receiver: from EpochBegin to the last frame written.
#include <cerrno>

#include "engine/base/assert.h"
#include "engine/replicate/receiver_impl.h"

namespace vmferry {

bool Receiver::Impl::goes_direct(const EpochBegin& begin) const {
  return begin.kind == EpochKind::Direct || options_.faults.apply_without_staging;
}

// Nothing is being written.
void Receiver::Impl::handle_begin(const EpochBegin& begin) {
  const ReplicaRecord& record = state_.record();
  if (begin.epoch == record.epoch && begin.lineage == record.lineage && record.quality >= CopyQuality::Fuzzy) {
    acknowledge(record.epoch, record.quality);  // the acknowledgement was lost
    return next();
  }
  if (const Status allowed = may_begin(begin); !allowed) {
    give_up(begin.epoch, allowed.error().kind, allowed.error().text);
    return next();
  }
  if (begin.resume) return resume_current(begin);
  if (current_) {
    ++totals_.epochs_discarded;
    current_.reset();
  }
  goes_direct(begin) ? begin_direct(begin) : begin_staged(begin);
}

Status Receiver::Impl::may_begin(const EpochBegin& begin) const {
  const ReplicaRecord& record = state_.record();
  if (begin.epoch <= record.epoch) {
    return fail(ErrorKind::Mismatch, "epoch {} was sent after epoch {} was applied", begin.epoch, record.epoch);
  }
  if (begin.resume) {
    const bool same = current_ && current_->begin.epoch == begin.epoch && current_->begin.session == begin.session &&
                      current_->begin.lineage == begin.lineage && current_->begin.kind == begin.kind;
    if (!same || begin.first_frame < current_->begin.first_frame || begin.first_frame > current_->contiguous + 1) {
      return fail(ErrorKind::Busy, "epoch {} cannot go on at frame {}: send it anew", begin.epoch, begin.first_frame);
    }
    return {};
  }
  if (!begin.full) {
    if (begin.lineage != record.lineage || diverged_ || record.quality < CopyQuality::Inconsistent) {
      return fail(ErrorKind::Mismatch, "this side is no copy that epoch {} fits: a full copy is needed", begin.epoch);
    }
  } else if ((foreign_data_ || diverged_) && !begin.overwrite) {
    return fail(ErrorKind::Denied, "{}",
                diverged_ ? "the peer's volumes hold writes that this side never had"
                          : "the peer's volumes hold data that is no earlier copy");
  }
  // From a usable copy to an unusable one only with the operator's consent (I6).
  if (begin.kind == EpochKind::Direct && record.quality >= CopyQuality::Fuzzy && !begin.overwrite) {
    return fail(ErrorKind::Denied, "a full copy in place would destroy the usable copy of epoch {}", record.epoch);
  }
  return {};
}

void Receiver::Impl::begin_direct(const EpochBegin& begin) {
  const ReplicaRecord& record = state_.record();
  const bool marked = record.quality == CopyQuality::Inconsistent && record.lineage == begin.lineage;
  if (marked || begin.kind == EpochKind::Staged) {
    start_current(begin);
    return next();
  }
  ReplicaRecord marked_record = record;
  marked_record.quality = CopyQuality::Inconsistent;
  marked_record.lineage = begin.lineage;
  marked_record.quality_epoch = begin.epoch;
  marked_record.final_attempt = {};
  for (const auto& volume : volumes_) volume.device->serve_zeroes(true);
  state_.save(marked_record, [this, alive = alive_.token(), begin](Status status) {
    if (!alive()) return;
    if (status) {
      foreign_data_ = diverged_ = replaced_ = false;
      start_current(begin);
    } else {
      give_up(begin.epoch, status.error().kind, status.error().text);
    }
    next();
  });
}

void Receiver::Impl::begin_staged(const EpochBegin& begin) {
  // Run tables and the records' headers need a little more than the data: 1/64 covers 4 KiB runs.
  const uint64_t needed = begin.dirty_bytes + begin.dirty_bytes / 64 + 64 * 1024;
  if (needed > staging_.capacity()) {
    give_up(begin.epoch, ErrorKind::LimitExceeded,
            fmt::format("epoch of up to {} bytes does not fit the staging area of {}", needed, staging_.capacity()));
    return next();
  }
  staging_.begin(begin, [this, begin](Errno error) {
    if (error == 0) {
      start_current(begin);
    } else {
      give_up(begin.epoch, ErrorKind::Io, fmt::format("staging area, in the state folder: {}", errno_text(error)));
    }
    next();
  });
}

void Receiver::Impl::start_current(const EpochBegin& begin) {
  if (goes_direct(begin)) {
    for (const auto& volume : volumes_) volume.device->retire_writers();
  }
  current_.emplace();
  current_->begin = begin;
  current_->frame_next = begin.first_frame;
  current_->contiguous = current_->segment_acked = begin.first_frame - 1;
}

void Receiver::Impl::resume_current(const EpochBegin& begin) {
  current_->frames.clear();
  current_->end.reset();
  current_->frame_next = begin.first_frame;
  current_->contiguous = begin.first_frame - 1;
  current_->segment_acked = std::min(current_->segment_acked, current_->contiguous);
  if (!goes_direct(begin)) staging_.truncate_after(current_->contiguous);
  next();
}

void Receiver::Impl::handle_data(Bytes message) {
  auto frame = std::make_shared<ArrivedFrame>();
  frame->message = std::move(message);
  frame->connection = connection_;
  frame->header = *decode_epoch_data(frame->message);
  if (current_ && current_->begin.epoch == frame->header.epoch) {
    frame->staged = !goes_direct(current_->begin);
    frame->session = current_->begin.session;
  }
  executor_.offload([decoder = decoder_, frame] { decoder->decode(*frame); },
                    [this, alive = alive_.token(), frame] {
                      if (alive()) frame_decoded(frame);
                    });
}

// A frame whose epoch was given up, before it came or while it was looked at. Its credit goes back all the same.
void Receiver::Impl::drop_frame(const ArrivedFrame& frame) {
  consume(frame.header.body_size, frame.connection);
  next();
}

void Receiver::Impl::frame_decoded(const std::shared_ptr<ArrivedFrame>& frame) {
  if (frame->connection != connection_) return next();
  if (!frame->status) return broke_protocol(frame->status.error());
  const EpochData& header = frame->header;
  if (!current_ || current_->begin.epoch != header.epoch) return drop_frame(*frame);
  if (header.frame != current_->frame_next) {
    return broke_protocol({ErrorKind::Corrupt, fmt::format("data frame {} of epoch {} instead of frame {}",
                                                           header.frame, header.epoch, current_->frame_next)});
  }
  if (const Status checked = check_runs(frame->body.runs, volumes_); !checked) return broke_protocol(checked.error());
  if (header.heals != 0) {
    const auto broken = std::find_if(current_->frames.begin(), current_->frames.end(),
                                     [&](const ReceivedFrame& state) { return state.frame == header.heals; });
    if (broken == current_->frames.end() || broken->resolved || !frame->references.empty()) {
      return broke_protocol({ErrorKind::Corrupt, fmt::format("data frame {} heals frame {}, which is not broken",
                                                             header.frame, header.heals)});
    }
  }
  ++current_->frame_next;
  current_->frames.push_back(
      {.frame = header.frame, .heals = header.heals, .body_size = header.body_size, .connection = frame->connection});
  current_->fuzzy = current_->fuzzy || header.fuzzy;
  if (frame->references.empty()) return store_frame(frame);
  // References are to what earlier frames and epochs wrote: all of that has to be in the stores.
  when_written([this, frame] { read_references(frame); });
}

void Receiver::Impl::read_references(const std::shared_ptr<ArrivedFrame>& frame) {
  uint64_t total = 0;
  for (const auto& run : frame->references) total += run.range.length;
  frame->referenced.resize(total);
  auto pending = std::make_shared<size_t>(frame->references.size());
  uint64_t at = 0;
  for (const auto& run : frame->references) {
    // A failed read leaves bytes that do not match: the source then sends the data.
    read_block(volumes_[run.source_volume].device->store(), run.source_offset, frame->referenced.data() + at,
               run.range.length, [this, alive = alive_.token(), frame, pending](Errno) {
                 if (--*pending > 0 || !alive()) return;
                 executor_.offload([frame] { EpochDecoder::resolve(*frame); },
                                   [this, alive, frame] {
                                     if (alive()) references_resolved(frame);
                                   });
               });
    at += run.range.length;
  }
}

void Receiver::Impl::references_resolved(const std::shared_ptr<ArrivedFrame>& frame) {
  if (!current_ || current_->begin.epoch != frame->header.epoch) return drop_frame(*frame);
  if (frame->unresolved) {
    ++totals_.reference_mismatches;
    for (auto& state : current_->frames) {
      if (state.frame == frame->header.frame) state.resolved = false;
    }
    EpochResend resend{.epoch = frame->header.epoch, .frame = frame->header.frame, .ranges = {}};
    for (const auto& run : frame->references) resend.ranges.push_back({run.volume, run.range});
    if (connected_) send(MessageType::EpochResend, resend);
  }
  store_frame(frame);
}

void Receiver::Impl::store_frame(const std::shared_ptr<ArrivedFrame>& frame) {
  const ReceivedFrame state = current_->frames.back();
  const uint64_t epoch = frame->header.epoch;
  VF_ASSERT(state.frame == frame->header.frame);
  if (goes_direct(current_->begin)) {
    ++writing_;
    write_runs(executor_, volumes_, frame->body, [this, alive = alive_.token(), state, epoch, frame](Errno error) {
      if (alive()) frame_written(state, epoch, error);
    });
    return next();
  }
  // Space for what the source may send next is reserved before it is granted, and never while a write may touch it.
  staging_.reserve(frame->image.size() + credit_window(), [this, frame, state, epoch](Errno error) {
    // Short of space for the whole window, this frame may still fit.
    if (error != 0) log::warn("epoch={} reserving staging space: {}", epoch, errno_text(error));
    if (!current_ || current_->begin.epoch != epoch) return drop_frame(*frame);
    ++writing_;
    const StagedFrame staged{.frame = frame->header.frame,
                             .heals = frame->header.heals,
                             .unresolved = frame->unresolved,
                             .fuzzy = frame->header.fuzzy};
    staging_.append(staged, std::move(frame->image),
                    [this, state, epoch](Errno append_error) { frame_written(state, epoch, append_error); });
    next();
  });
}

void Receiver::Impl::frame_written(const ReceivedFrame& written, uint64_t epoch, Errno error) {
  --writing_;
  consume(written.body_size, written.connection);
  if (current_ && current_->begin.epoch == epoch) {
    if (error != 0) {
      give_up(epoch, error == ENOSPC ? ErrorKind::LimitExceeded : ErrorKind::Io,
              fmt::format("write frame {} of epoch {} to {}: {}", written.frame, epoch,
                          goes_direct(current_->begin) ? "the volumes" : "the staging area, in the state folder",
                          errno_text(error)));
    } else {
      current_->segment_bytes += written.body_size;
      for (auto& state : current_->frames) {
        if (state.frame == written.frame) state.written = true;
        if (state.frame == written.heals) state.resolved = true;
      }
      advance();
      maybe_segment();
    }
  }
  if (writing_ == 0 && written_task_) return std::exchange(written_task_, nullptr)();
  pump();
}

void Receiver::Impl::advance() {
  auto& frames = current_->frames;
  while (!frames.empty() && frames.front().written && frames.front().resolved) {
    current_->contiguous = frames.front().frame;
    frames.pop_front();
  }
}

void Receiver::Impl::maybe_segment() {
  // The commit flushes what is left.
  if (!current_ || flushing_ || all_arrived() || current_->contiguous <= current_->segment_acked) return;
  if (current_->segment_bytes < options_.segment_bytes && segment_timer_.running()) return;
  if (!segment_timer_.running()) {
    // The first frame after a pause starts the clock; what is written until then is acknowledged together.
    segment_timer_.start(options_.segment_interval, [this] {
      if (current_) current_->segment_bytes = options_.segment_bytes;
      maybe_segment();
    });
    if (current_->segment_bytes < options_.segment_bytes) return;
  }
  flushing_ = true;
  current_->segment_bytes = 0;
  const EpochSegmentAck ack{current_->begin.epoch, current_->contiguous};
  auto flushed = [this, alive = alive_.token(), ack, connection = connection_](Errno error) {
    if (!alive()) return;
    flushing_ = false;
    if (current_ && current_->begin.epoch == ack.epoch) {
      if (error != 0) {
        give_up(ack.epoch, ErrorKind::Io, fmt::format("flush epoch {}: {}", ack.epoch, errno_text(error)));
      } else {
        current_->segment_acked = std::max(current_->segment_acked, ack.frame);
        if (connected_ && connection == connection_) send(MessageType::EpochSegmentAck, ack);
        maybe_segment();
      }
    }
    pump();
  };
  if (options_.faults.ack_before_flush) return executor_.post([flushed] { flushed(0); });
  if (goes_direct(current_->begin)) return flush_stores(executor_, volumes_, flushed);
  staging_.flush(flushed);
}

void Receiver::Impl::handle_end(const EpochEnd& end) {
  if (current_ && current_->begin.epoch == end.epoch) {
    if (end.last_frame + 1 != current_->frame_next) {
      return broke_protocol({ErrorKind::Corrupt, fmt::format("epoch {} ends with frame {}, frame {} was expected next",
                                                             end.epoch, end.last_frame, current_->frame_next)});
    }
    current_->end = end;
  }
  next();
}

void Receiver::Impl::handle_abandon(const EpochAbandon& abandon) {
  // A direct epoch cannot be undone: what came is there, and the copy stays inconsistent.
  if (current_ && current_->begin.epoch == abandon.epoch) {
    ++totals_.epochs_discarded;
    current_.reset();
  }
  next();
}

void Receiver::Impl::give_up(uint64_t epoch, ErrorKind kind, const std::string& reason) {
  log::warn("epoch={} given up: {}", epoch, reason);
  note_trouble(reason);
  if (current_ && current_->begin.epoch == epoch) {
    ++totals_.epochs_discarded;
    current_.reset();
  }
  if (connected_) send(MessageType::EpochAbandon, EpochAbandon{epoch, kind, false, reason});
}

// Told until an epoch is applied, not only between two attempts.
void Receiver::Impl::note_trouble(const std::string& reason) {
  if (reason_.empty()) reason_since_ = executor_.now();
  reason_ = reason;
}

}  // namespace vmferry
