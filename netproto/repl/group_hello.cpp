// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/group_hello.h"

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr uint16_t kGroupHelloFormat = 1;
constexpr size_t kNameSizeMax = 64;

enum HelloFlag : uint8_t { kForced = 1, kSplitBrain = 2, kWrote = 4, kForeignData = 8, kDiverged = 16 };
constexpr uint8_t kHelloFlagsKnown = kForced | kSplitBrain | kWrote | kForeignData | kDiverged;

}  // namespace

Bytes encode(const GroupHello& hello) {
  VF_ASSERT(hello.volumes.size() <= kGroupVolumesMax);
  Bytes out;
  ByteWriter writer(out);
  writer.le16(kGroupHelloFormat).le16(static_cast<uint16_t>(hello.volumes.size()));
  for (const auto& volume : hello.volumes) writer.le16_string(volume.name).le64(volume.size);
  const int flags = (hello.forced ? kForced : 0) | (hello.split_brain ? kSplitBrain : 0) | (hello.wrote ? kWrote : 0) |
                    (hello.foreign_data ? kForeignData : 0) | (hello.diverged ? kDiverged : 0);
  writer.u8(hello.role).u8(hello.handover_state).u8(static_cast<uint8_t>(flags));
  writer.u8(static_cast<uint8_t>(hello.quality));
  writer.le64(hello.term).raw(hello.attempt.bytes).raw(hello.requested_attempt.bytes);
  writer.raw(hello.lineage.bytes).le64(hello.epoch).le64(hello.quality_epoch);
  writer.raw(hello.session.bytes).le64(hello.staged_epoch).le64(hello.staged_frame);
  return out;
}

Result<GroupHello> decode_group_hello(ByteSpan payload) {
  ByteReader reader(payload);
  GroupHello hello;
  const uint16_t format = reader.le16();
  if (reader.ok() && format != kGroupHelloFormat) {
    return fail(ErrorKind::Mismatch, "group hello of format {}, this side knows {}", format, kGroupHelloFormat);
  }
  const size_t volume_count = reader.le16();
  if (volume_count == 0 || volume_count > kGroupVolumesMax) {
    return fail(ErrorKind::Corrupt, "group hello with {} volumes, allowed are 1..{}", volume_count, kGroupVolumesMax);
  }
  for (size_t i = 0; i < volume_count && reader.ok(); ++i) {
    GroupHello::Volume volume;
    volume.name = reader.le16_string(kNameSizeMax);
    volume.size = reader.le64();
    if (reader.ok() && !is_valid_name(volume.name))
      return fail(ErrorKind::Corrupt, "group hello with a bad volume name");
    hello.volumes.push_back(std::move(volume));
  }
  hello.role = reader.u8();
  hello.handover_state = reader.u8();
  const uint8_t flags = reader.u8();
  const uint8_t quality = reader.u8();
  hello.term = reader.le64();
  reader.copy_to(hello.attempt.bytes);
  reader.copy_to(hello.requested_attempt.bytes);
  reader.copy_to(hello.lineage.bytes);
  hello.epoch = reader.le64();
  hello.quality_epoch = reader.le64();
  reader.copy_to(hello.session.bytes);
  hello.staged_epoch = reader.le64();
  hello.staged_frame = reader.le64();
  if (!reader.done()) return fail(ErrorKind::Corrupt, "group hello of {} bytes has a wrong length", payload.size());
  if ((flags & ~kHelloFlagsKnown) != 0) return fail(ErrorKind::Corrupt, "group hello with unknown flags {:#x}", flags);
  if (quality > static_cast<uint8_t>(CopyQuality::Consistent)) {
    return fail(ErrorKind::Corrupt, "group hello with unknown copy quality {}", quality);
  }
  hello.quality = static_cast<CopyQuality>(quality);
  hello.forced = (flags & kForced) != 0;
  hello.split_brain = (flags & kSplitBrain) != 0;
  hello.wrote = (flags & kWrote) != 0;
  hello.foreign_data = (flags & kForeignData) != 0;
  hello.diverged = (flags & kDiverged) != 0;
  return hello;
}

Bytes encode(const GroupReject& reject) {
  Bytes out;
  ByteWriter(out)
      .u8(static_cast<uint8_t>(reject.kind))
      .le16_string(std::string_view(reject.reason).substr(0, kRejectReasonMax));
  return out;
}

Result<GroupReject> decode_group_reject(ByteSpan payload) {
  ByteReader reader(payload);
  const uint8_t kind = reader.u8();
  GroupReject reject;
  reject.reason = reader.le16_string(kRejectReasonMax);
  if (!reader.done() || kind > static_cast<uint8_t>(ErrorKind::Internal)) {
    return fail(ErrorKind::Corrupt, "group reject of {} bytes is malformed", payload.size());
  }
  reject.kind = static_cast<ErrorKind>(kind);
  return reject;
}

Bytes encode(const SourceState& state) {
  Bytes out;
  ByteWriter(out).u8(state.paused ? 1 : 0).le64(state.paused_ns);
  return out;
}

Result<SourceState> decode_source_state(ByteSpan payload) {
  ByteReader reader(payload);
  const uint8_t paused = reader.u8();
  SourceState state{.paused = paused == 1, .paused_ns = reader.le64()};
  if (!reader.done() || paused > 1 || (!state.paused && state.paused_ns != 0)) {
    return fail(ErrorKind::Corrupt, "source state of {} bytes is malformed", payload.size());
  }
  return state;
}

}  // namespace vmferry
