// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/memory_messages.h"

namespace vmferry {

namespace {

// Positions stay far below overflow when lengths are added; no guest has an exbibyte of memory to send.
constexpr uint64_t kPositionMax = 1ULL << 60;

Status check(const ByteReader& reader, const Id128& attempt, uint64_t position, std::string_view name) {
  if (!reader.done()) return fail(ErrorKind::Corrupt, "{}: wrong size", name);
  if (attempt.is_none()) return fail(ErrorKind::Corrupt, "{}: no attempt", name);
  if (position > kPositionMax) return fail(ErrorKind::Corrupt, "{}: position {}", name, position);
  return {};
}

}  // namespace

Bytes encode(const MemoryData& message) {
  Bytes out;
  out.reserve(28 + message.coded.size());
  ByteWriter(out).raw(message.attempt.bytes).le32(message.generation).le64(message.offset).raw(message.coded);
  return out;
}

Bytes encode(const MemoryEnd& message) {
  Bytes out;
  ByteWriter(out).raw(message.attempt.bytes).le64(message.total).raw(message.sha256);
  return out;
}

Bytes encode(const MemoryAck& message) {
  Bytes out;
  ByteWriter(out).raw(message.attempt.bytes).le64(message.received).le64(message.delivered);
  return out;
}

Result<MemoryData> decode_memory_data(ByteSpan payload) {
  ByteReader reader(payload);
  MemoryData message;
  reader.copy_to(message.attempt.bytes);
  message.generation = reader.le32();
  message.offset = reader.le64();
  message.coded = reader.rest();
  if (Status status = check(reader, message.attempt, message.offset, "MemoryData"); !status)
    return tl::unexpected(status.error());
  if (message.coded.size() > kMemoryCodedSizeMax)
    return fail(ErrorKind::LimitExceeded, "MemoryData: {} bytes", message.coded.size());
  return message;
}

Result<MemoryEnd> decode_memory_end(ByteSpan payload) {
  ByteReader reader(payload);
  MemoryEnd message;
  reader.copy_to(message.attempt.bytes);
  message.total = reader.le64();
  reader.copy_to(message.sha256);
  if (Status status = check(reader, message.attempt, message.total, "MemoryEnd"); !status)
    return tl::unexpected(status.error());
  return message;
}

Result<MemoryAck> decode_memory_ack(ByteSpan payload) {
  ByteReader reader(payload);
  MemoryAck message;
  reader.copy_to(message.attempt.bytes);
  message.received = reader.le64();
  message.delivered = reader.le64();
  if (Status status = check(reader, message.attempt, message.received, "MemoryAck"); !status)
    return tl::unexpected(status.error());
  if (message.delivered > message.received)
    return fail(ErrorKind::Corrupt, "MemoryAck: delivered {} of {} received", message.delivered, message.received);
  return message;
}

}  // namespace vmferry
