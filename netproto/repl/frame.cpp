// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/frame.h"

#include <utility>

#include "engine/base/assert.h"
#include "engine/base/hash.h"

namespace vmferry {

namespace {

uint8_t lane_of(const FrameHeader& header) {
  return static_cast<uint8_t>(header.flags >> kFrameLaneShift & 3);
}

}  // namespace

void append_frame_header(const FrameStart& start, size_t payload_size, Bytes& out) {
  VF_ASSERT(payload_size <= kFramePayloadSizeMax);
  VF_ASSERT(start.lane < kFrameLaneCount);
  const size_t begin = out.size();
  const unsigned flags = (start.critical ? kFrameCritical : 0U) | (start.continues ? kFrameContinues : 0U) |
                         static_cast<unsigned>(start.lane) << kFrameLaneShift;
  ByteWriter writer(out);
  writer.le32(kFrameMagic).le16(static_cast<uint16_t>(start.type)).le16(static_cast<uint16_t>(flags));
  writer.le32(static_cast<uint32_t>(payload_size));
  writer.le32(crc32c(ByteSpan(out).subspan(begin, 12)));
}

void append_frame(const FrameStart& start, ByteSpan payload, Bytes& out) {
  append_frame_header(start, payload.size(), out);
  out.insert(out.end(), payload.begin(), payload.end());
}

bool is_known_message(uint16_t type) {
  switch (static_cast<MessageType>(type)) {
    case MessageType::Invalid:
      return false;
    case MessageType::Hello:
    case MessageType::HelloReject:
    case MessageType::Ping:
    case MessageType::Pong:
    case MessageType::JoinRequest:
    case MessageType::JoinReply:
    case MessageType::PeerRequest:
    case MessageType::PeerReply:
    case MessageType::GroupHello:
    case MessageType::GroupReject:
    case MessageType::SourceState:
    case MessageType::EpochBegin:
    case MessageType::EpochData:
    case MessageType::EpochEnd:
    case MessageType::EpochSegmentAck:
    case MessageType::EpochAck:
    case MessageType::EpochResend:
    case MessageType::Credit:
    case MessageType::EpochAbandon:
    case MessageType::VerifyRequest:
    case MessageType::VerifyReply:
    case MessageType::MemoryData:
    case MessageType::MemoryEnd:
    case MessageType::MemoryAck:
    case MessageType::Prepare:
    case MessageType::Prepared:
    case MessageType::FenceNotice:
    case MessageType::Go:
    case MessageType::Primary:
    case MessageType::Started:
    case MessageType::Running:
    case MessageType::Aborted:
    case MessageType::UnknownAttempt:
    case MessageType::PromoteRequest:
    case MessageType::PromoteReply:
    case MessageType::DemoteNotice:
      return true;
  }
  return false;
}

Result<FrameHeader> FrameDecoder::parse_header(ByteSpan bytes) const {
  ByteReader reader(bytes.first(kFrameHeaderSize));
  FrameHeader header{};
  header.magic = reader.le32();
  header.type = reader.le16();
  header.flags = reader.le16();
  header.payload_size = reader.le32();
  header.header_crc = reader.le32();
  if (header.magic != kFrameMagic) return fail(ErrorKind::Corrupt, "frame: magic is {:#010x}", header.magic);
  if (header.header_crc != crc32c(bytes.first(12))) return fail(ErrorKind::Corrupt, "frame: header checksum is wrong");
  if ((header.flags & ~kFrameFlagsKnown) != 0) {
    return fail(ErrorKind::Corrupt, "frame: flags {:#06x} hold unknown bits", header.flags);
  }
  const Lane& lane = lanes_[lane_of(header)];
  if (header.payload_size > kFramePayloadSizeMax - lane.collected.size()) {
    return fail(ErrorKind::LimitExceeded, "frame: message of type {} is longer than {} bytes", header.type,
                kFramePayloadSizeMax);
  }
  if (lane.open && (lane.type != header.type || lane.critical != ((header.flags & kFrameCritical) != 0))) {
    return fail(ErrorKind::Corrupt, "frame: type {} in the middle of a message of type {}", header.type, lane.type);
  }
  // An empty fragment would let a peer keep us busy for ever without getting nearer to the limit.
  if ((header.flags & kFrameContinues) != 0 && header.payload_size == 0) {
    return fail(ErrorKind::Corrupt, "frame: empty fragment of type {}", header.type);
  }
  if (!is_known_message(header.type) && (header.flags & kFrameCritical) != 0) {
    return fail(ErrorKind::Mismatch, "frame: unknown message type {}", header.type);
  }
  return header;
}

bool FrameDecoder::deliver(const FrameHeader& header, ByteSpan payload, const Sink& sink) {
  Lane& lane = lanes_[lane_of(header)];
  const bool continues = (header.flags & kFrameContinues) != 0;
  const bool known = is_known_message(header.type);
  if (!lane.open && !continues) return known ? sink(static_cast<MessageType>(header.type), payload) : true;

  lane.open = true;
  lane.type = header.type;
  lane.critical = (header.flags & kFrameCritical) != 0;
  lane.collected.insert(lane.collected.end(), payload.begin(), payload.end());
  if (continues) return true;
  // Taken out before the call, so that the lane is in order whatever the sink does.
  Bytes whole = std::exchange(lane.collected, {});
  lane.open = false;
  const bool go_on = known ? sink(static_cast<MessageType>(header.type), whole) : true;
  if (go_on) {
    whole.clear();
    lane.collected = std::move(whole);  // keeps the capacity for the next large message
  }
  return go_on;
}

// Moves bytes from the input to the buffer until it holds `size`; false when the input ends before.
bool FrameDecoder::fill_buffer(ByteSpan& bytes, size_t size) {
  const size_t take = std::min(size - buffer_.size(), bytes.size());
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(take));
  bytes = bytes.subspan(take);
  return buffer_.size() == size;
}

Status FrameDecoder::feed(ByteSpan bytes, const Sink& sink) {
  while (!bytes.empty()) {
    if (buffer_.size() < kFrameHeaderSize && (!buffer_.empty() || bytes.size() < kFrameHeaderSize)) {
      if (!fill_buffer(bytes, kFrameHeaderSize)) return {};
    }
    const bool buffered = !buffer_.empty();
    const auto header = parse_header(buffered ? ByteSpan(buffer_) : bytes);
    if (!header) return tl::unexpected(header.error());
    const size_t size = kFrameHeaderSize + header->payload_size;

    if (!buffered && bytes.size() >= size) {  // the usual case: no copy
      const ByteSpan payload = bytes.subspan(kFrameHeaderSize, header->payload_size);
      bytes = bytes.subspan(size);
      if (!deliver(*header, payload, sink)) return {};
      continue;
    }
    buffer_.reserve(size);
    if (!fill_buffer(bytes, size)) return {};
    Bytes frame = std::exchange(buffer_, {});
    if (!deliver(*header, ByteSpan(frame).subspan(kFrameHeaderSize), sink)) return {};
    frame.clear();
    buffer_ = std::move(frame);  // keeps the capacity
  }
  return {};
}

bool FrameDecoder::at_boundary() const {
  if (!buffer_.empty()) return false;
  for (const Lane& lane : lanes_) {
    if (lane.open) return false;
  }
  return true;
}

}  // namespace vmferry
