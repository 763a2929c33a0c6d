// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "engine/base/hash.h"
#include "netproto/repl/handover_messages.h"

namespace vmferry {
namespace {

Id128 attempt() {
  Id128 id;
  for (size_t i = 0; i < id.bytes.size(); ++i) id.bytes[i] = static_cast<uint8_t>(0xa0 + i);
  return id;
}

constexpr uint64_t kTerm = 0x0102030405060708;
constexpr std::string_view kGoldenHead = "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf0807060504030201";

// Decodes, compares, and tries every truncation, a surplus byte, an undefined flag and a missing attempt.
template <typename Message, typename Decode>
void check(const Message& message, Decode decode, std::string_view golden_tail) {
  const Bytes bytes = encode(message);
  EXPECT_EQ(to_hex(bytes), std::string(kGoldenHead) + std::string(golden_tail));
  const Result<Message> decoded = decode(bytes);
  ASSERT_TRUE(decoded) << decoded.error().text;
  EXPECT_EQ(*decoded, message);
  for (size_t size = 0; size < bytes.size(); ++size) EXPECT_FALSE(decode(ByteSpan(bytes).first(size))) << size;
  Bytes longer = bytes;
  longer.push_back(0);
  EXPECT_FALSE(decode(longer));
  Bytes flagged = bytes;
  flagged[25] = 0x80;  // high byte of the flags
  EXPECT_FALSE(decode(flagged));
  Bytes unnamed = bytes;
  std::fill_n(unnamed.begin(), 16, uint8_t{0});
  EXPECT_FALSE(decode(unnamed));
}

// Two daemons of different builds that lay a message out differently agree on an owner that neither of them meant.
TEST(HandoverMessages, LayoutsAreTheDocumentedOnes) {
  check(PrepareMessage{.attempt = attempt(), .term = kTerm, .guest_was_running = true}, decode_prepare, "0100");
  check(PrepareMessage{.attempt = attempt(), .term = kTerm, .guest_was_running = false}, decode_prepare, "0000");
  check(PrepareMessage{.attempt = attempt(), .term = kTerm, .guest_was_running = true, .detach = true}, decode_prepare,
        "0300");
  check(PreparedMessage{.attempt = attempt(), .term = kTerm, .accepted = true, .reason = ""}, decode_prepared,
        "01000000");
  check(PreparedMessage{.attempt = attempt(), .term = kTerm, .accepted = false, .reason = "no"}, decode_prepared,
        "000002006e6f");
  check(FenceNoticeMessage{.attempt = attempt(), .term = kTerm}, decode_fence_notice, "0000");
  check(GoMessage{.attempt = attempt(), .term = kTerm, .guest_was_running = true}, decode_go, "0100");
  check(GoMessage{.attempt = attempt(), .term = kTerm, .guest_was_running = false, .stream_lost = true}, decode_go,
        "0200");
  check(PrimaryMessage{.attempt = attempt(), .term = kTerm}, decode_primary, "0000");
  check(StartedMessage{.attempt = attempt(), .term = kTerm}, decode_started, "0000");
  check(RunningMessage{.attempt = attempt(), .term = kTerm, .last_epoch = 5, .resumed_ago_ns = 0x1234}, decode_running,
        "000005000000000000003412000000000000");
  check(AbortedMessage{.attempt = attempt(), .term = kTerm, .from_source = true, .reason = "late"}, decode_aborted,
        "010004006c617465");
  check(UnknownAttemptMessage{.attempt = attempt(), .term = kTerm}, decode_unknown_attempt, "0000");
  check(PromoteRequestMessage{.attempt = attempt(), .term = kTerm}, decode_promote_request, "0000");
  check(PromoteReplyMessage{.attempt = attempt(), .term = kTerm, .confirmed = true, .reason = ""}, decode_promote_reply,
        "01000000");
  check(DemoteNoticeMessage{.attempt = attempt(), .term = kTerm}, decode_demote_notice, "0000");
}

// A flag set in a message that defines none is a newer meaning that this daemon would silently ignore.
TEST(HandoverMessages, MessageWithoutFlagsRefusesBitZero) {
  Bytes bytes = encode(PrimaryMessage{.attempt = attempt(), .term = kTerm});
  bytes[24] = 1;
  EXPECT_FALSE(decode_primary(bytes));
}

// A reason that cannot be decoded at the other side would turn a refusal into a broken connection.
TEST(HandoverMessages, OverlongReasonIsCutWhenEncodedAndRefusedWhenDecoded) {
  const AbortedMessage message{
      .attempt = attempt(), .term = kTerm, .from_source = false, .reason = std::string(5000, 'x')};
  const Result<AbortedMessage> decoded = decode_aborted(encode(message));
  ASSERT_TRUE(decoded);
  EXPECT_EQ(decoded->reason, std::string(kHandoverReasonMax, 'x'));

  Bytes bytes = encode(AbortedMessage{.attempt = attempt(), .term = kTerm, .from_source = false, .reason = ""});
  bytes.resize(bytes.size() - 2);
  ByteWriter(bytes).le16_string(std::string(kHandoverReasonMax + 1, 'x'));
  EXPECT_FALSE(decode_aborted(bytes));
}

// A peer's text ends on the operator's terminal.
TEST(HandoverMessages, ControlCharactersOfAPeerNeverReachALogLine) {
  const AbortedMessage message{.attempt = attempt(), .term = kTerm, .from_source = false, .reason = "a\x1b[2J\nb\xff"};
  const Result<AbortedMessage> decoded = decode_aborted(encode(message));
  ASSERT_TRUE(decoded);
  EXPECT_EQ(decoded->reason, "a?[2J?b?");
}

}  // namespace
}  // namespace vmferry
