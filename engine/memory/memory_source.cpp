// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/memory_source.h"

#include <algorithm>

#include "engine/base/assert.h"

namespace vmferry {

// Used by one worker job at a time; the executor's thread touches it only between jobs.
struct MemorySource::Coding {
  Sha256Stream hash;
  uint64_t hashed = 0;  // raw bytes in `hash`: a chunk that is sent again is not hashed again
  std::unique_ptr<delta::StreamCompressor> compressor;
  uint32_t generation = 0;
};

MemorySource::MemorySource(Executor& executor, GroupChannel& channel, std::unique_ptr<ByteStream> from_qemu,
                           const MemorySourceOptions& options, Events events)
    : executor_(executor),
      channel_(channel),
      from_qemu_(std::move(from_qemu)),
      options_(options),
      events_(std::move(events)),
      window_(options.downtime_limit),
      coding_(std::make_shared<Coding>()) {
  VF_ASSERT(!options_.attempt.is_none() && options_.window_log <= kMemoryWindowLogMax);
  held_ = options_.held;
  from_qemu_->pause_reading(held_);
  from_qemu_->set_handler(this);
  if (channel_.connected()) channel_connected();
}

MemorySource::~MemorySource() = default;

void MemorySource::hold(bool held) {
  if (held_ == held) return;
  held_ = held;
  if (!held) window_.restart(delivered_, executor_.now());
  apply_brake();
}

MemorySourceFigures MemorySource::figures() const {
  return {.raw_bytes = accepted_,
          .wire_bytes = wire_bytes_,
          .delivered_bytes = delivered_,
          .queued_bytes = accepted_ - delivered_,
          .rate = window_.rate(),
          .limit_bytes = window_.limit(),
          .stream = parser_.figures()};
}

void MemorySource::stream_readable(ByteSpan bytes) {
  parser_.feed(bytes);
  accepted_ += bytes.size();
  filling_.insert(filling_.end(), bytes.begin(), bytes.end());
  apply_brake();
  start_job();
}

void MemorySource::apply_brake() {
  if (!from_qemu_ || qemu_ended_ || failed_) return;
  from_qemu_->pause_reading(held_ || accepted_ - delivered_ >= window_.limit());
}

void MemorySource::stream_closed(Errno error) {
  if (error != 0) {
    return fail_with_error(
        {ErrorKind::Unavailable, fmt::format("the source QEMU's migration channel failed: {}", errno_text(error))});
  }
  qemu_ended_ = true;
  start_job();
}

void MemorySource::channel_connected() {
  ++generation_;
  resumed_ = false;
  end_sent_ = false;
  ask();
}

void MemorySource::channel_disconnected() {
  ++generation_;  // what a job is coding now belongs to the old connection
  resumed_ = false;
  end_sent_ = false;
}

// An empty MemoryData: the sink answers with its position. Without a sink nothing comes; it speaks when it begins.
void MemorySource::ask() {
  if (failed_) return;
  channel_.send(TrafficClass::Memory, MessageType::MemoryData,
                encode(MemoryData{options_.attempt, generation_, received_, {}}));
}

void MemorySource::handle_ack(ByteSpan payload) {
  if (failed_) return;
  const auto ack = decode_memory_ack(payload);
  if (!ack) return fail_with_error(ack.error());
  if (ack->attempt != options_.attempt) return;
  const uint64_t sent_end = chunks_.empty() ? received_ : chunks_.back().end();
  if (ack->received > sent_end || ack->received < received_ || ack->delivered < delivered_) {
    return fail_with_error({ErrorKind::Corrupt, fmt::format("the peer acknowledges {} of the memory stream, we sent {} "
                                                            "and it had {}",
                                                            ack->received, sent_end, received_)});
  }
  while (!chunks_.empty() && chunks_.front().end() <= ack->received) {
    chunks_.pop_front();
    if (next_ > 0) --next_;
  }
  if (!chunks_.empty() && chunks_.front().offset < ack->received)
    return fail_with_error({ErrorKind::Corrupt, "the peer acknowledges a part of a chunk"});
  received_ = ack->received;
  delivered_ = ack->delivered;
  const Nanoseconds now = executor_.now();
  window_.saw_round_trip(channel_.figures().rtt);
  if (!resumed_) {
    resumed_ = true;
    next_ = 0;
    window_.restart(delivered_, now);
  } else {
    window_.acknowledged(delivered_, now);
  }
  apply_brake();
  start_job();
}

// Cuts the next chunk as soon as the worker is free: small while the stream trickles, so that the tail does not wait,
// and 256 KiB when it flows.
void MemorySource::start_job() {
  if (failed_ || job_running_ || !resumed_ || !channel_.connected()) return;
  if (channel_.queued_bytes(TrafficClass::Memory) >= channel_.queue_limit(TrafficClass::Memory)) return;
  if (next_ == chunks_.size()) {
    if (filling_.empty()) return send_end();
    const size_t size = std::min(filling_.size(), kMemoryChunkSizeMax);
    const auto cut = filling_.begin() + static_cast<ptrdiff_t>(size);
    const uint64_t offset = accepted_ - filling_.size();
    chunks_.push_back({offset, std::make_shared<const Bytes>(filling_.begin(), cut)});
    filling_.erase(filling_.begin(), cut);
  }
  const Chunk chunk = chunks_[next_++];
  job_running_ = true;
  auto coded = std::make_shared<Bytes>();
  const uint32_t generation = generation_;
  executor_.offload(
      [coding = coding_, chunk, coded, generation, level = options_.compression_level, log = options_.window_log] {
        if (chunk.end() > coding->hashed) {
          VF_ASSERT(chunk.offset == coding->hashed);
          coding->hash.update(*chunk.raw);
          coding->hashed = chunk.end();
        }
        if (coding->generation != generation || !coding->compressor) {
          coding->compressor = std::make_unique<delta::StreamCompressor>(delta::StreamCodecOptions{
              .level = level, .window_log = log, .raw_size_max = static_cast<uint32_t>(kMemoryChunkSizeMax)});
          coding->generation = generation;
        }
        coding->compressor->compress(*chunk.raw, *coded);
      },
      [this, alive = alive_.token(), chunk, coded, generation] {
        if (alive()) job_done(chunk, generation, std::move(*coded));
      });
}

void MemorySource::job_done(const Chunk& chunk, uint32_t generation, Bytes coded) {
  job_running_ = false;
  if (failed_) return;
  // Of an earlier connection: the chunk is still in chunks_ and goes again from the position that the sink names.
  if (generation == generation_ && resumed_ && channel_.connected()) {
    Bytes payload = encode(MemoryData{options_.attempt, generation, chunk.offset, coded});
    wire_bytes_ += payload.size();
    channel_.send(TrafficClass::Memory, MessageType::MemoryData, std::move(payload));
  }
  start_job();
}

void MemorySource::send_end() {
  if (!qemu_ended_ || end_sent_) return;
  if (!digest_made_) {
    digest_ = coding_->hash.digest();
    digest_made_ = true;
  }
  VF_ASSERT(coding_->hashed == accepted_);
  end_sent_ = true;
  channel_.send(TrafficClass::Memory, MessageType::MemoryEnd, encode(MemoryEnd{options_.attempt, accepted_, digest_}));
  if (std::exchange(end_reported_, true)) return;
  executor_.post([this, alive = alive_.token()] {
    if (alive() && !failed_ && events_.ended) events_.ended();
  });
}

void MemorySource::fail_with_error(Error error) {
  if (std::exchange(failed_, true)) return;
  executor_.post([this, alive = alive_.token(), error = std::move(error)] {
    if (alive() && events_.failed) events_.failed(error);
  });
}

}  // namespace vmferry
