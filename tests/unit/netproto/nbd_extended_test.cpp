// SPDX-License-Identifier: Apache-2.0
//
// Extended headers (proto.md, extension EXTENDED_HEADERS): 64-bit lengths, payload flag, limited block status.
#include <gtest/gtest.h>

#include "netproto/nbd/handshake.h"
#include "netproto/nbd/transmission.h"
#include "tests/unit/netproto/nbd_test_client.h"

namespace vmferry::nbd {
namespace {

using namespace nbd_test;
using Event = RequestParser::Event;

class OneExport final : public ExportCatalog {
 public:
  std::optional<ExportInfo> find_export(std::string_view) const override { return info_; }
  std::vector<ExportInfo> list_exports() const override { return {info_}; }

 private:
  ExportInfo info_{.name = "vda", .size = 8ULL << 40};
};

class NbdExtended : public ::testing::Test {
 protected:
  void SetUp() override { EXPECT_TRUE(say(client_flags(3)).empty()); }
  std::vector<OptionAnswer> say(const Bytes& bytes) {
    Bytes out;
    handshake_.feed(bytes, out);
    return option_answers(out).value_or(std::vector<OptionAnswer>{});
  }
  uint32_t answer_to(const Bytes& bytes) {
    const auto answers = say(bytes);
    return answers.empty() ? 0 : answers.back().type;
  }
  OneExport catalog_;
  Handshake handshake_{catalog_, HandshakeLimits{}};
};

constexpr RequestRules kRules{
    .size = 8ULL << 40, .structured_replies = true, .extended_headers = true, .base_allocation = true};

TEST_F(NbdExtended, TakesPrecedenceOverStructuredRepliesAndImpliesThem) {
  // A client that asks for both in either order must end with the same headers as the server.
  EXPECT_EQ(answer_to(option(kOptStructuredReply)), kRepAck);
  EXPECT_EQ(answer_to(option(kOptExtendedHeaders)), kRepAck);
  EXPECT_EQ(answer_to(option(kOptStructuredReply)), kRepErrExtHeaderReqd);
  EXPECT_EQ(answer_to(option(kOptExtendedHeaders)), kRepErrInvalid) << "once is enough";
  EXPECT_EQ(answer_to(option(kOptSetMeta, meta_data("vda", {"base:allocation"}))), kRepAck);
  EXPECT_EQ(answer_to(option(kOptGo, go_data("vda"))), kRepAck);
  EXPECT_TRUE(handshake_.session().extended_headers);
  EXPECT_TRUE(handshake_.session().structured_replies);
  EXPECT_TRUE(handshake_.session().base_allocation);
}

TEST_F(NbdExtended, OptionWithDataIsRefusedAndChangesNothing) {
  EXPECT_EQ(answer_to(option(kOptExtendedHeaders, "x")), kRepErrInvalid);
  EXPECT_EQ(answer_to(option(kOptGo, go_data("vda"))), kRepAck);
  EXPECT_FALSE(handshake_.session().extended_headers);
}

TEST_F(NbdExtended, ExportNameCannotFollowIt) {
  // Its answer has no place for an error, and the specification forbids it.
  EXPECT_EQ(answer_to(option(kOptExtendedHeaders)), kRepAck);
  say(option(kOptExportName, "vda"));
  EXPECT_EQ(handshake_.state(), Handshake::State::Rejected);
}

TEST_F(NbdExtended, LimitedStatusIsAdvertisedWithItOnly) {
  const ExportInfo info{.size = 1};
  EXPECT_EQ(transmission_flags(info, HeaderStyle::Extended) & (1 << 12), 1 << 12);
  EXPECT_EQ(transmission_flags(info, HeaderStyle::Structured) & (1 << 12), 0);
}

TEST(NbdExtendedParser, DecodesEveryFieldAtEveryCut) {
  // Golden bytes, written by hand: a zero write of 6 GiB, then a write of two bytes.
  const Bytes bytes = {0x21, 0xe4, 0x1c, 0x71, 0, 0x10, 0, 6, 1, 2, 3, 4,    5, 6,    7,   8,    0,
                       0,    1,    0,    0,    0, 2,    0, 0, 0, 0, 1, 0x80, 0, 0,    0,   0x21, 0xe4,
                       0x1c, 0x71, 0,    0x20, 0, 1,    0, 0, 0, 0, 0, 0,    0, 9,    0,   0,    0,
                       0,    0,    0,    0,    0, 0,    0, 0, 0, 0, 0, 0,    2, 0xaa, 0xbb};
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    RequestParser parser;
    parser.set_style(HeaderStyle::Extended);
    std::vector<Request> seen;
    Bytes received(2);
    for (ByteSpan part : {ByteSpan(bytes).first(cut), ByteSpan(bytes).subspan(cut)}) {
      for (Event event = parser.next(part); event != Event::NeedBytes; event = parser.next(part)) {
        ASSERT_NE(event, Event::Broken);
        if (event == Event::PayloadDone) continue;
        seen.push_back(parser.request());
        if (parser.request().payload) parser.take_payload(received.data(), parser.request().length);
      }
    }
    ASSERT_EQ(seen.size(), 2U) << cut;
    EXPECT_EQ(seen[0].flags, kFlagFastZero);
    EXPECT_EQ(seen[0].command, kCmdWriteZeroes);
    EXPECT_EQ(seen[0].cookie, 0x0102030405060708U);
    EXPECT_EQ(seen[0].offset, 0x0000010000000200U);
    EXPECT_EQ(seen[0].length, 6ULL << 30);
    EXPECT_FALSE(seen[0].payload);
    EXPECT_TRUE(seen[1].payload);
    EXPECT_EQ(received, (Bytes{0xaa, 0xbb})) << cut;
  }
}

TEST(NbdExtendedParser, CompactMagicBreaksTheStream) {
  // The two header sizes must never be mixed up.
  RequestParser parser;
  parser.set_style(HeaderStyle::Extended);
  const Bytes bytes = joined({request(kCmdRead, 0, 1, 0, 1), Bytes(4, 0)});
  ByteSpan rest = bytes;
  EXPECT_EQ(parser.next(rest), Event::Broken);
}

TEST(NbdExtendedRequest, LengthsBeyond32BitsAreForEffectsNotForData) {
  const uint64_t length = 5ULL << 30;
  EXPECT_EQ(check_request({0, kCmdWriteZeroes, 1, 0, length}, kRules), WireError::None);
  EXPECT_EQ(check_request({0, kCmdTrim, 1, 0, length}, kRules), WireError::None);
  EXPECT_EQ(check_request({0, kCmdCache, 1, 0, length}, kRules), WireError::None);
  EXPECT_EQ(check_request({0, kCmdBlockStatus, 1, 0, length}, kRules), WireError::None);
  EXPECT_EQ(check_request({0, kCmdRead, 1, 0, length}, kRules), WireError::Invalid);
  EXPECT_EQ(check_request({kFlagPayload, kCmdWrite, 1, 0, length, true}, kRules), WireError::Invalid);
  EXPECT_EQ(check_request({0, kCmdTrim, 1, 1, UINT64_MAX}, kRules), WireError::Invalid);
  EXPECT_EQ(check_request({0, kCmdWriteZeroes, 1, 1, (8ULL << 40)}, kRules), WireError::NoSpace);
  EXPECT_EQ(check_request({kFlagPayload, kCmdWrite, 1, 0, 4096, true}, kRules), WireError::None);
  EXPECT_EQ(check_request({kFlagPayload, kCmdTrim, 1, 0, 4096, true}, kRules), WireError::Invalid)
      << "a payload that the command does not have";
}

TEST(NbdExtendedReply, GoldenBytes) {
  const Request request{0, kCmdRead, 0x0102030405060708, 0x1000, 512};
  const Bytes cookie_and_offset = {1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0};
  uint8_t done[kExtendedReplySize];
  EXPECT_EQ(encode_success(done, HeaderStyle::Extended, request), sizeof done);
  EXPECT_EQ(Bytes(done, done + sizeof done),
            joined({Bytes{0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 0}, cookie_and_offset, Bytes(8, 0)}));
  uint8_t read[kReadHeaderSizeMax];
  ASSERT_EQ(read_header_size(HeaderStyle::Extended), sizeof read);
  encode_read_header(read, HeaderStyle::Extended, request);
  EXPECT_EQ(Bytes(read, read + sizeof read), joined({Bytes{0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 1}, cookie_and_offset,
                                                     Bytes{0, 0, 0, 0, 0, 0, 2, 8}, Bytes{0, 0, 0, 0, 0, 0, 0x10, 0}}));
  Bytes status;
  const StatusDescriptor descriptors[] = {{5ULL << 30, kStateHole | kStateZero}};
  append_block_status(status, request, descriptors, HeaderStyle::Extended);
  EXPECT_EQ(status,
            joined({Bytes{0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6}, cookie_and_offset, Bytes{0, 0, 0, 0, 0, 0, 0, 24},
                    Bytes{0, 0, 0, 1, 0, 0, 0, 1}, Bytes{0, 0, 0, 1, 0x40, 0, 0, 0}, Bytes{0, 0, 0, 0, 0, 0, 0, 3}}));
  Bytes error;
  append_error(error, {0, kCmdWrite, 1, 0, 1}, WireError::Io, HeaderStyle::Extended);
  const auto reply = take_reply(error);
  ASSERT_TRUE(reply.has_value());
  EXPECT_TRUE(error.empty());
  EXPECT_EQ(reply->error, kEio) << "also for commands that otherwise get simple replies";
}

TEST(NbdExtendedStatus, PayloadNamesLengthAndContexts) {
  const auto payload = [](uint64_t length, const std::vector<uint32_t>& contexts) {
    Bytes out;
    ByteWriter writer(out);
    writer.be64(length);
    for (const uint32_t context : contexts) writer.be32(context);
    return out;
  };
  const Request asked{kFlagPayload | kFlagReqOne, kCmdBlockStatus, 1, 4096, 12, true};
  Request request = asked;
  ASSERT_EQ(resolve_limited_status(request, payload(5ULL << 30, {kBaseAllocationId}), kRules), WireError::None);
  EXPECT_EQ(request.length, 5ULL << 30);
  EXPECT_EQ(request.flags, kFlagReqOne);
  EXPECT_FALSE(request.payload);
  EXPECT_EQ(check_request(request, kRules), WireError::None);

  RequestRules without = kRules;
  without.base_allocation = false;
  request = asked;
  EXPECT_EQ(resolve_limited_status(request, payload(4096, {kBaseAllocationId}), without), WireError::Invalid);
  const Bytes wrong[] = {payload(4096, {}),
                         payload(4096, {2}),
                         payload(4096, {1, 1}),
                         payload(4096, {1, 2}),
                         joined({payload(4096, {1}), Bytes{0}}),
                         Bytes{},
                         Bytes(7, 0)};
  for (const Bytes& bytes : wrong) {
    request = asked;
    EXPECT_EQ(resolve_limited_status(request, bytes, kRules), WireError::Invalid) << bytes.size();
  }
}

}  // namespace
}  // namespace vmferry::nbd
