// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/epoch_messages.h"

#include <gtest/gtest.h>

#include <functional>

#include "tests/unit/netproto/golden_repl.h"

namespace vmferry {
namespace {

Id128 id(uint8_t first) {
  Id128 out;
  for (size_t i = 0; i < out.bytes.size(); ++i) out.bytes[i] = static_cast<uint8_t>(first + i);
  return out;
}

GroupHello hello() {
  GroupHello out;
  out.volumes = {{"vda", 1 << 30}, {"vdb", 4096 * 5 + 512}};
  out.role = 1;
  out.handover_state = 5;
  out.term = 7;
  out.attempt = id(1);
  out.wrote = true;
  out.requested_attempt = id(2);
  out.quality = CopyQuality::Fuzzy;
  out.lineage = id(3);
  out.epoch = 40;
  out.quality_epoch = 38;
  out.diverged = true;
  out.session = id(4);
  out.staged_epoch = 41;
  out.staged_frame = 1234;
  return out;
}

FrameBody body(const Bytes& literals) {
  FrameBody out;
  out.runs = {
      {.kind = RunKind::Zero, .volume = 0, .range = {4096, uint64_t{1} << 40}},
      {.kind = RunKind::Literal, .volume = 1, .range = {0, literals.size()}},
      {.kind = RunKind::Reference, .volume = 0, .range = {8192, 4096}, .source_volume = 1, .source_offset = 12288}};
  out.references = sha256(as_bytes("x"));
  out.literals = literals;
  return out;
}

// Every message once, encoded, with a check that decoding gives back what was encoded.
struct Sample {
  std::string name;
  Bytes bytes;
  std::function<bool(ByteSpan)> accepts;  // decodes to the same message
};

template <typename Message, typename Decode>
Sample sample(std::string name, const Message& message, Decode decode) {
  return {std::move(name), encode(message), [message, decode](ByteSpan bytes) {
            const auto decoded = decode(bytes);
            return decoded.has_value() && *decoded == message;
          }};
}

std::vector<Sample> samples() {
  std::vector<Sample> out;
  out.push_back(sample("group_hello", hello(), decode_group_hello));
  out.push_back(
      sample("group_reject", GroupReject{ErrorKind::Mismatch, "volume 'vda' has another size"}, decode_group_reject));
  out.push_back(sample("source_state", SourceState{.paused = true, .paused_ns = 90'000'000'000}, decode_source_state));
  out.push_back(sample("epoch_begin",
                       EpochBegin{.epoch = 41,
                                  .session = id(4),
                                  .lineage = id(3),
                                  .kind = EpochKind::Staged,
                                  .full = false,
                                  .overwrite = true,
                                  .resume = true,
                                  .final_attempt = id(9),
                                  .first_frame = 1235,
                                  .dirty_bytes = 1 << 20},
                       decode_epoch_begin));
  out.push_back(sample("epoch_end", EpochEnd{41, 1240, true}, decode_epoch_end));
  out.push_back(sample("epoch_segment_ack", EpochSegmentAck{41, 1238}, decode_epoch_segment_ack));
  out.push_back(sample("epoch_ack", EpochAck{41, CopyQuality::Consistent}, decode_epoch_ack));
  out.push_back(
      sample("epoch_resend", EpochResend{41, 1237, {{1, {4096, 8192}}, {0, {0, 4096}}}}, decode_epoch_resend));
  out.push_back(sample("credit", Credit{uint64_t{5} << 33}, decode_credit));
  out.push_back(
      sample("epoch_abandon", EpochAbandon{41, ErrorKind::LimitExceeded, true, "no space"}, decode_epoch_abandon));
  out.push_back(sample("verify_request", VerifyRequest{3, 1, {1 << 20, 2 << 20}, 1 << 20}, decode_verify_request));
  out.push_back(sample("verify_reply",
                       VerifyReply{3, 41, ErrorKind::Internal, "", {sha256(as_bytes("a")), sha256(as_bytes("b"))}},
                       decode_verify_reply));
  const Bytes coded{0, 3, 0, 0, 0, 'a', 'b', 'c'};
  EpochData data{.epoch = 41,
                 .frame = 1237,
                 .heals = 1230,
                 .stream = 3,
                 .fuzzy = true,
                 .body_size = 3,
                 .body_hash = xxh3_128(as_bytes("abc")),
                 .coded = coded};
  out.push_back({"epoch_data", encode(data), [data, coded](ByteSpan bytes) {
                   const auto decoded = decode_epoch_data(bytes);
                   return decoded && decoded->epoch == data.epoch && decoded->frame == data.frame &&
                          decoded->heals == data.heals && decoded->stream == data.stream && decoded->fuzzy &&
                          decoded->body_size == data.body_size && decoded->body_hash == data.body_hash &&
                          std::equal(decoded->coded.begin(), decoded->coded.end(), coded.begin(), coded.end());
                 }});
  Bytes frame_body;
  append_frame_body(body(Bytes(5000, 'x')), frame_body);
  out.push_back({"frame_body", frame_body, [](ByteSpan bytes) {
                   const auto decoded = decode_frame_body(bytes);
                   const Bytes literals(5000, 'x');
                   const FrameBody expected = body(literals);
                   return decoded && decoded->runs == expected.runs && decoded->references == expected.references &&
                          std::equal(decoded->literals.begin(), decoded->literals.end(), literals.begin(),
                                     literals.end());
                 }});
  return out;
}

TEST(EpochMessages, EncodeToTheGoldenBytesAndBack) {
  // Two versions of the daemon must understand each other: a changed byte is a changed protocol.
  for (const auto& item : samples()) {
    EXPECT_EQ(item.bytes, golden_repl(item.name + ".bin", item.bytes)) << item.name;
    EXPECT_TRUE(item.accepts(item.bytes)) << item.name;
  }
}

TEST(EpochMessages, TruncatedAtEveryLengthOrWithATrailingByteAreRefused) {
  // A decoder that reads less than it was given, or more, hides a format error until it costs data.
  for (const auto& item : samples()) {
    for (size_t size = 0; size < item.bytes.size(); ++size) {
      const bool open_end = item.name == "epoch_data" && size > 53;
      ASSERT_TRUE(open_end || !item.accepts(ByteSpan(item.bytes).first(size))) << item.name << " " << size;
    }
    Bytes longer = item.bytes;
    longer.push_back(0);
    EXPECT_FALSE(item.accepts(longer)) << item.name;
  }
}

TEST(EpochMessages, HelloFromALaterFormatNamesTheVersion) {
  // An operator who updates one side has to read which one.
  Bytes bytes = encode(hello());
  bytes[0] = 2;
  const auto decoded = decode_group_hello(bytes);
  ASSERT_FALSE(decoded);
  EXPECT_EQ(decoded.error().kind, ErrorKind::Mismatch);
}

TEST(EpochMessages, ValuesOutsideTheirRangeAreRefused) {
  // Each would otherwise be acted upon far from here.
  const auto refused = [](auto decoded) { return !decoded.has_value(); };
  auto with = [](GroupHello h, auto change) {
    change(h);
    return encode(h);
  };
  EXPECT_TRUE(refused(decode_group_hello(with(hello(), [](auto& h) { h.volumes[0].name = "../x"; }))));
  EXPECT_TRUE(refused(decode_group_hello(with(hello(), [](auto& h) { h.volumes.clear(); }))));
  EXPECT_TRUE(refused(decode_group_hello(with(hello(), [](auto& h) { h.quality = static_cast<CopyQuality>(5); }))));
  EXPECT_TRUE(refused(
      decode_epoch_begin(encode(EpochBegin{.epoch = 0, .session = id(1), .lineage = id(2), .first_frame = 1}))));
  EXPECT_TRUE(
      refused(decode_epoch_begin(encode(EpochBegin{.epoch = 1, .session = {}, .lineage = id(2), .first_frame = 1}))));
  EXPECT_TRUE(
      refused(decode_epoch_begin(encode(EpochBegin{.epoch = 1, .session = id(1), .lineage = {}, .first_frame = 1}))));
  EXPECT_TRUE(refused(
      decode_epoch_begin(encode(EpochBegin{.epoch = 1, .session = id(1), .lineage = id(2), .first_frame = 0}))));
  EXPECT_TRUE(refused(decode_epoch_begin(encode(EpochBegin{
      .epoch = 1, .session = id(1), .lineage = id(2), .kind = static_cast<EpochKind>(3), .first_frame = 1}))));
  EXPECT_TRUE(refused(decode_epoch_ack(encode(EpochAck{1, CopyQuality::Inconsistent}))));
  EXPECT_TRUE(refused(decode_source_state(encode(SourceState{.paused = false, .paused_ns = 1}))));
  EXPECT_TRUE(refused(decode_source_state(Bytes{2, 0, 0, 0, 0, 0, 0, 0, 0})));
  EXPECT_TRUE(refused(decode_epoch_resend(encode(EpochResend{1, 1, {}}))));
  EXPECT_TRUE(refused(decode_epoch_resend(encode(EpochResend{1, 1, {{0, {0, 0}}}}))));
  EXPECT_TRUE(refused(decode_epoch_resend(encode(EpochResend{1, 1, {{0, {0, kFrameLiteralMax + 1}}}}))));
  EXPECT_TRUE(refused(decode_verify_request(encode(VerifyRequest{1, 0, {UINT64_MAX, 2}, 4096}))));
  EXPECT_TRUE(refused(decode_verify_request(encode(VerifyRequest{1, 0, {0, kVerifyRangeMax + 1}, 4096}))));
  EXPECT_TRUE(refused(decode_verify_request(encode(VerifyRequest{1, 0, {0, 4096}, 4095}))));
  const Bytes coded{1};
  EXPECT_TRUE(refused(decode_epoch_data(
      encode(EpochData{.epoch = 1, .frame = 1, .heals = 1, .body_size = 1, .body_hash = {}, .coded = coded}))));
  EXPECT_TRUE(refused(decode_epoch_data(
      encode(EpochData{.epoch = 1, .frame = 1, .body_size = kFrameBodyMax + 1, .body_hash = {}, .coded = coded}))));
  EXPECT_TRUE(refused(
      decode_epoch_data(encode(EpochData{.epoch = 1, .frame = 1, .body_size = 0, .body_hash = {}, .coded = coded}))));
}

TEST(FrameBody, RunsThatOverflowOrDoNotMatchTheirLiteralsAreRefused) {
  // The literal part is cut by the run table: a table that promises more would read past the end.
  const auto decodes = [](FrameBody b) {
    Bytes out;
    append_frame_body(b, out);
    return decode_frame_body(out).has_value();
  };
  const Bytes literals(4096, 'x');
  const auto one = [&](RunKind kind, ByteRange range, uint64_t source = 0) {
    FrameBody b;
    b.runs = {{.kind = kind, .volume = 0, .range = range, .source_volume = 0, .source_offset = source}};
    if (kind == RunKind::Literal) b.literals = literals;
    return b;
  };
  EXPECT_TRUE(decodes(one(RunKind::Literal, {0, 4096})));
  EXPECT_FALSE(decodes(one(RunKind::Literal, {0, 4095})));
  EXPECT_FALSE(decodes(one(RunKind::Literal, {0, 4097})));
  EXPECT_FALSE(decodes(one(RunKind::Literal, {UINT64_MAX - 4094, 4096})));
  EXPECT_TRUE(decodes(one(RunKind::Zero, {0, UINT64_MAX})));
  EXPECT_FALSE(decodes(one(RunKind::Zero, {1, UINT64_MAX})));
  EXPECT_FALSE(decodes(one(RunKind::Zero, {0, 0})));
  EXPECT_TRUE(decodes(one(RunKind::Reference, {0, kFrameLiteralMax})));
  EXPECT_FALSE(decodes(one(RunKind::Reference, {0, kFrameLiteralMax + 1})));
  EXPECT_FALSE(decodes(one(RunKind::Reference, {0, 4096}, UINT64_MAX - 4094)));
  EXPECT_FALSE(decodes(one(static_cast<RunKind>(4), {0, 4096})));
}

}  // namespace
}  // namespace vmferry
