// SPDX-License-Identifier: Apache-2.0
//
// Numbers and fixed layouts of the NBD protocol, and the functions that pack and unpack them.
//
// Source of truth: doc/proto.md of the Network Block Device project; docs/nbd.md says which parts we serve. All
// integers are big-endian on the wire.
// Flow: handshake.h and transmission.h build on this; blockdev/nbd drives both.
// Threads: pure functions and values.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "engine/base/bytes.h"
#include "engine/base/result.h"

namespace vmferry::nbd {

// Handshake.
inline constexpr uint64_t kInitMagic = 0x4e42444d41474943;         // "NBDMAGIC"
inline constexpr uint64_t kOptionMagic = 0x49484156454f5054;       // "IHAVEOPT"
inline constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;  // every option reply
inline constexpr size_t kGreetingSize = 18;
inline constexpr size_t kOptionHeaderSize = 16;
inline constexpr size_t kOptionReplyHeaderSize = 20;
inline constexpr size_t kStringSizeMax = 4096;  // proto.md "Conventions": no string is longer

enum HandshakeFlag : uint16_t { kFlagFixedNewstyle = 1 << 0, kFlagNoZeroes = 1 << 1 };
enum ClientFlag : uint32_t { kClientFixedNewstyle = 1 << 0, kClientNoZeroes = 1 << 1 };

enum class Option : uint32_t {
  ExportName = 1,
  Abort = 2,
  List = 3,
  StartTls = 5,
  Info = 6,
  Go = 7,
  StructuredReply = 8,
  ListMetaContext = 9,
  SetMetaContext = 10,
  ExtendedHeaders = 11,
};

enum class OptionReply : uint32_t {
  Ack = 1,
  Server = 2,
  Info = 3,
  MetaContext = 4,
  ErrUnsupported = 0x80000001,
  ErrPolicy = 0x80000002,
  ErrInvalid = 0x80000003,
  ErrTlsRequired = 0x80000005,
  ErrUnknown = 0x80000006,
  ErrShutdown = 0x80000007,
  ErrTooBig = 0x80000009,
  ErrExtendedHeadersRequired = 0x8000000a,
};

enum class InfoType : uint16_t { Export = 0, Name = 1, Description = 2, BlockSize = 3 };

enum TransmissionFlag : uint16_t {
  kHasFlags = 1 << 0,
  kReadOnly = 1 << 1,
  kSendFlush = 1 << 2,
  kSendFua = 1 << 3,
  kSendTrim = 1 << 5,
  kSendWriteZeroes = 1 << 6,
  kSendDf = 1 << 7,
  kCanMultiConn = 1 << 8,
  kSendCache = 1 << 10,
  kSendFastZero = 1 << 11,
  kBlockStatusPayload = 1 << 12,
};

// Transmission.
inline constexpr uint32_t kRequestMagic = 0x25609513;
inline constexpr uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;
inline constexpr uint32_t kExtendedRequestMagic = 0x21e41c71;
inline constexpr uint32_t kExtendedReplyMagic = 0x6e8a278c;
inline constexpr size_t kRequestSize = 28;
inline constexpr size_t kExtendedRequestSize = 32;
inline constexpr size_t kSimpleReplySize = 16;
inline constexpr size_t kChunkHeaderSize = 20;
inline constexpr size_t kExtendedReplySize = 32;
inline constexpr size_t kReadHeaderSizeMax = kExtendedReplySize + 8;  // OFFSET_DATA: chunk header and offset
inline constexpr uint32_t kPayloadSizeMax = 32U << 20;  // what clients may send without negotiating block sizes

enum class Command : uint16_t {
  Read = 0,
  Write = 1,
  Disconnect = 2,
  Flush = 3,
  Trim = 4,
  Cache = 5,
  WriteZeroes = 6,
  BlockStatus = 7,
};

enum CommandFlag : uint16_t {
  kCommandFua = 1 << 0,
  kCommandNoHole = 1 << 1,
  kCommandDf = 1 << 2,
  kCommandReqOne = 1 << 3,
  kCommandFastZero = 1 << 4,
  kCommandPayloadLength = 1 << 5,  // extended headers only: `length` is the size of a payload
};

inline constexpr uint16_t kChunkDone = 1 << 0;

enum class ChunkType : uint16_t {
  None = 0,
  OffsetData = 1,
  OffsetHole = 2,
  BlockStatus = 5,
  BlockStatusExt = 6,
  Error = 0x8001
};

// The errors that the protocol knows; numbers as in proto.md "Error values", which happen to be Linux's.
enum class WireError : uint32_t {
  None = 0,
  Permission = 1,
  Io = 5,
  NoMemory = 12,
  Invalid = 22,
  NoSpace = 28,
  Overflow = 75,
  NotSupported = 95,
  Shutdown = 108,
};

std::string_view to_string(WireError error) noexcept;

// What a client is told about an errno of the data path. NotSupported is allowed only as the answer to
// WRITE_ZEROES with FAST_ZERO ("fails at once, content unchanged"); elsewhere it becomes Io, because a client must not
// conclude from it that nothing was touched.
WireError to_wire(Errno error, bool fast_zero) noexcept;

inline constexpr uint32_t kStateHole = 1 << 0;  // base:allocation
inline constexpr uint32_t kStateZero = 1 << 1;

// How requests and replies look, from what was agreed. Extended: 64-bit lengths, and every reply is made of chunks.
enum class HeaderStyle : uint8_t { Simple, Structured, Extended };

struct Request {
  uint16_t flags = 0;
  uint16_t command = 0;   // a Command, or anything the client made up
  uint64_t cookie = 0;    // the client's; returned as it came
  uint64_t offset = 0;    // bytes
  uint64_t length = 0;    // bytes; of the payload if there is one
  bool payload = false;   // `length` bytes follow the header
  uint32_t contexts = 0;  // BLOCK_STATUS: bit id-1 for each context whose answer is wanted; 0: all that were agreed
};

constexpr size_t request_size(HeaderStyle style) {
  return style == HeaderStyle::Extended ? kExtendedRequestSize : kRequestSize;
}
// From exactly request_size() bytes; nullopt on a wrong magic, after which the stream cannot be trusted.
std::optional<Request> decode_request(const uint8_t* header, HeaderStyle style) noexcept;

// Fixed-size headers, written to `out`, which has room for the size in the name.
void encode_simple_reply(uint8_t* out, uint64_t cookie, WireError error) noexcept;
// Structured or Extended; by default a chunk with DONE, the only or the last one of its reply. Returns the size of the
// header.
size_t encode_chunk_header(uint8_t* out, HeaderStyle style, ChunkType type, const Request& request,
                           uint64_t payload_size, uint16_t flags = kChunkDone) noexcept;

constexpr size_t read_header_size(HeaderStyle style) {
  return style == HeaderStyle::Simple       ? kSimpleReplySize
         : style == HeaderStyle::Structured ? kChunkHeaderSize + 8
                                            : kExtendedReplySize + 8;
}
// What stands before the data of a successful read: the caller has all of it already, so no error can follow.
void encode_read_header(uint8_t* out, HeaderStyle style, const Request& request) noexcept;
// The reply to a successful request without data. Returns its size: at most kExtendedReplySize.
size_t encode_success(uint8_t* out, HeaderStyle style, const Request& request) noexcept;

inline void put_be16(uint8_t* out, uint16_t value) noexcept {
  out[0] = static_cast<uint8_t>(value >> 8);
  out[1] = static_cast<uint8_t>(value);
}
inline void put_be32(uint8_t* out, uint32_t value) noexcept {
  put_be16(out, static_cast<uint16_t>(value >> 16));
  put_be16(out + 2, static_cast<uint16_t>(value));
}
inline void put_be64(uint8_t* out, uint64_t value) noexcept {
  put_be32(out, static_cast<uint32_t>(value >> 32));
  put_be32(out + 4, static_cast<uint32_t>(value));
}

}  // namespace vmferry::nbd
