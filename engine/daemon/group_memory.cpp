// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/group_memory.h"

namespace vmferry {

void GroupMemory::start_source(std::unique_ptr<ByteStream> from_qemu, const Id128& attempt, SourceEvents events) {
  stop();
  last_ = {};
  options_.attempt = attempt;
  source_ = std::make_unique<MemorySource>(
      executor_, channel_, std::move(from_qemu), options_,
      MemorySource::Events{.ended = std::move(events.ended), .failed = std::move(events.failed)});
  source_->hold(held_);
  if (connected_) source_->channel_connected();
}

void GroupMemory::hold(bool held) {
  held_ = held;
  if (source_ != nullptr) source_->hold(held);
}

void GroupMemory::start_sink(std::unique_ptr<ByteStream> to_qemu, const Id128& attempt, SinkEvents events) {
  stop();
  sink_ = std::make_unique<MemorySink>(
      executor_, channel_, std::move(to_qemu), attempt,
      MemorySink::Events{.complete = std::move(events.complete), .failed = std::move(events.failed)});
  if (connected_) sink_->channel_connected();
}

void GroupMemory::stop() {
  if (source_ != nullptr) last_ = figures();
  source_.reset();
  sink_.reset();
  held_ = false;
}

MemoryFigures GroupMemory::figures() const {
  if (source_ == nullptr) return {.raw_bytes = last_.raw_bytes, .wire_bytes = last_.wire_bytes, .queued_bytes = 0};
  const MemorySourceFigures figures = source_->figures();
  return {.raw_bytes = figures.raw_bytes, .wire_bytes = figures.wire_bytes, .queued_bytes = figures.queued_bytes};
}

void GroupMemory::on_connected() {
  connected_ = true;
  if (source_ != nullptr) source_->channel_connected();
  if (sink_ != nullptr) sink_->channel_connected();
}

void GroupMemory::on_disconnected() {
  connected_ = false;
  if (source_ != nullptr) source_->channel_disconnected();
  if (sink_ != nullptr) sink_->channel_disconnected();
}

void GroupMemory::on_writable() {
  if (source_ != nullptr) source_->channel_writable();
}

void GroupMemory::on_message(MessageType type, ByteSpan payload) {
  if (type == MessageType::MemoryAck) {
    if (source_ != nullptr) source_->handle_ack(payload);
  } else if (sink_ != nullptr) {
    type == MessageType::MemoryData ? sink_->handle_data(payload) : sink_->handle_end(payload);
  }
}

}  // namespace vmferry
