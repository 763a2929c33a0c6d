// SPDX-License-Identifier: Apache-2.0
//
// Receiver: from the last frame written to the acknowledgement, and verification.
#include "engine/base/assert.h"
#include "engine/replicate/receiver_impl.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kRetryDelay = 5 * kSecond;

// Runs `one(index, done)` for every volume in turn; stops at the first error.
template <typename One>
void for_each_volume(size_t count, One one, Receiver::Done done, size_t index = 0) {
  if (index == count) return done({});
  one(index, [count, one, done = std::move(done), index](Status status) {
    if (!status) return done(status);
    for_each_volume(count, one, done, index + 1);
  });
}

}  // namespace

bool Receiver::Impl::all_arrived() const {
  return current_ && current_->end && current_->frames.empty();
}

bool Receiver::Impl::commit_ready() const {
  // Not while a segment is flushed: its failure is told to nobody else, and gives the epoch up.
  return all_arrived() && writing_ == 0 && !flushing_;
}

void Receiver::Impl::commit() {
  const bool one_moment = current_->end->consistent && !current_->fuzzy;
  const bool consistent = one_moment || options_.faults.fuzzy_called_consistent;
  const uint64_t epoch = current_->begin.epoch;
  const Done finished = [this, epoch](Status status) {
    if (!status) {
      release_guest_reads();
      give_up(epoch, status.error().kind, status.error().text);
    }
    next();
  };
  if (options_.faults.ack_before_flush) acknowledge(epoch, consistent ? CopyQuality::Consistent : CopyQuality::Fuzzy);
  if (goes_direct(current_->begin)) return finish_epoch(consistent, finished);
  staging_.commit(consistent, [this, consistent, epoch, finished](Errno error) {
    if (error != 0) {
      return finished(fail(ErrorKind::Io, "commit epoch {}: {}", epoch, errno_text(error)));
    }
    apply_staged(consistent, finished);
  });
}

void Receiver::Impl::hold_guest_reads(std::function<void()> done) {
  auto pending = std::make_shared<size_t>(volumes_.size());
  for (const auto& volume : volumes_) volume.device->hold_reads(true);
  for (const auto& volume : volumes_) {
    volume.device->quiesce_reads([alive = alive_.token(), pending, done] {
      if (--*pending == 0 && alive()) done();
    });
  }
}

void Receiver::Impl::release_guest_reads() {
  for (const auto& volume : volumes_) volume.device->hold_reads(false);
}

// From here on the epoch is committed: it is applied sooner or later, and nobody reads a mix meanwhile.
void Receiver::Impl::apply_staged(bool consistent, Done done) {
  applying_ = true;
  for (const auto& volume : volumes_) volume.device->retire_writers();
  hold_guest_reads([this, consistent, done = std::move(done)] { apply_pass(consistent, done); });
}

void Receiver::Impl::apply_pass(bool consistent, Done done) {
  EpochApply::run(executor_, staging_, volumes_, alive_.token(), [this, consistent, done](const Status& status) {
    if (!status) return apply_failed(status.error(), consistent, done);
    // Until it is recorded the record names an epoch whose image the volumes are no longer.
    finish_epoch(consistent, [this, consistent, done](const Status& recorded) {
      if (!recorded) return apply_failed(recorded.error(), consistent, done);
      applying_ = half_applied_ = false;
      done({});
    });
  });
}

// A committed epoch that is in the volumes in part, or in whole and not recorded.
void Receiver::Impl::apply_failed(const Error& error, bool consistent, const Done& done) {
  half_applied_ = true;
  if (error.kind != ErrorKind::Io) {
    // The rest is lost: the source still has all of it, as dirty blocks.
    return mark_inconsistent([this, error, done](const Status& marked) {
      applying_ = false;
      if (marked) half_applied_ = false;
      done(tl::unexpected<Error>(error));
    });
  }
  note_trouble(error.text);
  log::error("epoch={} cannot be applied yet: {}", current_->begin.epoch, reason_);
  if (!opened_ || closing_) {
    applying_ = false;
    return done(tl::unexpected<Error>(error));
  }
  if (connected_) {
    send(MessageType::EpochAbandon, EpochAbandon{current_->begin.epoch, ErrorKind::Io, true, reason_});
  }
  retry_timer_.start(kRetryDelay, [this, consistent, done] { apply_pass(consistent, done); });
}

void Receiver::Impl::mark_inconsistent(Done done) {
  ReplicaRecord record = state_.record();
  record.quality = CopyQuality::Inconsistent;
  record.final_attempt = {};
  for (const auto& volume : volumes_) volume.device->serve_zeroes(true);
  state_.save(record, [this, alive = alive_.token(), done = std::move(done)](const Status& status) {
    if (!alive()) return;
    if (!status && opened_ && !closing_) {
      // Whatever is done before, a crash would leave a mix that calls itself whole.
      return retry_timer_.start(kRetryDelay, [this, done] { mark_inconsistent(done); });
    }
    release_guest_reads();
    done(status);
  });
}

