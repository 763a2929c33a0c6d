// SPDX-License-Identifier: Apache-2.0
#include "netproto/nbd/transmission.h"

#include <algorithm>
#include <cstring>

#include "engine/base/assert.h"
#include "engine/base/units.h"

namespace vmferry::nbd {

namespace {

// Flags that mean something for a command. FUA is accepted on every one (proto.md "Command flags").
constexpr unsigned flags_allowed(Command command, const RequestRules& rules) {
  switch (command) {
    case Command::Read:
      return rules.structured_replies ? unsigned{kCommandFua | kCommandDf} : unsigned{kCommandFua};
    case Command::WriteZeroes:
      return kCommandFua | kCommandNoHole | kCommandFastZero;
    case Command::BlockStatus:
      return kCommandFua | kCommandReqOne;
    case Command::Write:
      return rules.extended_headers ? unsigned{kCommandFua | kCommandPayloadLength} : unsigned{kCommandFua};
    default:
      return kCommandFua;
  }
}

constexpr bool mutates(Command command) {
  return command == Command::Write || command == Command::Trim || command == Command::WriteZeroes;
}

}  // namespace

RequestRules RequestRules::from(const Session& session) {
  return {.size = session.export_info.size,
          .read_only = session.export_info.read_only,
          .structured_replies = session.structured_replies,
          .extended_headers = session.extended_headers,
          .base_allocation = session.base_allocation,
          .extra_contexts = static_cast<uint32_t>(std::min(session.extra_contexts.size(), kExtraContextsMax)),
          .block_size_min = session.block_sizes_agreed ? session.export_info.block_size_min : 1,
          .payload_size_max = session.export_info.payload_size_max};
}

WireError check_request(const Request& request, const RequestRules& rules) noexcept {
  const auto command = static_cast<Command>(request.command);
  if (request.command > static_cast<uint16_t>(Command::BlockStatus)) return WireError::Invalid;
  if (command == Command::Disconnect) return WireError::None;
  if ((request.flags & ~flags_allowed(command, rules)) != 0) return WireError::Invalid;
  if (command == Command::Flush) {
    return request.offset == 0 && request.length == 0 ? WireError::None : WireError::Invalid;
  }
  if (command == Command::BlockStatus && rules.contexts() == 0) return WireError::Invalid;
  if (mutates(command) && rules.read_only) return WireError::Permission;
  if (request.length == 0) return WireError::Invalid;
  if (command == Command::Read && request.length > rules.payload_size_max) {
    return (request.flags & kCommandDf) != 0 ? WireError::Overflow : WireError::Invalid;
  }
  if (command == Command::Write && request.length > rules.payload_size_max) return WireError::Invalid;
  if (!fits_in(request.offset, request.length, rules.size)) {
    return command == Command::Write || command == Command::WriteZeroes ? WireError::NoSpace : WireError::Invalid;
  }
  if (request.offset % rules.block_size_min != 0 || request.length % rules.block_size_min != 0) {
    return WireError::Invalid;
  }
  return WireError::None;
}

WireError resolve_limited_status(Request& request, ByteSpan payload, const RequestRules& rules) noexcept {
  ByteReader in(payload);
  const uint64_t length = in.be64();
  uint32_t contexts = 0;
  while (in.ok() && in.remaining() > 0) {
    const uint32_t id = in.be32();
    if (id == 0 || id > 1 + kExtraContextsMax) return WireError::Invalid;
    const uint32_t bit = 1U << (id - 1);
    if ((contexts & bit) != 0 || (rules.contexts() & bit) == 0) return WireError::Invalid;
    contexts |= bit;
  }
  if (!in.done() || contexts == 0) return WireError::Invalid;
  request.contexts = contexts;
  request.length = length;
  request.payload = false;
  request.flags = static_cast<uint16_t>(request.flags & ~kCommandPayloadLength);
  return WireError::None;
}

RequestParser::Event RequestParser::next(ByteSpan& bytes) {
  if (payload_pending_) {
    const size_t taken = static_cast<size_t>(std::min<uint64_t>(payload_left_, bytes.size()));
    if (!skipping_ && taken > 0) {
      std::memcpy(destination_, bytes.data(), taken);
      destination_ += taken;
    }
    bytes = bytes.subspan(taken);
    payload_left_ -= taken;
    if (payload_left_ > 0) return Event::NeedBytes;
    payload_pending_ = false;
    return Event::PayloadDone;
  }
  const size_t header_size = request_size(style_);
  const uint8_t* header = bytes.data();
  if (header_size_ > 0 || bytes.size() < header_size) {
    const size_t taken = std::min(header_size - header_size_, bytes.size());
    if (taken > 0) std::memcpy(header_.data() + header_size_, bytes.data(), taken);
    header_size_ += taken;
    bytes = bytes.subspan(taken);
    if (header_size_ < header_size) return Event::NeedBytes;
    header_size_ = 0;
    header = header_.data();
  } else {
    bytes = bytes.subspan(header_size);
  }
  const std::optional<Request> request = decode_request(header, style_);
  if (!request) return Event::Broken;
  request_ = *request;
  return Event::Header;
}

void RequestParser::take_payload(uint8_t* destination, uint64_t size) {
  VF_ASSERT(!payload_pending_);
  destination_ = destination;
  payload_left_ = size;
  skipping_ = false;
  payload_pending_ = true;
}

void RequestParser::skip_payload(uint64_t size) {
  VF_ASSERT(!payload_pending_);
  payload_left_ = size;
  skipping_ = true;
  payload_pending_ = true;
}

void append_error(Bytes& out, const Request& request, WireError error, HeaderStyle style) {
  const size_t start = out.size();
  if (!answers_in_chunks(request, style)) {
    out.resize(start + kSimpleReplySize);
    return encode_simple_reply(out.data() + start, request.cookie, error);
  }
  const std::string_view text = to_string(error);
  out.resize(start + kExtendedReplySize);
  out.resize(start + encode_chunk_header(out.data() + start, style, ChunkType::Error, request, 6 + text.size()));
  ByteWriter(out).be32(static_cast<uint32_t>(error)).be16(static_cast<uint16_t>(text.size())).raw(as_bytes(text));
}

void append_block_status(Bytes& out, const Request& request, std::span<const StatusDescriptor> descriptors,
                         HeaderStyle style, StatusChunk chunk) {
  VF_ASSERT(!descriptors.empty() && style != HeaderStyle::Simple);
  const bool extended = style == HeaderStyle::Extended;
  const size_t payload = extended ? 8 + 16 * descriptors.size() : 4 + 8 * descriptors.size();
  const size_t start = out.size();
  out.resize(start + kExtendedReplySize);
  out.resize(start + encode_chunk_header(out.data() + start, style,
                                         extended ? ChunkType::BlockStatusExt : ChunkType::BlockStatus, request,
                                         payload, chunk.last ? kChunkDone : uint16_t{0}));
  ByteWriter writer(out);
  writer.be32(chunk.context_id);
  if (extended) writer.be32(static_cast<uint32_t>(descriptors.size()));
  for (const StatusDescriptor& descriptor : descriptors) {
    if (extended) {
      writer.be64(descriptor.length).be64(descriptor.flags);
    } else {
      writer.be32(static_cast<uint32_t>(descriptor.length)).be32(descriptor.flags);
    }
  }
}

}  // namespace vmferry::nbd
