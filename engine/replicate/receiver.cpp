// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/receiver.h"

#include "engine/base/assert.h"
#include "engine/replicate/epoch_foreign.h"
#include "engine/replicate/receiver_impl.h"
#include "engine/runtime/steps.h"

namespace vmferry {

namespace {

constexpr size_t kFramesWritingMax = 8;
// Credit counts bodies; compressed frames are hardly larger, so honest messages fit the window and a little more.
constexpr uint64_t kQueuedBytesSpare = 8U << 20;

}  // namespace

Receiver::Impl::Impl(Executor& executor, GroupChannel& channel, ReplicaState& state, BlockDevice& staging,
                     std::vector<ReplicaVolume> volumes, ReceiverOptions options, ReceiverEvents events)
    : executor_(executor),
      channel_(channel),
      state_(state),
      staging_(executor, staging, ReplicaState::kReservedSize),
      volumes_(std::move(volumes)),
      options_(std::move(options)),
      events_(std::move(events)),
      decoder_(std::make_shared<EpochDecoder>(options_.codec)),
      segment_timer_(executor),
      retry_timer_(executor) {}

void Receiver::Impl::open(Done done) {
  VF_ASSERT(!opened_ && !busy_);
  busy_ = true;
  const Done finished = [this, done = std::move(done)](const Status& status) {
    // Not open, but it can be closed.
    if (!status) next();
    done(status);
  };
  staging_.scan(state_.record().epoch, [this, finished](Result<std::optional<StagingArea::Found>> found) {
    if (!found) return finished(tl::unexpected<Error>(found.error()));
    open_staged(*found, finished);
  });
}

void Receiver::Impl::open_staged(const std::optional<StagingArea::Found>& found, Done done) {
  const ReplicaRecord& record = state_.record();
  const bool ours = found && (found->begin.full || found->begin.lineage == record.lineage);
  if (!ours) {
    return staging_.forget(options_.staging_keep_bytes, [this, done](Errno) { open_volumes(0, done); });
  }
  start_current(found->begin);
  current_->contiguous = current_->segment_acked = found->contiguous;
  current_->frame_next = found->contiguous + 1;
  current_->fuzzy = found->fuzzy;
  if (!found->committed) {
    log::info("epoch={} frames={} staged in part before the restart", found->begin.epoch, staging_.records().size());
    return open_volumes(0, std::move(done));
  }
  log::info("epoch={} was committed before the restart: applying it", found->begin.epoch);
  apply_staged(found->consistent && !found->fuzzy, [this, done = std::move(done)](Status status) {
    if (!status) return done(status);
    open_volumes(0, done);
  });
}

void Receiver::Impl::open_volumes(size_t index, Done done) {
  const CopyQuality quality = state_.record().quality;
  if (index == 0) {
    foreign_data_ = false;
    replaced_ = false;
    diverged_ = quality == CopyQuality::Source;
  }
  if (index == volumes_.size()) return finish_open(std::move(done));
  TrackedDevice& device = *volumes_[index].device;
  if (quality == CopyQuality::None || quality == CopyQuality::Inconsistent) device.serve_zeroes(true);
  // A copy is written by nobody but us: dirty blocks mean that its file is not what we left.
  if (quality >= CopyQuality::Fuzzy && device.tracking() && device.dirty_bytes() > 0) diverged_ = true;
  // All of it dirty is what tracking says of a file that is another one, or was changed, since the last stop; it stays
  // so over further restarts. Writes of our own as a primary in between leave an image of one moment.
  const bool copy = quality == CopyQuality::Fuzzy || quality == CopyQuality::Consistent;
  if (copy && device.tracking() && device.dirty_bytes() >= device.size()) {
    replaced_ = true;
    note_trouble(fmt::format("the file of volume '{}' is not the one that the copy was made in; it needs a full copy",
                             volumes_[index].name));
    log::warn("{}", reason_);
  }
  if (quality != CopyQuality::None) return open_volumes(index + 1, std::move(done));
  find_data(device.store(), alive_.token(), [this, index, done = std::move(done)](Result<bool> data) {
    if (!data) return done(fail_with(data.error(), volumes_[index].name));
    foreign_data_ = foreign_data_ || *data;
    open_volumes(index + 1, done);
  });
}

void Receiver::Impl::finish_open(Done done) {
  // What the first frames need is there before the first credit is given.
  staging_.reserve(std::min(options_.staging_keep_bytes, options_.credit_window_min), [this, done](Errno error) {
    if (error != 0) note_trouble(fmt::format("staging area, in the state folder: {}", errno_text(error)));
    opened_ = true;
    done({});
    next();
  });
}

void Receiver::Impl::close(Done done) {
  closing_ = true;
  drop_queue();
  close_done_ = std::move(done);
  executor_.post([this, alive = alive_.token()] {
    if (alive()) pump();
  });
}

void Receiver::Impl::fill_hello(GroupHello& hello) const {
  hello.volumes.clear();
  for (const auto& volume : volumes_) hello.volumes.push_back({volume.name, volume.device->size()});
  const ReplicaRecord& record = state_.record();
  hello.quality = record.quality;
  hello.lineage = record.lineage;
  hello.epoch = record.epoch;
  hello.quality_epoch = record.quality_epoch;
  hello.foreign_data = foreign_data_;
  hello.diverged = diverged_;
  hello.session = current_ ? current_->begin.session : record.session;
  hello.staged_epoch = current_ ? current_->begin.epoch : 0;
  hello.staged_frame = current_ ? current_->contiguous : 0;
}

Status Receiver::Impl::on_peer_hello(const GroupHello& hello) {
  if (const Status same = check_volumes(volumes_, hello.volumes); !same) return same;
  on_disconnected();
  connected_ = true;
  granted_ = options_.credit_window_min;
  send(MessageType::Credit, Credit{granted_});
  return {};
}

void Receiver::Impl::on_disconnected() {
  connected_ = false;
  source_paused_since_.reset();
  broken_ = false;
  ++connection_;
  drop_queue();
  received_ = consumed_ = granted_ = 0;
  decoder_ = std::make_shared<EpochDecoder>(options_.codec);
}

Status Receiver::Impl::on_message(MessageType type, ByteSpan payload) {
  if (!connected_ || broken_ || closing_) return {};
  Status status{};
  const auto check = [&status](const auto& decoded) {
    if (!decoded) status = tl::unexpected<Error>(decoded.error());
  };
  switch (type) {
    case MessageType::SourceState: {
      // Not behind the frames that wait: it says what comes after them.
      const auto state = decode_source_state(payload);
      check(state);
      if (status) note_source_state(*state);
      if (status) return {};
      break;
    }
    case MessageType::EpochBegin:
      check(decode_epoch_begin(payload));
      break;
    case MessageType::EpochEnd:
      check(decode_epoch_end(payload));
      break;
    case MessageType::EpochAbandon:
      check(decode_epoch_abandon(payload));
      break;
    case MessageType::VerifyRequest:
      check(decode_verify_request(payload));
      break;
    case MessageType::EpochData: {
      const auto data = decode_epoch_data(payload);
      check(data);
      if (!status) break;
      if (data->body_size > granted_ - received_) {
        status = fail(ErrorKind::LimitExceeded, "peer sent {} bytes more than the {} granted",
                      data->body_size - (granted_ - received_), granted_);
        break;
      }
      received_ += data->body_size;
      totals_.received_wire_bytes += payload.size();
      break;
    }
    default:
      status = fail(ErrorKind::Mismatch, "message type {} is not for a copy", static_cast<uint16_t>(type));
  }
  if (status && queued_bytes_ + payload.size() > options_.credit_window_max + kQueuedBytesSpare) {
    status = fail(ErrorKind::LimitExceeded, "peer has {} bytes of messages waiting", queued_bytes_);
  }
  if (!status) {
    broken_ = true;
    return status;
  }
  queued_bytes_ += payload.size();
  queue_.emplace_back(type, Bytes(payload.begin(), payload.end()));
  pump();
  return {};
}

void Receiver::Impl::note_source_state(const SourceState& state) {
  source_paused_since_.reset();
  const auto now = static_cast<uint64_t>(executor_.now());
  if (state.paused) source_paused_since_ = static_cast<Nanoseconds>(now - std::min(now, state.paused_ns));
}

void Receiver::Impl::pump() {
  if (busy_) return;
  if (closing_ && writing_ == 0) {
    if (!close_done_) return;
    const Status whole = half_applied_ ? fail(ErrorKind::Io, "an epoch is applied in part: {}", reason_) : Status{};
    return std::exchange(close_done_, nullptr)(whole);
  }
  if (!opened_ || closing_) return;
  if (commit_ready()) {
    busy_ = true;
    return commit();
  }
  if (queue_.empty()) return;
  if (queue_.front().first == MessageType::EpochData && writing_ >= kFramesWritingMax) return;
  auto [type, payload] = std::move(queue_.front());
  queue_.pop_front();
  queued_bytes_ -= payload.size();
  busy_ = true;
  switch (type) {
    case MessageType::EpochBegin:
      return when_written([this, begin = *decode_epoch_begin(payload)] { handle_begin(begin); });
    case MessageType::EpochData:
      return handle_data(std::move(payload));
    case MessageType::EpochEnd:
      return handle_end(*decode_epoch_end(payload));
    case MessageType::EpochAbandon:
      return handle_abandon(*decode_epoch_abandon(payload));
    default:
      return handle_verify(*decode_verify_request(payload));
  }
}

void Receiver::Impl::drop_queue() {
  queue_.clear();
  queued_bytes_ = 0;
}

void Receiver::Impl::next() {
  busy_ = false;
  executor_.post([this, alive = alive_.token()] {
    if (alive()) pump();
  });
}

void Receiver::Impl::when_written(Task task) {
  if (writing_ == 0) return task();
  VF_ASSERT(!written_task_);
  written_task_ = std::move(task);
}

// Found out after on_message() returned: the owner of the connection is told by event.
void Receiver::Impl::broke_protocol(const Error& error) {
  broken_ = true;
  drop_queue();
  if (events_.protocol_error) events_.protocol_error(error);
  next();
}

uint64_t Receiver::Impl::credit_window() const {
  const uint64_t bandwidth_delay =
      static_cast<uint64_t>(static_cast<double>(rate_) * static_cast<double>(channel_.figures().rtt) / 1e9);
  return std::clamp(2 * bandwidth_delay, options_.credit_window_min,
                    std::max(options_.credit_window_min, options_.credit_window_max));
}

void Receiver::Impl::consume(uint64_t body_size, uint32_t connection) {
  totals_.received_body_bytes += body_size;
  rate_bytes_ += body_size;
  const Nanoseconds elapsed = executor_.now() - rate_since_;
  if (elapsed >= kSecond) {
    rate_ = static_cast<uint64_t>(static_cast<double>(rate_bytes_) * 1e9 / static_cast<double>(elapsed));
    rate_bytes_ = 0;
    rate_since_ = executor_.now();
  }
  if (connection != connection_ || !connected_) return;
  consumed_ += body_size;
  const uint64_t window = credit_window();
  if (consumed_ + window < granted_ + window / 4) return;
  granted_ = consumed_ + window;
  send(MessageType::Credit, Credit{granted_});
}

Receiver::Receiver(Executor& executor, GroupChannel& channel, ReplicaState& state, BlockDevice& staging,
                   std::vector<ReplicaVolume> volumes, ReceiverOptions options, ReceiverEvents events)
    : impl_(std::make_unique<Impl>(executor, channel, state, staging, std::move(volumes), std::move(options),
                                   std::move(events))) {}
Receiver::~Receiver() = default;

void Receiver::open(Done done) {
  impl_->open(std::move(done));
}
void Receiver::close(Done done) {
  impl_->close(std::move(done));
}
void Receiver::fill_hello(GroupHello& hello) const {
  impl_->fill_hello(hello);
}
Status Receiver::on_peer_hello(const GroupHello& hello) {
  return impl_->on_peer_hello(hello);
}
void Receiver::on_disconnected() {
  impl_->on_disconnected();
}
Status Receiver::on_message(MessageType type, ByteSpan payload) {
  return impl_->on_message(type, payload);
}

void Receiver::adopt_as_copy(uint64_t epoch, Done done) {
  ReplicaRecord record = impl_->state_.record();
  record.quality = CopyQuality::Consistent;
  record.epoch = record.quality_epoch = epoch;
  // Durably clean, also where nothing is dirty: the activity log still names the last regions that were written.
  const auto clean = [](TrackedDevice& device, Done next) {
    device.activate_tracking(Baseline::Clean, std::move(next));
  };
  std::vector<TrackedDevice*> devices;
  for (const auto& volume : impl_->volumes_) devices.push_back(volume.device);
  run_each(devices, clean, [this, alive = impl_->alive_.token(), record, done = std::move(done)](Status status) {
    if (!alive()) return;
    if (!status) return done(status);
    impl_->state_.save(record, done);
  });
}

Id128 Receiver::final_attempt() const {
  return impl_->state_.record().final_attempt;
}

ReceiverStatus Receiver::status() const {
  const ReplicaRecord& record = impl_->state_.record();
  ReceiverStatus status = impl_->totals_;
  status.quality = impl_->replaced_ ? CopyQuality::Inconsistent : record.quality;
  status.epoch = record.epoch;
  status.quality_epoch = record.quality_epoch;
  status.staged_epoch = impl_->current_ ? impl_->current_->begin.epoch : 0;
  status.staged_bytes = impl_->staging_.used_bytes();
  status.applying = impl_->applying_;
  status.half_applied = impl_->half_applied_;
  status.foreign_data = impl_->foreign_data_;
  status.reason = impl_->reason_;
  status.reason_since = impl_->reason_since_;
  status.source_paused = impl_->source_paused_since_.has_value();
  status.source_paused_since = impl_->source_paused_since_.value_or(0);
  return status;
}

}  // namespace vmferry