// The data of current_ is in the stores; a staged epoch's is flushed.
void Receiver::Impl::finish_epoch(bool consistent, Done done) {
  const auto flushed = [this, alive = alive_.token(), consistent, done](Errno error) {
    if (!alive()) return;
    if (error != 0) {
      return done(fail(ErrorKind::Io, "flush the volumes: {}", errno_text(error)));
    }
    clean_tracking(0, [this, consistent, done](Status status) {
      if (!status) return done(status);
      save_applied(consistent, done);
    });
  };
  if (options_.faults.ack_before_flush) return executor_.post([flushed] { flushed(0); });
  if (!goes_direct(current_->begin)) return flushed(0);  // EpochApply has flushed
  flush_stores(executor_, volumes_, flushed);
}

// A copy tracks from its first whole epoch on, with nothing dirty: when it becomes the primary, its very first write
// is known to be missing at the old one, without a step in the middle of the handover.
void Receiver::Impl::clean_tracking(size_t index, Done done) {
  const auto alive = alive_.token();
  for_each_volume(
      volumes_.size(),
      [this, alive](size_t i, Done one) {
        if (!alive()) return;
        TrackedDevice& device = *volumes_[i].device;
        if (device.tracking() && device.dirty_bytes() == 0) return one({});
        device.activate_tracking(Baseline::Clean, one);
      },
      [alive, done = std::move(done)](Status status) {
        if (alive()) done(status);
      },
      index);
}

void Receiver::Impl::save_applied(bool consistent, Done done) {
  const EpochBegin& begin = current_->begin;
  const ReplicaRecord& before = state_.record();
  ReplicaRecord record;
  record.quality = consistent ? CopyQuality::Consistent : CopyQuality::Fuzzy;
  record.lineage = begin.lineage;
  record.epoch = begin.epoch;
  const bool still_fuzzy = !consistent && before.quality == CopyQuality::Fuzzy && before.lineage == begin.lineage;
  record.quality_epoch = still_fuzzy ? before.quality_epoch : begin.epoch;
  record.final_attempt = begin.final_attempt;
  record.session = begin.session;
  state_.save(record, [this, alive = alive_.token(), record, done = std::move(done)](Status status) {
    if (!alive()) return;
    if (!status) return done(status);
    foreign_data_ = diverged_ = replaced_ = false;
    reason_.clear();
    for (const auto& volume : volumes_) volume.device->serve_zeroes(false);
    release_guest_reads();
    ++totals_.epochs_applied;
    current_.reset();
    if (events_.epoch_applied) events_.epoch_applied(record.epoch, record.quality);
    if (events_.final_epoch_applied && !record.final_attempt.is_none()) {
      events_.final_epoch_applied(record.final_attempt, record.epoch);
    }
    if (!options_.faults.ack_before_flush) acknowledge(record.epoch, record.quality);
    staging_.forget(options_.staging_keep_bytes, [done](Errno) { done({}); });
  });
}

void Receiver::Impl::acknowledge(uint64_t epoch, CopyQuality quality) {
  if (connected_) send(MessageType::EpochAck, EpochAck{epoch, quality});
}

namespace {

// Digests of the pieces of one range, read one after the other.
struct PieceHashes : std::enable_shared_from_this<PieceHashes> {
  Executor& executor;
  BlockDevice& store;
  VerifyRequest request;
  Alive::Token alive;
  std::function<void(VerifyReply)> done;
  VerifyReply reply;
  uint64_t at = 0;
  Bytes buffer;

  PieceHashes(Executor& e, BlockDevice& s, const VerifyRequest& r, Alive::Token a, std::function<void(VerifyReply)> d)
      : executor(e), store(s), request(r), alive(std::move(a)), done(std::move(d)), at(r.range.offset) {}

  void step() {
    if (at >= request.range.end()) return done(std::move(reply));
    buffer.resize(std::min<uint64_t>(request.piece_size, request.range.end() - at));
    read_block(store, at, buffer.data(), buffer.size(), [self = shared_from_this()](Errno error) {
      if (!self->alive()) return;
      if (error != 0) {
        self->reply.digests.clear();
        self->reply.error_kind = ErrorKind::Io;
        self->reply.error = fmt::format("read at {}: {}", self->at, errno_text(error));
        return self->done(std::move(self->reply));
      }
      self->executor.offload([self] { self->reply.digests.push_back(sha256(self->buffer)); },
                             [self] {
                               if (!self->alive()) return;
                               self->at += self->buffer.size();
                               self->step();
                             });
    });
  }
};

}  // namespace

// In the queue with the epochs, so the digests are of one whole epoch.
void Receiver::Impl::handle_verify(const VerifyRequest& request) {
  VerifyReply reply{.id = request.id, .epoch = state_.record().epoch, .error = {}, .digests = {}};
  const bool fits = request.volume < volumes_.size() &&
                    fits_in(request.range.offset, request.range.length, volumes_[request.volume].device->size());
  if (!fits || state_.record().quality < CopyQuality::Fuzzy) {
    reply.error_kind = fits ? ErrorKind::Busy : ErrorKind::InvalidArgument;
    reply.error = fits ? "the copy holds no whole epoch yet" : "the range is outside the volume";
    send(MessageType::VerifyReply, reply);
    return next();
  }
  when_written([this, request, reply, connection = connection_] {
    auto hashes = std::make_shared<PieceHashes>(executor_, volumes_[request.volume].device->store(), request,
                                                alive_.token(), [this, connection](VerifyReply result) {
                                                  if (connected_ && connection == connection_) {
                                                    send(MessageType::VerifyReply, result);
                                                  }
                                                  next();
                                                });
    hashes->reply = reply;
    hashes->step();
  });
}

}  // namespace vmferry
