// SPDX-License-Identifier: Apache-2.0
//
// Requests and replies of the transmission phase.
#include "netproto/nbd/transmission.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "tests/unit/netproto/nbd_test_client.h"

namespace vmferry::nbd {
namespace {

using namespace nbd_test;
using Event = RequestParser::Event;

constexpr uint64_t kSize = 1 << 20;
constexpr RequestRules kRules{.size = kSize, .structured_replies = true, .base_allocation = true};
constexpr RequestRules kSimpleRules{.size = kSize};
constexpr RequestRules kReadOnlyRules{.size = kSize, .read_only = true, .structured_replies = true};
constexpr RequestRules kAligned{.size = kSize, .structured_replies = true, .block_size_min = 512};
constexpr RequestRules kSmallPayload{.size = kSize, .structured_replies = true, .payload_size_max = 65536};

// A request that passes here reaches the store unchecked.
TEST(NbdRequest, CheckAnswersEachKindOfRequest) {
  const struct {
    const char* name;
    Request request;
    RequestRules rules;
    WireError expected;
  } rows[] = {
      {"read", {0, kCmdRead, 1, 0, 4096}, kRules, WireError::None},
      {"last byte", {0, kCmdRead, 1, kSize - 1, 1}, kRules, WireError::None},
      {"one past the end", {0, kCmdRead, 1, kSize - 1, 2}, kRules, WireError::Invalid},
      {"offset at the end", {0, kCmdRead, 1, kSize, 1}, kRules, WireError::Invalid},
      {"offset overflows", {0, kCmdRead, 1, UINT64_MAX, 2}, kRules, WireError::Invalid},
      {"read of nothing", {0, kCmdRead, 1, 0, 0}, kRules, WireError::Invalid},
      {"read with FUA", {kFlagFua, kCmdRead, 1, 0, 1}, kRules, WireError::None},
      {"read with DF", {kFlagDf, kCmdRead, 1, 0, 65536}, kSmallPayload, WireError::None},
      {"DF without structured replies", {kFlagDf, kCmdRead, 1, 0, 1}, kSimpleRules, WireError::Invalid},
      {"DF over the limit", {kFlagDf, kCmdRead, 1, 0, 65537}, kSmallPayload, WireError::Overflow},
      {"read over the limit", {0, kCmdRead, 1, 0, 65537}, kSmallPayload, WireError::Invalid},
      {"read over 2 GiB", {0, kCmdRead, 1, 0, 0x80000001}, kRules, WireError::Invalid},
      {"read of the largest length", {0, kCmdRead, 1, 0, UINT32_MAX}, kRules, WireError::Invalid},
      {"write over 2 GiB", {0, kCmdWrite, 1, 0, 0x80000001}, kRules, WireError::Invalid},
      {"trim over 2 GiB", {0, kCmdTrim, 1, 0, 0x80000001}, kRules, WireError::Invalid},
      {"block status over 2 GiB", {0, kCmdBlockStatus, 1, 0, 0x80000001}, kRules, WireError::Invalid},
      {"read with a flag of another command", {kFlagNoHole, kCmdRead, 1, 0, 1}, kRules, WireError::Invalid},
      {"write", {0, kCmdWrite, 1, 0, 4096}, kRules, WireError::None},
      {"write with FUA", {kFlagFua, kCmdWrite, 1, 0, 4096}, kRules, WireError::None},
      {"write with DF", {kFlagDf, kCmdWrite, 1, 0, 4096}, kRules, WireError::Invalid},
      {"write past the end", {0, kCmdWrite, 1, kSize - 4095, 4096}, kRules, WireError::NoSpace},
      {"write over the limit", {0, kCmdWrite, 1, 0, 65537}, kSmallPayload, WireError::Invalid},
      {"write, read-only", {0, kCmdWrite, 1, 0, 1}, kReadOnlyRules, WireError::Permission},
      {"trim, read-only", {0, kCmdTrim, 1, 0, 1}, kReadOnlyRules, WireError::Permission},
      {"zeroes, read-only", {0, kCmdWriteZeroes, 1, 0, 1}, kReadOnlyRules, WireError::Permission},
      {"fast zeroes that were not advertised",
       {kFlagFastZero, kCmdWriteZeroes, 1, 0, 1},
       kReadOnlyRules,
       WireError::Permission},
      {"flush, read-only", {0, kCmdFlush, 1, 0, 0}, kReadOnlyRules, WireError::None},
      {"disconnect with flags", {0xffff, kCmdDisc, 1, 9, 9}, kRules, WireError::None},
      {"flush", {0, kCmdFlush, 1, 0, 0}, kRules, WireError::None},
      {"flush with FUA", {kFlagFua, kCmdFlush, 1, 0, 0}, kRules, WireError::None},
      {"flush with a length", {0, kCmdFlush, 1, 0, 1}, kRules, WireError::Invalid},
      {"flush with an offset", {0, kCmdFlush, 1, 1, 0}, kRules, WireError::Invalid},
      {"trim", {0, kCmdTrim, 1, 0, kSize}, kRules, WireError::None},
      {"trim with FUA", {kFlagFua, kCmdTrim, 1, 0, 1}, kRules, WireError::None},
      {"trim past the end", {0, kCmdTrim, 1, 1, kSize}, kRules, WireError::Invalid},
      {"trim with NO_HOLE", {kFlagNoHole, kCmdTrim, 1, 0, 1}, kRules, WireError::Invalid},
      {"cache", {0, kCmdCache, 1, 0, kSize}, kRules, WireError::None},
      {"cache with FUA", {kFlagFua, kCmdCache, 1, 0, 1}, kRules, WireError::None},
      {"cache past the end", {0, kCmdCache, 1, kSize, 1}, kRules, WireError::Invalid},
      {"zeroes", {0, kCmdWriteZeroes, 1, 0, kSize}, kRules, WireError::None},
      {"zeroes with every flag",
       {kFlagFua | kFlagNoHole | kFlagFastZero, kCmdWriteZeroes, 1, 0, 1},
       kRules,
       WireError::None},
      {"zeroes over the payload limit", {0, kCmdWriteZeroes, 1, 0, kSize}, kSmallPayload, WireError::None},
      {"zeroes past the end", {0, kCmdWriteZeroes, 1, 0, kSize + 1}, kRules, WireError::NoSpace},
      {"zeroes with DF", {kFlagDf, kCmdWriteZeroes, 1, 0, 1}, kRules, WireError::Invalid},
      {"block status", {0, kCmdBlockStatus, 1, 0, kSize}, kRules, WireError::None},
      {"block status, one extent", {kFlagReqOne | kFlagFua, kCmdBlockStatus, 1, 0, 1}, kRules, WireError::None},
      {"block status without a context", {0, kCmdBlockStatus, 1, 0, 1}, kAligned, WireError::Invalid},
      {"block status past the end", {0, kCmdBlockStatus, 1, 0, kSize + 1}, kRules, WireError::Invalid},
      {"block status of nothing", {0, kCmdBlockStatus, 1, 0, 0}, kRules, WireError::Invalid},
      {"aligned", {0, kCmdRead, 1, 512, 1024}, kAligned, WireError::None},
      {"unaligned offset", {0, kCmdRead, 1, 1, 512}, kAligned, WireError::Invalid},
      {"unaligned length", {0, kCmdWrite, 1, 0, 511}, kAligned, WireError::Invalid},
      {"unknown command", {0, 8, 1, 0, 1}, kRules, WireError::Invalid},
      {"unknown command, highest", {0, 0xffff, 1, 0, 1}, kRules, WireError::Invalid},
      {"unknown flag", {0x80, kCmdWrite, 1, 0, 1}, kRules, WireError::Invalid},
  };
  for (const auto& row : rows) EXPECT_EQ(check_request(row.request, row.rules), row.expected) << row.name;
}

// FUA is accepted on every command (clients are known to set it anywhere).
TEST(NbdRequest, FuaIsAcceptedOnEveryCommand) {
  for (uint16_t command = 0; command <= kCmdBlockStatus; ++command) {
    const uint32_t length = command == kCmdFlush ? 0 : 512;
    EXPECT_EQ(check_request({kFlagFua, command, 1, 0, length}, kRules), WireError::None) << command;
  }
}

// A wrong error makes a guest retry for ever, or give up a healthy disk.
TEST(NbdRequest, ErrnosBecomeTheErrorsThatTheProtocolKnows) {
  const struct {
    Errno error;
    uint32_t expected;
  } rows[] = {{0, 0},
              {EPERM, kEperm},
              {EROFS, kEperm},
              {EACCES, kEperm},
              {EIO, kEio},
              {ENOMEM, kEnomem},
              {EINVAL, kEinval},
              {ENOSPC, kEnospc},
              {EDQUOT, kEnospc},
              {EFBIG, kEnospc},
              {EOVERFLOW, kEoverflow},
              {ESHUTDOWN, kEshutdown},
              {ENODEV, kEio},
              {ENOTSUP, kEio},
              {-1, kEio}};
  for (const auto& row : rows) EXPECT_EQ(static_cast<uint32_t>(to_wire(row.error, false)), row.expected) << row.error;
  EXPECT_EQ(to_wire(ENOTSUP, true), WireError::NotSupported) << "allowed for FAST_ZERO only";
}

TEST(NbdParser, CutsHeadersAndPayloadAtEveryPosition) {
  // A cut inside a header or payload that is handled differently loses the position in the stream.
  const Bytes payload = {1, 2, 3, 4, 5};
  const Bytes whole = joined({request(kCmdRead, kFlagDf, 0x1122334455667788, 4096, 512),
                              request(kCmdWrite, kFlagFua, 2, 8192, 5, payload),
                              request(kCmdWrite, 0, 3, 0, 5, payload), request(kCmdFlush, 0, 4, 0, 0)});
  for (size_t cut = 0; cut <= whole.size(); ++cut) {
    RequestParser parser;
    Bytes received(5);
    std::vector<uint64_t> headers;
    std::vector<bool> payloads;
    for (ByteSpan part : {ByteSpan(whole).first(cut), ByteSpan(whole).subspan(cut)}) {
      for (Event event = parser.next(part); event != Event::NeedBytes; event = parser.next(part)) {
        ASSERT_NE(event, Event::Broken);
        if (event == Event::PayloadDone) {
          payloads.push_back(parser.skipped());
          continue;
        }
        headers.push_back(parser.request().cookie);
        if (parser.request().cookie == 2) parser.take_payload(received.data(), parser.request().length);
        if (parser.request().cookie == 3) parser.skip_payload(parser.request().length);
      }
      EXPECT_TRUE(part.empty());
    }
    EXPECT_EQ(headers, (std::vector<uint64_t>{0x1122334455667788, 2, 3, 4})) << cut;
    EXPECT_EQ(payloads, (std::vector<bool>{false, true})) << cut;
    EXPECT_EQ(received, payload) << cut;
  }
}

TEST(NbdParser, DecodesEveryField) {
  // Golden bytes, written by hand.
  const Bytes bytes = {0x25, 0x60, 0x95, 0x13, 0x00, 0x10, 0x00, 0x06, 1, 2, 3, 4, 5, 6,
                       7,    8,    0,    0,    0,    1,    0,    0,    2, 0, 0, 0, 3, 0};
  RequestParser parser;
  ByteSpan rest = bytes;
  ASSERT_EQ(parser.next(rest), Event::Header);
  EXPECT_EQ(parser.request().flags, kFlagFastZero);
  EXPECT_EQ(parser.request().command, kCmdWriteZeroes);
  EXPECT_EQ(parser.request().cookie, 0x0102030405060708U);
  EXPECT_EQ(parser.request().offset, 0x0000000100000200U);
  EXPECT_EQ(parser.request().length, 0x300U);
}

TEST(NbdParser, WrongMagicBreaksTheStream) {
  // Extended headers were not agreed, so their magic is as wrong as any other.
  for (const uint32_t magic : {0x25609512U, 0x21e41c71U, 0U}) {
    Bytes bytes = request(kCmdRead, 0, 1, 0, 1);
    for (size_t i = 0; i < 4; ++i) bytes[i] = static_cast<uint8_t>(magic >> (24 - 8 * i));
    RequestParser parser;
    ByteSpan rest = bytes;
    EXPECT_EQ(parser.next(rest), Event::Broken);
  }
}

TEST(NbdParser, EmptyPayloadEndsAtOnce) {
  // A write of zero bytes must not swallow the header behind it.
  const Bytes whole = joined({request(kCmdWrite, 0, 1, 0, 0), request(kCmdFlush, 0, 2, 0, 0)});
  RequestParser parser;
  ByteSpan rest = whole;
  ASSERT_EQ(parser.next(rest), Event::Header);
  parser.skip_payload(0);
  EXPECT_EQ(parser.next(rest), Event::PayloadDone);
  ASSERT_EQ(parser.next(rest), Event::Header);
  EXPECT_EQ(parser.request().cookie, 2U);
}

TEST(NbdReply, GoldenBytes) {
  // What a client of another make reads.
  uint8_t simple[kSimpleReplySize];
  encode_simple_reply(simple, 0x0102030405060708, WireError::NoSpace);
  EXPECT_EQ(Bytes(simple, simple + sizeof simple),
            (Bytes{0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8}));

  uint8_t chunk[kReadHeaderSizeMax];
  encode_read_header(chunk, HeaderStyle::Structured, {0, kCmdRead, 0x0102030405060708, 0x1000, 512});
  EXPECT_EQ(Bytes(chunk, chunk + read_header_size(HeaderStyle::Structured)),
            (Bytes{0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 2, 8, 0, 0, 0, 0, 0, 0, 0x10, 0}));
}

TEST(NbdReply, ErrorChunkCarriesErrorTextAndDone) {
  // An error without DONE leaves the client waiting; a text length that is off makes it drop the connection.
  Bytes out;
  append_error(out, {0, kCmdRead, 9, 0, 1}, WireError::Io, HeaderStyle::Structured);
  const auto reply = take_reply(out);
  ASSERT_TRUE(reply.has_value());
  EXPECT_TRUE(out.empty());
  EXPECT_EQ(reply->type, 0x8001);
  EXPECT_EQ(reply->flags, 1);
  EXPECT_EQ(reply->error, kEio);
  ByteReader in(reply->data);
  in.be32();
  const uint16_t text_size = in.be16();
  EXPECT_EQ(text_size, in.remaining());
  EXPECT_GT(text_size, 0);
}

TEST(NbdReply, BlockStatusIsOneChunkThatEndsTheReply) {
  // Exactly one chunk per context, lengths and flags in order.
  Bytes out;
  const StatusDescriptor descriptors[] = {{4096, 0}, {8192, kStateHole | kStateZero}};
  append_block_status(out, {0, kCmdBlockStatus, 7, 0, 12288}, descriptors, HeaderStyle::Structured);
  const auto reply = take_reply(out);
  ASSERT_TRUE(reply.has_value());
  EXPECT_TRUE(out.empty());
  EXPECT_EQ(reply->type, 5);
  EXPECT_EQ(reply->flags, 1);
  EXPECT_EQ(reply->cookie, 7U);
  EXPECT_EQ(reply->data, (Bytes{0, 0, 0, 1, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 3}));
}

// After STRUCTURED_REPLY a READ never gets a simple reply, not even for an error.
TEST(NbdReply, ReadAndBlockStatusAnswerInChunksOnceAgreed) {
  EXPECT_TRUE(answers_in_chunks({0, kCmdRead, 1, 0, 1}, HeaderStyle::Structured));
  EXPECT_TRUE(answers_in_chunks({0, kCmdBlockStatus, 1, 0, 1}, HeaderStyle::Structured));
  EXPECT_FALSE(answers_in_chunks({0, kCmdRead, 1, 0, 1}, HeaderStyle::Simple));
  EXPECT_FALSE(answers_in_chunks({0, kCmdWrite, 1, 0, 1}, HeaderStyle::Structured));
}

}  // namespace
}  // namespace vmferry::nbd
