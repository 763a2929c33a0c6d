// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/epoch_messages.h"

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr size_t kVerifyPiecesMax = kVerifyRangeMax / 4096;

tl::unexpected<Error> malformed(std::string_view what, ByteSpan payload) {
  return fail(ErrorKind::Corrupt, "{} of {} bytes is malformed", what, payload.size());
}

// True for 0 and 1 only: a third value is a later format or noise.
bool read_bool(ByteReader& reader, bool& valid) {
  const uint8_t value = reader.u8();
  if (value > 1) valid = false;
  return value == 1;
}

bool is_error_kind(uint8_t kind) {
  return kind <= static_cast<uint8_t>(ErrorKind::Internal);
}

// offset + length does not overflow and there is at least one byte.
bool is_range(const ByteRange& range) {
  return range.length > 0 && range.length <= UINT64_MAX - range.offset;
}

}  // namespace

Bytes encode(const EpochBegin& message) {
  Bytes out;
  ByteWriter writer(out);
  writer.le64(message.epoch).raw(message.session.bytes).raw(message.lineage.bytes);
  writer.u8(static_cast<uint8_t>(message.kind)).u8(message.full).u8(message.overwrite).u8(message.resume);
  writer.raw(message.final_attempt.bytes).le64(message.first_frame).le64(message.dirty_bytes);
  return out;
}

Result<EpochBegin> decode_epoch_begin(ByteSpan payload) {
  ByteReader reader(payload);
  EpochBegin message;
  bool valid = true;
  message.epoch = reader.le64();
  reader.copy_to(message.session.bytes);
  reader.copy_to(message.lineage.bytes);
  const uint8_t kind = reader.u8();
  message.full = read_bool(reader, valid);
  message.overwrite = read_bool(reader, valid);
  message.resume = read_bool(reader, valid);
  reader.copy_to(message.final_attempt.bytes);
  message.first_frame = reader.le64();
  message.dirty_bytes = reader.le64();
  if (!reader.done() || !valid || kind < 1 || kind > 2 || message.epoch == 0 || message.first_frame == 0 ||
      message.session.is_none() || message.lineage.is_none()) {
    return malformed("epoch begin", payload);
  }
  message.kind = static_cast<EpochKind>(kind);
  return message;
}

Bytes encode(const EpochData& message) {
  Bytes out;
  out.reserve(53 + message.coded.size());
  ByteWriter writer(out);
  writer.le64(message.epoch).le64(message.frame).le64(message.heals).le32(message.stream).u8(message.fuzzy);
  writer.le32(message.body_size).raw(message.body_hash).raw(message.coded);
  return out;
}

Result<EpochData> decode_epoch_data(ByteSpan payload) {
  ByteReader reader(payload);
  EpochData message;
  bool valid = true;
  message.epoch = reader.le64();
  message.frame = reader.le64();
  message.heals = reader.le64();
  message.stream = reader.le32();
  message.fuzzy = read_bool(reader, valid);
  message.body_size = reader.le32();
  reader.copy_to(message.body_hash);
  message.coded = reader.rest();
  if (!reader.ok() || !valid || message.epoch == 0 || message.frame == 0 || message.heals >= message.frame ||
      message.body_size == 0 || message.body_size > kFrameBodyMax || message.coded.empty()) {
    return malformed("epoch data", payload);
  }
  return message;
}

Bytes encode(const EpochEnd& message) {
  Bytes out;
  ByteWriter(out).le64(message.epoch).le64(message.last_frame).u8(message.consistent);
  return out;
}

Result<EpochEnd> decode_epoch_end(ByteSpan payload) {
  ByteReader reader(payload);
  EpochEnd message;
  bool valid = true;
  message.epoch = reader.le64();
  message.last_frame = reader.le64();
  message.consistent = read_bool(reader, valid);
  if (!reader.done() || !valid || message.epoch == 0) return malformed("epoch end", payload);
  return message;
}

Bytes encode(const EpochSegmentAck& message) {
  Bytes out;
  ByteWriter(out).le64(message.epoch).le64(message.frame);
  return out;
}

