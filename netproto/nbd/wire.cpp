// SPDX-License-Identifier: Apache-2.0
#include "netproto/nbd/wire.h"

#include <cerrno>

namespace vmferry::nbd {

std::string_view to_string(WireError error) noexcept {
  switch (error) {
    case WireError::None:
      return "no error";
    case WireError::Permission:
      return "operation not permitted";
    case WireError::Io:
      return "input/output error";
    case WireError::NoMemory:
      return "out of memory";
    case WireError::Invalid:
      return "invalid request";
    case WireError::NoSpace:
      return "no space left";
    case WireError::Overflow:
      return "request too large";
    case WireError::NotSupported:
      return "not supported";
    case WireError::Shutdown:
      return "server is shutting down";
  }
  return "unknown error";
}

WireError to_wire(Errno error, bool fast_zero) noexcept {
  switch (error) {
    case 0:
      return WireError::None;
    case EPERM:
    case EACCES:
    case EROFS:
      return WireError::Permission;
    case ENOMEM:
      return WireError::NoMemory;
    case EINVAL:
      return WireError::Invalid;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return WireError::NoSpace;
    case EOVERFLOW:
      return WireError::Overflow;
    case ENOTSUP:
      return fast_zero ? WireError::NotSupported : WireError::Io;
    case ESHUTDOWN:
      return WireError::Shutdown;
    default:
      return WireError::Io;
  }
}

std::optional<Request> decode_request(const uint8_t* header, HeaderStyle style) noexcept {
  ByteReader in(ByteSpan{header, request_size(style)});
  const bool extended = style == HeaderStyle::Extended;
  if (in.be32() != (extended ? kExtendedRequestMagic : kRequestMagic)) return std::nullopt;
  Request request;
  request.flags = in.be16();
  request.command = in.be16();
  request.cookie = in.be64();
  request.offset = in.be64();
  request.length = extended ? in.be64() : in.be32();
  // A write without the flag comes from a client that forgot it: the payload is there all the same.
  request.payload = request.command == static_cast<uint16_t>(Command::Write) ||
                    (extended && (request.flags & kCommandPayloadLength) != 0);
  return request;
}

void encode_simple_reply(uint8_t* out, uint64_t cookie, WireError error) noexcept {
  put_be32(out, kSimpleReplyMagic);
  put_be32(out + 4, static_cast<uint32_t>(error));
  put_be64(out + 8, cookie);
}

size_t encode_chunk_header(uint8_t* out, HeaderStyle style, ChunkType type, const Request& request,
                           uint64_t payload_size, uint16_t flags) noexcept {
  const bool extended = style == HeaderStyle::Extended;
  put_be32(out, extended ? kExtendedReplyMagic : kStructuredReplyMagic);
  put_be16(out + 4, flags);
  put_be16(out + 6, static_cast<uint16_t>(type));
  put_be64(out + 8, request.cookie);
  if (!extended) {
    put_be32(out + 16, static_cast<uint32_t>(payload_size));
    return kChunkHeaderSize;
  }
  put_be64(out + 16, request.offset);
  put_be64(out + 24, payload_size);
  return kExtendedReplySize;
}

void encode_read_header(uint8_t* out, HeaderStyle style, const Request& request) noexcept {
  if (style == HeaderStyle::Simple) return encode_simple_reply(out, request.cookie, WireError::None);
  put_be64(out + encode_chunk_header(out, style, ChunkType::OffsetData, request, request.length + 8), request.offset);
}

size_t encode_success(uint8_t* out, HeaderStyle style, const Request& request) noexcept {
  if (style == HeaderStyle::Extended) return encode_chunk_header(out, style, ChunkType::None, request, 0);
  encode_simple_reply(out, request.cookie, WireError::None);
  return kSimpleReplySize;
}

}  // namespace vmferry::nbd
