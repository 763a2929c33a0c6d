// SPDX-License-Identifier: Apache-2.0
//
// Sender: walk over the sealed sets, read back, encode, send.
#include "engine/base/assert.h"
#include "engine/replicate/sender_impl.h"

namespace vmferry {

namespace {

// A dirty run this long is worth a question about holes; shorter ones are read, and zeroes are found there.
constexpr uint64_t kHoleQueryMin = 1U << 20;
constexpr uint64_t kWalkRunMax = 1U << 30;

}  // namespace

void Sender::Impl::drop_jobs(size_t keep) {
  while (jobs_.size() > keep) {
    jobs_.back()->dropped = true;
    jobs_.pop_back();
  }
}

// Keeps frames_ahead_max frames being read or waiting for the encoder. Healing frames go first.
void Sender::Impl::fill_pipeline() {
  while (current_ && !current_->acknowledged && jobs_.size() < options_.frames_ahead_max) {
    if (current_->heals.empty() && (current_->walk_done || querying_extents_)) return;
    auto job = std::make_shared<SendJob>();
    job->frame.epoch = current_->begin.epoch;
    job->frame.urgent = current_->traffic == TrafficClass::Urgent;
    if (!current_->heals.empty()) {
      build_heal_job(*job);
    } else if (!build_walk_job(*job)) {
      return;
    }
    job->frame.frame = frame_next_++;
    const bool direct = current_->begin.kind == EpochKind::Direct;
    job->frame.reference_frame_max = direct ? job->frame.frame - 1 : frame_applied_;
    if (job->frame.heals == 0) {
      current_->marks.push_back({job->frame.frame, current_->walked, current_->walked_bytes});
    }
    jobs_.push_back(job);
    reader_.read(job, [this, alive = alive_.token(), job] {
      if (alive()) job_read(job);
    });
  }
}

// A healing frame repeats one frame's references as data. Its blocks may be more than one frame holds only if the peer
// invents ranges: the decoder bounds their number, and the rest goes with the next frame.
void Sender::Impl::build_heal_job(SendJob& job) {
  FrameToHeal& heal = current_->heals.front();
  job.frame.heals = heal.frame;
  job.frame.literal_only = true;
  uint64_t bytes = 0;
  for (const auto& item : heal.ranges) {
    if (bytes + item.range.length > kFrameLiteralMax || job.frame.pieces.size() >= kPiecesPerFrameMax) break;
    bytes += item.range.length;
    job.frame.pieces.push_back({.volume = item.volume, .range = item.range, .hole = false, .data_offset = 0});
  }
  current_->heals.pop_front();
}

bool Sender::Impl::build_walk_job(SendJob& job) {
  WalkPosition& at = current_->walked;
  uint64_t data_bytes = 0;
  while (at.volume < volumes_.size() && job.frame.pieces.size() < kPiecesPerFrameMax) {
    TrackedDevice& device = *volumes_[at.volume].device;
    const auto volume = static_cast<uint16_t>(at.volume);
    const uint64_t block = device.block_size();
    // Behind a short last block next_run() would find that block again.
    const auto run = at.offset < device.size() ? device.consumer().next_run(at.offset, kWalkRunMax) : std::nullopt;
    if (!run) {
      at = {at.volume + 1, 0};
      continue;
    }
    const uint64_t offset = run->offset;
    uint64_t end = run->end();
    auto extent = extents_.find(volume, offset);
    if (!extent && run->length >= kHoleQueryMin) {
      if (!job.frame.pieces.empty()) break;
      querying_extents_ = true;
      extents_.query(volume, device.store(), *run, alive_.token(), [this] {
        querying_extents_ = false;
        pump();
      });
      return false;
    }
    if (extent) {
      const bool hole = extent->hole || extent->zero;
      // Whole blocks only, or the walk would come back to the middle of one.
      const uint64_t extent_end = hole ? round_down(extent->range.end(), block) : round_up(extent->range.end(), block);
      const uint64_t hole_end = extent->range.end() >= end ? end : extent_end;
      if (hole && hole_end > offset) {
        job.frame.pieces.push_back({.volume = volume, .range = {offset, hole_end - offset}, .hole = true});
        current_->walked_bytes += hole_end - offset;
        at.offset = hole_end;
        continue;
      }
      end = std::min(end, hole ? offset + block : extent_end);
    }
    uint64_t length = std::min(end - offset, kFrameLiteralMax - data_bytes);
    if (offset + length < run->end()) length = round_down(length, block);
    if (length == 0) break;  // the frame is full
    job.frame.pieces.push_back({.volume = volume, .range = {offset, length}, .hole = false, .data_offset = 0});
    data_bytes += length;
    current_->walked_bytes += length;
    at.offset = offset + length;
    if (data_bytes == kFrameLiteralMax) break;
  }
  if (at.volume == volumes_.size()) current_->walk_done = true;
  return !job.frame.pieces.empty();
}

void Sender::Impl::job_read(const std::shared_ptr<SendJob>& job) {
  if (job->dropped || !current_ || current_->begin.epoch != job->frame.epoch) return;
  if (job->error != 0) {
    refusal_ = fmt::format("reading blocks of epoch {} back: {}", job->frame.epoch, errno_text(job->error));
    log::error("{}", refusal_);
    degraded_ = true;
    abandon_current(true);
    return backoff_timer_.start(5 * kSecond, [this] { pump(); });
  }
  current_->mutated = mutated_since_seal();
  job->frame.fuzzy = current_->mutated;
  // Read inline (nothing but holes): fill_pipeline() is still at work.
  pump_soon();
}

// One frame at a time on the worker, and only when it can be sent as soon as it is encoded: an encoded frame is part
// of the compression history and cannot be withdrawn.
void Sender::Impl::pump_encoder() {
  if (encoding_) return;
  if (encoder_restart_) {
    encoder_->restart(*encoder_restart_);
    encoder_restart_.reset();
  }
  if (index_drop_) {
    encoder_->drop_after(*index_drop_);
    index_drop_.reset();
  }
  if (std::exchange(index_clear_, false)) encoder_->forget_all();
  for (; mismatches_new_ > 0; --mismatches_new_) encoder_->note_mismatch();
  if (jobs_.empty() || !jobs_.front()->read || !current_) return;
  const std::shared_ptr<SendJob> job = jobs_.front();
  const TrafficClass traffic = job->frame.urgent ? TrafficClass::Urgent : TrafficClass::Bulk;
  if (channel_.queued_bytes(traffic) >= channel_.queue_limit(traffic)) return;
  if (job->frame.body_size_bound() > granted_ - std::min(granted_, sent_)) return;
  encoding_ = true;
  executor_.offload([encoder = encoder_, job] { encoder->encode(job->frame); },
                    [this, alive = alive_.token(), job] {
                      if (alive()) job_encoded(job);
                    });
}

bool Sender::Impl::may_learn() const {
  const bool usable = connected_ && !paused_ && !degraded_ && !full_needed_ && peer_quality_ >= CopyQuality::Fuzzy;
  const bool at_rest = !current_ && !preparing_ && !final_ && !verify_ && jobs_.empty() && !encoding_;
  return usable && at_rest && !index_clear_ && !wants_epoch();
}

void Sender::Impl::job_encoded(const std::shared_ptr<SendJob>& job) {
  encoding_ = false;
  if (!job->dropped) {
    VF_ASSERT(!jobs_.empty() && jobs_.front() == job);
    jobs_.pop_front();
    FrameJob& frame = job->frame;
    sent_ += frame.body_size;
    totals_.raw_bytes += frame.zero_bytes + frame.literal_bytes + frame.reference_bytes;
    totals_.literal_bytes += frame.literal_bytes;
    totals_.reference_bytes += frame.reference_bytes;
    wire_bytes_ += frame.payload.size();
    const double moved = static_cast<double>(frame.literal_bytes + frame.reference_bytes + frame.zero_bytes);
    // Huge holes say nothing about what the next round of writes will cost.
    if (moved < 4.0 * kFrameLiteralMax) {
      const double weight = std::min(0.2, moved / (16.0 * kFrameLiteralMax));
      reduction_ += weight * (static_cast<double>(frame.payload.size()) / moved - reduction_);
    }
    const TrafficClass traffic = frame.urgent ? TrafficClass::Urgent : TrafficClass::Bulk;
    channel_.send(traffic, MessageType::EpochData, std::move(frame.payload));
  }
  pump();
}

}  // namespace vmferry
