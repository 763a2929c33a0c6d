// SPDX-License-Identifier: Apache-2.0
//
// Builds what an NBD client sends and takes apart what a server answers, from proto.md and independent of the codec
// under test. Threads: none.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/base/bytes.h"

namespace vmferry::nbd_test {

inline Bytes client_flags(uint32_t flags) {
  Bytes out;
  ByteWriter(out).be32(flags);
  return out;
}

inline Bytes option(uint32_t number, ByteSpan data = {}) {
  Bytes out;
  ByteWriter(out).be64(0x49484156454f5054).be32(number).be32(static_cast<uint32_t>(data.size())).raw(data);
  return out;
}
inline Bytes option(uint32_t number, std::string_view data) {
  return option(number, as_bytes(data));
}

// Data of INFO and GO.
inline Bytes go_data(std::string_view name, const std::vector<uint16_t>& requests = {}) {
  Bytes out;
  ByteWriter writer(out);
  writer.be32(static_cast<uint32_t>(name.size())).raw(as_bytes(name)).be16(static_cast<uint16_t>(requests.size()));
  for (const uint16_t request : requests) writer.be16(request);
  return out;
}

// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
inline Bytes meta_data(std::string_view name, const std::vector<std::string>& queries) {
  Bytes out;
  ByteWriter writer(out);
  writer.be32(static_cast<uint32_t>(name.size())).raw(as_bytes(name)).be32(static_cast<uint32_t>(queries.size()));
  for (const std::string& query : queries) writer.be32(static_cast<uint32_t>(query.size())).raw(as_bytes(query));
  return out;
}

inline Bytes request(uint16_t command, uint16_t flags, uint64_t cookie, uint64_t offset, uint32_t length,
                     ByteSpan payload = {}) {
  Bytes out;
  ByteWriter(out).be32(0x25609513).be16(flags).be16(command).be64(cookie).be64(offset).be32(length).raw(payload);
  return out;
}

inline Bytes extended_request(uint16_t command, uint16_t flags, uint64_t cookie, uint64_t offset, uint64_t length,
                              ByteSpan payload = {}) {
  Bytes out;
  ByteWriter(out).be32(0x21e41c71).be16(flags).be16(command).be64(cookie).be64(offset).be64(length).raw(payload);
  return out;
}

inline Bytes joined(std::initializer_list<Bytes> parts) {
  Bytes out;
  for (const Bytes& part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

struct OptionAnswer {
  uint32_t option = 0;
  uint32_t type = 0;
  Bytes data;
};

// All option replies in `bytes`; nullopt when they are malformed or cut.
inline std::optional<std::vector<OptionAnswer>> option_answers(ByteSpan bytes) {
  std::vector<OptionAnswer> answers;
  ByteReader in(bytes);
  while (in.ok() && in.remaining() > 0) {
    if (in.be64() != 0x3e889045565a9) return std::nullopt;
    OptionAnswer answer;
    answer.option = in.be32();
    answer.type = in.be32();
    const uint32_t size = in.be32();
    const ByteSpan data = in.take(size);
    answer.data.assign(data.begin(), data.end());
    answers.push_back(std::move(answer));
  }
  if (!in.done()) return std::nullopt;
  return answers;
}

// One reply of the transmission phase: a simple one, or one chunk.
struct Reply {
  bool structured = false;
  uint16_t flags = 0;  // chunks
  uint16_t type = 0;   // chunks
  uint32_t error = 0;  // simple replies and error chunks
  uint64_t cookie = 0;
  Bytes data;  // payload of a chunk; of a simple reply: `read_size` bytes when it has no error
};

// Takes one reply from the front of `bytes`; nullopt when it is not complete. `read_size` says how much data follows a
// simple reply without error.
inline std::optional<Reply> take_reply(Bytes& bytes, size_t read_size = 0) {
  ByteReader in(bytes);
  Reply reply;
  const uint32_t magic = in.be32();
  if (magic == 0x67446698) {
    reply.error = in.be32();
    reply.cookie = in.be64();
    if (reply.error == 0) {
      const ByteSpan data = in.take(read_size);
      reply.data.assign(data.begin(), data.end());
    }
  } else if (magic == 0x668e33ef) {
    reply.structured = true;
    reply.flags = in.be16();
    reply.type = in.be16();
    reply.cookie = in.be64();
    const uint32_t size = in.be32();
    const ByteSpan data = in.take(size);
    reply.data.assign(data.begin(), data.end());
    if ((reply.type & 0x8000) != 0 && in.ok()) reply.error = ByteReader(reply.data).be32();
  } else if (magic == 0x6e8a278c) {
    reply.structured = true;
    reply.flags = in.be16();
    reply.type = in.be16();
    reply.cookie = in.be64();
    in.be64();  // the request's offset
    const uint64_t size = in.be64();
    const ByteSpan data = in.take(static_cast<size_t>(size));
    reply.data.assign(data.begin(), data.end());
    if ((reply.type & 0x8000) != 0 && in.ok()) reply.error = ByteReader(reply.data).be32();
  } else {
    return std::nullopt;
  }
  if (!in.ok()) return std::nullopt;
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(in.position()));
  return reply;
}

// Numbers of proto.md, written out again on purpose.
inline constexpr uint32_t kOptExportName = 1, kOptAbort = 2, kOptList = 3, kOptStartTls = 5, kOptInfo = 6, kOptGo = 7,
                          kOptStructuredReply = 8, kOptListMeta = 9, kOptSetMeta = 10, kOptExtendedHeaders = 11;
inline constexpr uint32_t kRepAck = 1, kRepServer = 2, kRepInfo = 3, kRepMeta = 4, kRepErrUnsup = 0x80000001,
                          kRepErrInvalid = 0x80000003, kRepErrUnknown = 0x80000006, kRepErrShutdown = 0x80000007,
                          kRepErrTooBig = 0x80000009, kRepErrExtHeaderReqd = 0x8000000a;
inline constexpr uint16_t kCmdRead = 0, kCmdWrite = 1, kCmdDisc = 2, kCmdFlush = 3, kCmdTrim = 4, kCmdCache = 5,
                          kCmdWriteZeroes = 6, kCmdBlockStatus = 7;
inline constexpr uint16_t kFlagFua = 1, kFlagNoHole = 2, kFlagDf = 4, kFlagReqOne = 8, kFlagFastZero = 16,
                          kFlagPayload = 32;
inline constexpr uint32_t kEperm = 1, kEio = 5, kEnomem = 12, kEinval = 22, kEnospc = 28, kEoverflow = 75,
                          kEnotsup = 95, kEshutdown = 108;

}  // namespace vmferry::nbd_test
