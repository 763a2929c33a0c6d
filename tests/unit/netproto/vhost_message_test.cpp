// SPDX-License-Identifier: Apache-2.0
//
// vhost-user messages: golden bytes, and everything that must be refused.
#include "netproto/vhost/message.h"

#include <gtest/gtest.h>

namespace vmferry::vhost {
namespace {

constexpr Request kAll[] = {Request::GetFeatures,
                            Request::SetFeatures,
                            Request::SetOwner,
                            Request::ResetOwner,
                            Request::SetMemTable,
                            Request::SetLogBase,
                            Request::SetLogFd,
                            Request::SetVringNum,
                            Request::SetVringAddr,
                            Request::SetVringBase,
                            Request::GetVringBase,
                            Request::SetVringKick,
                            Request::SetVringCall,
                            Request::SetVringErr,
                            Request::GetProtocolFeatures,
                            Request::SetProtocolFeatures,
                            Request::GetQueueNum,
                            Request::SetVringEnable,
                            Request::SetBackendReqFd,
                            Request::GetConfig,
                            Request::SetConfig,
                            Request::GetInflightFd,
                            Request::SetInflightFd,
                            Request::ResetDevice,
                            Request::GetMaxMemSlots,
                            Request::AddMemReg,
                            Request::RemMemReg,
                            Request::SetStatus,
                            Request::GetStatus};

Body body_for(Request request) {
  switch (request) {
    case Request::SetFeatures:
    case Request::SetProtocolFeatures:
    case Request::SetStatus:
      return NumberBody{0x1122334455667788};
    case Request::SetVringNum:
    case Request::SetVringBase:
    case Request::GetVringBase:
    case Request::SetVringEnable:
      return VringState{1, 128};
    case Request::SetVringAddr:
      return VringAddress{1, kVringFlagLog, 0x1000, 0x3000, 0x2000, 0x9000};
    case Request::SetVringKick:
    case Request::SetVringCall:
    case Request::SetVringErr:
      return VringFd{2, true};
    case Request::SetMemTable:
      return MemoryTable{{{0, 4096, 0x7000, 0}, {8192, 4096, 0x9000, 4096}}};
    case Request::AddMemReg:
    case Request::RemMemReg:
      return MemoryRegion{4096, 8192, 0x7000, 0};
    case Request::SetLogBase:
      return LogArea{4096, 0};
    case Request::GetConfig:
    case Request::SetConfig:
      return ConfigAccess{32, 1, 0, {1}};
    case Request::GetInflightFd:
    case Request::SetInflightFd:
      return Inflight{8192, 0, 4, 128};
    default:
      return {};
  }
}

size_t fds_for(Request request) {
  switch (request) {
    case Request::SetMemTable:
      return 2;
    case Request::SetLogBase:
    case Request::SetLogFd:
    case Request::SetVringKick:
    case Request::SetVringCall:
    case Request::SetVringErr:
    case Request::SetBackendReqFd:
    case Request::SetInflightFd:
    case Request::AddMemReg:
      return 1;
    default:
      return 0;
  }
}

Result<Message> decode_all(const Bytes& bytes, size_t fds) {
  const auto header = decode_header(ByteSpan(bytes).first(kHeaderSize));
  if (!header) return tl::unexpected(header.error());
  return decode(*header, ByteSpan(bytes).subspan(kHeaderSize), fds);
}

Bytes encoded(Request request, const Body& body, uint32_t flags = 0) {
  Bytes out;
  encode(out, request, flags, body);
  return out;
}

// Another byte order or a field at another place would work with ourselves and with no front-end.
TEST(VhostMessage, GoldenBytes) {
  EXPECT_EQ(encoded(Request::SetVringNum, VringState{1, 128}, kFlagNeedReply),
            (Bytes{8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 128, 0, 0, 0}));
  EXPECT_EQ(encoded(Request::SetVringKick, VringFd{3, false}),
            (Bytes{12, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(encoded(Request::SetVringAddr, VringAddress{1, 1, 0x10, 0x30, 0x20, 0x40}),
            (Bytes{9, 0, 0,    0, 1, 0, 0, 0, 40, 0, 0,    0, 1, 0, 0, 0, 1, 0, 0,    0, 0x10, 0, 0, 0, 0, 0,
                   0, 0, 0x30, 0, 0, 0, 0, 0, 0,  0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0,    0, 0, 0, 0, 0}));
  EXPECT_EQ(encoded(Request::GetInflightFd, Inflight{0x2000, 0, 2, 0x80}, kFlagReply),
            (Bytes{31, 0, 0, 0, 5, 0, 0, 0, 24, 0, 0, 0, 0,    0x20, 0, 0, 0, 0,
                   0,  0, 0, 0, 0, 0, 0, 0, 0,  0, 2, 0, 0x80, 0,    0, 0, 0, 0}));
  Bytes reply;
  encode_number_reply(reply, Request::GetQueueNum, 4);
  EXPECT_EQ(reply, (Bytes{17, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0}));
}

// A request that is decoded into another one would act on the wrong ring or memory.
TEST(VhostMessage, EveryRequestSurvivesEncodingAndDecoding) {
  for (const Request request : kAll) {
    const Bytes bytes = encoded(request, body_for(request), kFlagNeedReply);
    const auto message = decode_all(bytes, fds_for(request));
    ASSERT_TRUE(message) << to_string(request) << ": " << message.error().text;
    EXPECT_EQ(message->request, request);
    EXPECT_TRUE(message->need_reply);
    EXPECT_EQ(encoded(request, message->body, kFlagNeedReply), bytes) << to_string(request);
  }
}

// A body shorter than its fields would be read past its end; a longer one means that the two sides disagree.
TEST(VhostMessage, EveryOtherPayloadSizeIsRefused) {
  for (const Request request : kAll) {
    const Bytes good = encoded(request, body_for(request));
    for (size_t size = 0; size <= kPayloadSizeMax; ++size) {
      Bytes bytes(good.begin(), good.begin() + kHeaderSize);
      bytes[8] = static_cast<uint8_t>(size);
      bytes[9] = static_cast<uint8_t>(size >> 8);
      bytes.resize(kHeaderSize + size);
      std::copy_n(good.begin() + kHeaderSize, std::min(size, good.size() - kHeaderSize), bytes.begin() + kHeaderSize);
      const size_t right = good.size() - kHeaderSize;
      const bool table = request == Request::SetMemTable && size >= right;  // the rest of a fixed array is ignored
      const bool inflight = std::holds_alternative<Inflight>(body_for(request)) && size == 20;  // without padding
      EXPECT_EQ(decode_all(bytes, fds_for(request)).has_value(), size == right || table || inflight)
          << to_string(request) << " with " << size << " bytes";
    }
  }
}

// A descriptor too many would leak; one too few would be taken from another message.
TEST(VhostMessage, EveryOtherNumberOfDescriptorsIsRefused) {
  for (const Request request : kAll) {
    const Bytes bytes = encoded(request, body_for(request));
    for (size_t fds = 0; fds <= kDescriptorsMax; ++fds) {
      const bool removal = request == Request::RemMemReg && fds == 1;
      EXPECT_EQ(decode_all(bytes, fds).has_value(), fds == fds_for(request) || removal)
          << to_string(request) << " with " << fds << " descriptors";
    }
  }
  EXPECT_TRUE(decode_all(encoded(Request::SetVringKick, VringFd{0, false}), 0)) << "polling comes without descriptor";
  EXPECT_FALSE(decode_all(encoded(Request::SetVringKick, VringFd{0, false}), 1));
}

TEST(VhostMessage, BadHeadersAreRefused) {
  // A wrong version or length taken at face value loses the message boundary for good.
  const struct {
    const char* name;
    uint32_t flags;
    uint32_t size;
    bool good;
  } rows[] = {
      {"plain", 1, 0, true},
      {"need reply", 9, 8, true},
      {"version 0", 0, 0, false},
      {"version 2", 2, 0, false},
      {"unknown flag", 17, 0, false},
      {"largest", 1, kPayloadSizeMax, true},
      {"one more", 1, kPayloadSizeMax + 1, false},
      {"huge", 1, UINT32_MAX, false},
  };
  for (const auto& row : rows) {
    Bytes bytes;
    ByteWriter(bytes).le32(1).le32(row.flags).le32(row.size);
    EXPECT_EQ(decode_header(bytes).has_value(), row.good) << row.name;
  }
  EXPECT_FALSE(decode_header(Bytes(11)));
  const Bytes reply = encoded(Request::GetFeatures, {}, kFlagReply);
  EXPECT_FALSE(decode_all(reply, 0)) << "a front-end does not answer on this socket";
  Bytes unknown;
  append_header(unknown, 999, 0, 0);
  EXPECT_EQ(decode_all(unknown, 0).error().kind, ErrorKind::NotFound);
}

TEST(VhostMessage, BadBodiesAreRefused) {
  // Sums that wrap around would pass every later check of "inside".
  const struct {
    const char* name;
    Request request;
    Body body;
    size_t fds;
  } rows[] = {
      {"empty region", Request::SetMemTable, MemoryTable{{{0, 0, 0, 0}}}, 1},
      {"guest address wraps", Request::SetMemTable, MemoryTable{{{UINT64_MAX, 2, 0, 0}}}, 1},
      {"user address wraps", Request::AddMemReg, MemoryRegion{0, 2, UINT64_MAX, 0}, 1},
      {"offset wraps", Request::AddMemReg, MemoryRegion{0, 2, 0, UINT64_MAX}, 1},
      {"log wraps", Request::SetLogBase, LogArea{2, UINT64_MAX}, 1},
      {"inflight wraps", Request::SetInflightFd, Inflight{2, UINT64_MAX, 1, 128}, 1},
      {"config past the space", Request::GetConfig, ConfigAccess{kConfigSizeMax, 1, 0, {0}}, 0},
      {"config offset wraps", Request::GetConfig, ConfigAccess{UINT32_MAX, 1, 0, {0}}, 0},
      {"config flags", Request::SetConfig, ConfigAccess{32, 1, 2, {0}}, 0},
      {"ring flags", Request::SetVringAddr, VringAddress{0, 2, 0, 0, 0, 0}, 0},
  };
  for (const auto& row : rows) EXPECT_FALSE(decode_all(encoded(row.request, row.body), row.fds)) << row.name;
  MemoryTable nine;
  nine.regions.resize(kRegionsMax + 1, MemoryRegion{0, 1, 0, 0});
  Bytes bytes;
  encode(bytes, Request::SetMemTable, 0, nine);
  EXPECT_FALSE(decode_all(bytes, kRegionsMax + 1)) << "more regions than the specification allows";
}

// A front-end that takes any answer for its own would act on another request's number.
TEST(VhostMessage, RepliesAreMatchedToTheirRequest) {
  Bytes bytes;
  encode_number_reply(bytes, Request::GetFeatures, 7);
  const auto header = decode_header(ByteSpan(bytes).first(kHeaderSize));
  const ByteSpan payload = ByteSpan(bytes).subspan(kHeaderSize);
  const auto body = decode_reply(*header, payload, Request::GetFeatures);
  ASSERT_TRUE(body);
  EXPECT_EQ(std::get<NumberBody>(*body).value, 7U);
  EXPECT_FALSE(decode_reply(*header, payload, Request::GetQueueNum));
  EXPECT_FALSE(decode_reply(*header, payload.first(7), Request::GetFeatures));
}

}  // namespace
}  // namespace vmferry::vhost