Result<EpochSegmentAck> decode_epoch_segment_ack(ByteSpan payload) {
  ByteReader reader(payload);
  EpochSegmentAck message;
  message.epoch = reader.le64();
  message.frame = reader.le64();
  if (!reader.done() || message.epoch == 0) return malformed("segment acknowledgement", payload);
  return message;
}

Bytes encode(const EpochAck& message) {
  Bytes out;
  ByteWriter(out).le64(message.epoch).u8(static_cast<uint8_t>(message.quality));
  return out;
}

Result<EpochAck> decode_epoch_ack(ByteSpan payload) {
  ByteReader reader(payload);
  EpochAck message;
  message.epoch = reader.le64();
  const uint8_t quality = reader.u8();
  if (!reader.done() || message.epoch == 0 || quality < static_cast<uint8_t>(CopyQuality::Fuzzy) ||
      quality > static_cast<uint8_t>(CopyQuality::Consistent)) {
    return malformed("epoch acknowledgement", payload);
  }
  message.quality = static_cast<CopyQuality>(quality);
  return message;
}

Bytes encode(const EpochResend& message) {
  VF_ASSERT(message.ranges.size() <= kRunsPerFrameMax);
  Bytes out;
  ByteWriter writer(out);
  writer.le64(message.epoch).le64(message.frame).le32(static_cast<uint32_t>(message.ranges.size()));
  for (const auto& item : message.ranges) writer.le16(item.volume).le64(item.range.offset).le64(item.range.length);
  return out;
}

Result<EpochResend> decode_epoch_resend(ByteSpan payload) {
  ByteReader reader(payload);
  EpochResend message;
  message.epoch = reader.le64();
  message.frame = reader.le64();
  const uint32_t count = reader.le32();
  bool valid = count > 0 && count <= kRunsPerFrameMax && reader.remaining() == size_t{count} * 18;
  for (uint32_t i = 0; valid && i < count; ++i) {
    EpochResend::Range item;
    item.volume = reader.le16();
    item.range.offset = reader.le64();
    item.range.length = reader.le64();
    valid = is_range(item.range) && item.range.length <= kFrameLiteralMax;
    message.ranges.push_back(item);
  }
  if (!reader.done() || !valid || message.epoch == 0 || message.frame == 0) return malformed("epoch resend", payload);
  return message;
}

Bytes encode(const Credit& message) {
  Bytes out;
  ByteWriter(out).le64(message.granted);
  return out;
}

Result<Credit> decode_credit(ByteSpan payload) {
  ByteReader reader(payload);
  const Credit message{reader.le64()};
  if (!reader.done()) return malformed("credit", payload);
  return message;
}

Bytes encode(const EpochAbandon& message) {
  Bytes out;
  ByteWriter(out)
      .le64(message.epoch)
      .u8(static_cast<uint8_t>(message.kind))
      .u8(message.retrying)
      .le16_string(std::string_view(message.reason).substr(0, kRejectReasonMax));
  return out;
}

Result<EpochAbandon> decode_epoch_abandon(ByteSpan payload) {
  ByteReader reader(payload);
  EpochAbandon message;
  bool valid = true;
  message.epoch = reader.le64();
  const uint8_t kind = reader.u8();
  message.retrying = read_bool(reader, valid);
  message.reason = reader.le16_string(kRejectReasonMax);
  if (!reader.done() || !valid || !is_error_kind(kind) || message.epoch == 0) {
    return malformed("epoch abandon", payload);
  }
  message.kind = static_cast<ErrorKind>(kind);
  return message;
}

Bytes encode(const VerifyRequest& message) {
  Bytes out;
  ByteWriter(out)
      .le64(message.id)
      .le16(message.volume)
      .le64(message.range.offset)
      .le64(message.range.length)
      .le32(message.piece_size);
  return out;
}

Result<VerifyRequest> decode_verify_request(ByteSpan payload) {
  ByteReader reader(payload);
  VerifyRequest message;
  message.id = reader.le64();
  message.volume = reader.le16();
  message.range.offset = reader.le64();
  message.range.length = reader.le64();
  message.piece_size = reader.le32();
  if (!reader.done() || !is_range(message.range) || message.range.length > kVerifyRangeMax ||
      message.piece_size < 4096 || message.piece_size > kVerifyRangeMax) {
    return malformed("verify request", payload);
  }
  return message;
}

