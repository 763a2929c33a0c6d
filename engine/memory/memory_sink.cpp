// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/memory_sink.h"

#include "engine/base/assert.h"
#include "engine/memory/memory_source.h"

namespace vmferry {

namespace {

// While QEMU is slower than the link its queue shrinks without a callback until the low mark.
constexpr Nanoseconds kAckInterval = 5 * kMillisecond;
constexpr uint64_t kFramesBytesMax = MemorySink::kBacklogMax;

}  // namespace

struct MemorySink::Decoding {
  Sha256Stream hash;
  uint64_t hashed = 0;
  std::unique_ptr<delta::StreamDecompressor> decompressor;
  uint32_t generation = 0;
};

MemorySink::MemorySink(Executor& executor, GroupChannel& channel, std::unique_ptr<ByteStream> to_qemu,
                       const Id128& attempt, Events events)
    : executor_(executor),
      channel_(channel),
      to_qemu_(std::move(to_qemu)),
      attempt_(attempt),
      events_(std::move(events)),
      decoding_(std::make_shared<Decoding>()),
      ack_timer_(executor) {
  VF_ASSERT(!attempt_.is_none());
  to_qemu_->set_handler(this);
  if (channel_.connected()) send_ack();
}

MemorySink::~MemorySink() = default;

void MemorySink::channel_connected() {
  // Frames of the old connection that were not decompressed yet are sent again, with a new history.
  frames_.clear();
  frames_bytes_ = 0;
  if (!job_running_ && !failed_) send_ack();
}

uint64_t MemorySink::delivered() const {
  return received_ - (qemu_closed_ ? 0 : to_qemu_->unsent_bytes());
}

void MemorySink::send_ack() {
  acked_delivered_ = delivered();
  channel_.send(TrafficClass::Control, MessageType::MemoryAck,
                encode(MemoryAck{attempt_, received_, acked_delivered_}));
}

void MemorySink::handle_data(ByteSpan payload) {
  if (failed_) return;
  const auto data = decode_memory_data(payload);
  if (!data) return fail_with_error(data.error());
  if (data->attempt != attempt_) return;
  if (!data->coded.empty() && end_) return fail_with_error({ErrorKind::Corrupt, "memory stream: data behind its end"});
  if (frames_bytes_ + data->coded.size() > kFramesBytesMax || received_ - delivered() > kBacklogMax)
    return fail_with_error({ErrorKind::LimitExceeded, "memory stream: the source does not wait for acknowledgements"});
  frames_bytes_ += data->coded.size();
  frames_.push_back({data->generation, data->offset, Bytes(data->coded.begin(), data->coded.end())});
  start_job();
}

void MemorySink::handle_end(ByteSpan payload) {
  if (failed_) return;
  const auto end = decode_memory_end(payload);
  if (!end) return fail_with_error(end.error());
  if (end->attempt != attempt_) return;
  if (end_ && !(*end_ == *end)) return fail_with_error({ErrorKind::Corrupt, "memory stream: two different ends"});
  end_ = *end;
  if (complete_) return send_ack();
  finish_if_complete();
}

void MemorySink::start_job() {
  while (!failed_ && !job_running_ && !frames_.empty()) {
    auto frame = std::make_shared<Frame>(std::move(frames_.front()));
    frames_.pop_front();
    frames_bytes_ -= frame->coded.size();
    if (frame->coded.empty()) {  // the source asks where to go on
      send_ack();
      continue;
    }
    job_running_ = true;
    auto raw = std::make_shared<Result<Bytes>>();
    executor_.offload(
        [decoding = decoding_, frame, raw] {
          if (decoding->generation != frame->generation || !decoding->decompressor) {
            decoding->decompressor = std::make_unique<delta::StreamDecompressor>(delta::StreamCodecOptions{
                .window_log = kMemoryWindowLogMax, .raw_size_max = static_cast<uint32_t>(kMemoryChunkSizeMax)});
            decoding->generation = frame->generation;
          }
          Bytes out;
          if (Status status = decoding->decompressor->decompress(frame->coded, out); !status) {
            *raw = tl::unexpected(status.error());
            return;
          }
          // What was received before is hashed already; a gap is found by the executor.
          if (frame->offset == decoding->hashed) {
            decoding->hash.update(out);
            decoding->hashed += out.size();
          }
          *raw = std::move(out);
        },
        [this, alive = alive_.token(), frame, raw] {
          if (alive()) job_done(frame->offset, std::move(*raw));
        });
  }
}

void MemorySink::job_done(uint64_t offset, Result<Bytes> raw) {
  job_running_ = false;
  if (failed_) return;
  if (!raw) return fail_with_error({raw.error().kind, "memory stream: " + raw.error().text});
  if (offset > received_ || (offset < received_ && offset + raw->size() > received_)) {
    return fail_with_error(
        {ErrorKind::Corrupt,
         fmt::format("memory stream: bytes from {} on came when {} were expected", offset, received_)});
  }
  if (offset == received_) {
    if (qemu_closed_)
      return fail_with_error({ErrorKind::Unavailable, "the destination QEMU closed its migration channel"});
    received_ += raw->size();
    to_qemu_->write(std::move(*raw));
  }
  progress();
  start_job();
}

// Acknowledges what is new now, and what QEMU takes later in steps of a few milliseconds.
void MemorySink::progress() {
  if (failed_) return;
  send_ack();
  if (acked_delivered_ < received_ && !ack_timer_.running()) {
    ack_timer_.start(kAckInterval, [this] {
      if (delivered() != acked_delivered_) return progress();
      ack_timer_.start(kAckInterval, [this] { progress(); });
    });
  }
  finish_if_complete();
}

void MemorySink::stream_writable() {
  if (!failed_ && delivered() != acked_delivered_) progress();
}

void MemorySink::finish_if_complete() {
  if (!end_ || complete_ || failed_ || job_running_ || !frames_.empty()) return;
  if (received_ > end_->total)
    return fail_with_error(
        {ErrorKind::Corrupt, fmt::format("memory stream: {} bytes, its end says {}", received_, end_->total)});
  if (received_ < end_->total || delivered() != received_) return;
  complete_ = true;
  const bool equal = decoding_->hashed == received_ && decoding_->hash.digest() == end_->sha256;
  send_ack();
  executor_.post([this, alive = alive_.token(), equal] {
    if (alive() && events_.complete) events_.complete(equal);
  });
}

// QEMU closes by itself after the last byte; before that it has given up.
void MemorySink::stream_closed(Errno error) {
  const bool everything_given = to_qemu_->unsent_bytes() == 0 && error == 0;  // as far as it came
  qemu_closed_ = true;
  if (complete_ || everything_given) return;
  fail_with_error({ErrorKind::Unavailable, fmt::format("the destination QEMU closed its migration channel: {}",
                                                       error == 0 ? "before the end" : errno_text(error))});
}

void MemorySink::fail_with_error(Error error) {
  if (std::exchange(failed_, true)) return;
  ack_timer_.cancel();
  frames_.clear();
  executor_.post([this, alive = alive_.token(), error = std::move(error)] {
    if (alive() && events_.failed) events_.failed(error);
  });
}

}  // namespace vmferry