Bytes encode(const VerifyReply& message) {
  VF_ASSERT(message.digests.size() <= kVerifyPiecesMax);
  Bytes out;
  ByteWriter writer(out);
  writer.le64(message.id).le64(message.epoch).u8(static_cast<uint8_t>(message.error_kind));
  writer.le16_string(std::string_view(message.error).substr(0, kRejectReasonMax));
  writer.le32(static_cast<uint32_t>(message.digests.size()));
  for (const auto& digest : message.digests) writer.raw(digest);
  return out;
}

Result<VerifyReply> decode_verify_reply(ByteSpan payload) {
  ByteReader reader(payload);
  VerifyReply message;
  message.id = reader.le64();
  message.epoch = reader.le64();
  const uint8_t kind = reader.u8();
  message.error = reader.le16_string(kRejectReasonMax);
  const uint32_t count = reader.le32();
  const bool valid = count <= kVerifyPiecesMax && reader.remaining() == count * sizeof(Sha256Digest);
  for (uint32_t i = 0; valid && i < count; ++i) {
    Sha256Digest digest{};
    reader.copy_to(digest);
    message.digests.push_back(digest);
  }
  if (!reader.done() || !valid || !is_error_kind(kind)) return malformed("verify reply", payload);
  message.error_kind = static_cast<ErrorKind>(kind);
  return message;
}

// Body: le32 run count; runs; 32 bytes of reference digest when there is a reference; literals.
// Run: u8 kind, le16 volume, le64 offset, le64 length, and for a reference le16 volume, le64 offset of its source.
void append_frame_body(const FrameBody& body, Bytes& out) {
  VF_ASSERT(!body.runs.empty() && body.runs.size() <= kRunsPerFrameMax);
  ByteWriter writer(out);
  writer.le32(static_cast<uint32_t>(body.runs.size()));
  bool references = false;
  for (const auto& run : body.runs) {
    writer.u8(static_cast<uint8_t>(run.kind)).le16(run.volume).le64(run.range.offset).le64(run.range.length);
    if (run.kind != RunKind::Reference) continue;
    writer.le16(run.source_volume).le64(run.source_offset);
    references = true;
  }
  if (references) writer.raw(body.references);
  writer.raw(body.literals);
}

Result<FrameBody> decode_frame_body(ByteSpan bytes) {
  constexpr size_t kRunSizeMin = 19;
  ByteReader reader(bytes);
  FrameBody body;
  const uint32_t count = reader.le32();
  bool valid = count > 0 && count <= kRunsPerFrameMax && reader.remaining() >= count * kRunSizeMin;
  if (valid) body.runs.reserve(count);
  bool references = false;
  uint64_t reference_bytes = 0;
  uint64_t literal_bytes = 0;
  for (uint32_t i = 0; valid && i < count; ++i) {
    FrameRun run;
    const uint8_t kind = reader.u8();
    run.volume = reader.le16();
    run.range.offset = reader.le64();
    run.range.length = reader.le64();
    valid = kind >= 1 && kind <= 3 && is_range(run.range);
    if (!valid) break;
    run.kind = static_cast<RunKind>(kind);
    if (run.kind != RunKind::Zero) valid = run.range.length <= kFrameLiteralMax;
    if (run.kind == RunKind::Literal) literal_bytes += run.range.length;
    if (run.kind == RunKind::Reference) {
      run.source_volume = reader.le16();
      run.source_offset = reader.le64();
      valid = valid && run.range.length <= UINT64_MAX - run.source_offset;
      reference_bytes += run.range.length;
      references = true;
    }
    body.runs.push_back(run);
  }
  if (references) reader.copy_to(body.references);
  body.literals = reader.rest();
  if (!reader.ok() || !valid || literal_bytes + reference_bytes > kFrameLiteralMax ||
      body.literals.size() != literal_bytes) {
    return malformed("frame body", bytes);
  }
  return body;
}

}  // namespace vmferry
