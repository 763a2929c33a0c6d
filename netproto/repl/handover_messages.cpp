// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/handover_messages.h"

#include <algorithm>

namespace vmferry {
namespace {

// Bit 0 of the flags; its meaning is each message's own.
constexpr uint16_t kFlagSet = 1;
// Bit 1, in PREPARE (the source will not follow) and GO (the stream is lost) only.
constexpr uint16_t kFlagSecond = 2;

// Layout shared by all: attempt, 16 bytes; term, le64; flags, le16.
Bytes begin(const Id128& attempt, uint64_t term, bool flag, bool second = false) {
  const int flags = (flag ? kFlagSet : 0) | (second ? kFlagSecond : 0);
  Bytes out;
  ByteWriter(out).raw(attempt.bytes).le64(term).le16(static_cast<uint16_t>(flags));
  return out;
}

void append_reason(Bytes& out, std::string_view reason) {
  ByteWriter(out).le16_string(reason.substr(0, kHandoverReasonMax));
}

// Text from a peer ends in log lines and terminals: anything but plain printable ASCII becomes '?'.
std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < 0x20 || c > 0x7e; }, '?');
  return text;
}

class Decoder {
 public:
  Decoder(ByteSpan payload, std::string_view name) : reader_(payload), name_(name) {
    reader_.copy_to(attempt.bytes);
    term = reader_.le64();
    flags_ = reader_.le16();
  }

  Id128 attempt{};
  uint64_t term = 0;
  bool flag() const { return (flags_ & kFlagSet) != 0; }
  bool second_flag() const { return (flags_ & kFlagSecond) != 0; }
  uint64_t le64() { return reader_.le64(); }
  std::string reason() { return printable(reader_.le16_string(kHandoverReasonMax)); }

  Status finish(bool flag_allowed, uint16_t further_flags = 0) const {
    if (!reader_.done()) return fail(ErrorKind::Corrupt, "{}: wrong size", name_);
    if ((flags_ & ~((flag_allowed ? kFlagSet : 0) | further_flags)) != 0)
      return fail(ErrorKind::Corrupt, "{}: unknown flags {:#x}", name_, flags_);
    if (attempt.is_none()) return fail(ErrorKind::Corrupt, "{}: no attempt", name_);
    return {};
  }

 private:
  ByteReader reader_;
  std::string_view name_;
  uint16_t flags_ = 0;
};

// The messages that are an attempt and a term and nothing else.
template <typename Message>
Result<Message> decode_plain(ByteSpan payload, std::string_view name) {
  const Decoder in(payload, name);
  if (const Status ok = in.finish(false); !ok) return tl::unexpected<Error>(ok.error());
  return Message{.attempt = in.attempt, .term = in.term};
}

}  // namespace

Bytes encode(const PrepareMessage& message) {
  return begin(message.attempt, message.term, message.guest_was_running, message.detach);
}

Result<PrepareMessage> decode_prepare(ByteSpan payload) {
  const Decoder in(payload, "PREPARE");
  if (const Status ok = in.finish(true, kFlagSecond); !ok) return tl::unexpected<Error>(ok.error());
  return PrepareMessage{
      .attempt = in.attempt, .term = in.term, .guest_was_running = in.flag(), .detach = in.second_flag()};
}

Bytes encode(const PreparedMessage& message) {
  Bytes out = begin(message.attempt, message.term, message.accepted);
  append_reason(out, message.reason);
  return out;
}

Result<PreparedMessage> decode_prepared(ByteSpan payload) {
  Decoder in(payload, "PREPARED");
  std::string reason = in.reason();
  if (const Status ok = in.finish(true); !ok) return tl::unexpected<Error>(ok.error());
  return PreparedMessage{.attempt = in.attempt, .term = in.term, .accepted = in.flag(), .reason = std::move(reason)};
}

Bytes encode(const FenceNoticeMessage& message) {
  return begin(message.attempt, message.term, false);
}

Result<FenceNoticeMessage> decode_fence_notice(ByteSpan payload) {
  return decode_plain<FenceNoticeMessage>(payload, "FENCE-NOTICE");
}

Bytes encode(const GoMessage& message) {
  return begin(message.attempt, message.term, message.guest_was_running, message.stream_lost);
}

Result<GoMessage> decode_go(ByteSpan payload) {
  const Decoder in(payload, "GO");
  if (const Status ok = in.finish(true, kFlagSecond); !ok) return tl::unexpected<Error>(ok.error());
  return GoMessage{
      .attempt = in.attempt, .term = in.term, .guest_was_running = in.flag(), .stream_lost = in.second_flag()};
}

Bytes encode(const PrimaryMessage& message) {
  return begin(message.attempt, message.term, false);
}

Result<PrimaryMessage> decode_primary(ByteSpan payload) {
  return decode_plain<PrimaryMessage>(payload, "PRIMARY");
}

Bytes encode(const StartedMessage& message) {
  return begin(message.attempt, message.term, false);
}

Result<StartedMessage> decode_started(ByteSpan payload) {
  return decode_plain<StartedMessage>(payload, "STARTED");
}

Bytes encode(const RunningMessage& message) {
  Bytes out = begin(message.attempt, message.term, false);
  ByteWriter(out).le64(message.last_epoch).le64(message.resumed_ago_ns);
  return out;
}

Result<RunningMessage> decode_running(ByteSpan payload) {
  Decoder in(payload, "RUNNING");
  const uint64_t last_epoch = in.le64();
  const uint64_t resumed_ago_ns = in.le64();
  if (const Status ok = in.finish(false); !ok) return tl::unexpected<Error>(ok.error());
  return RunningMessage{
      .attempt = in.attempt, .term = in.term, .last_epoch = last_epoch, .resumed_ago_ns = resumed_ago_ns};
}

Bytes encode(const AbortedMessage& message) {
  Bytes out = begin(message.attempt, message.term, message.from_source);
  append_reason(out, message.reason);
  return out;
}

Result<AbortedMessage> decode_aborted(ByteSpan payload) {
  Decoder in(payload, "ABORTED");
  std::string reason = in.reason();
  if (const Status ok = in.finish(true); !ok) return tl::unexpected<Error>(ok.error());
  return AbortedMessage{.attempt = in.attempt, .term = in.term, .from_source = in.flag(), .reason = std::move(reason)};
}

Bytes encode(const UnknownAttemptMessage& message) {
  return begin(message.attempt, message.term, false);
}

Result<UnknownAttemptMessage> decode_unknown_attempt(ByteSpan payload) {
  return decode_plain<UnknownAttemptMessage>(payload, "UNKNOWN-ATTEMPT");
}

Bytes encode(const PromoteRequestMessage& message) {
  return begin(message.attempt, message.term, false);
}

Result<PromoteRequestMessage> decode_promote_request(ByteSpan payload) {
  return decode_plain<PromoteRequestMessage>(payload, "PROMOTE-REQUEST");
}

Bytes encode(const PromoteReplyMessage& message) {
  Bytes out = begin(message.attempt, message.term, message.confirmed);
  append_reason(out, message.reason);
  return out;
}

Result<PromoteReplyMessage> decode_promote_reply(ByteSpan payload) {
  Decoder in(payload, "PROMOTE-REPLY");
  std::string reason = in.reason();
  if (const Status ok = in.finish(true); !ok) return tl::unexpected<Error>(ok.error());
  return PromoteReplyMessage{
      .attempt = in.attempt, .term = in.term, .confirmed = in.flag(), .reason = std::move(reason)};
}

Bytes encode(const DemoteNoticeMessage& message) {
  return begin(message.attempt, message.term, false);
}

Result<DemoteNoticeMessage> decode_demote_notice(ByteSpan payload) {
  return decode_plain<DemoteNoticeMessage>(payload, "DEMOTE-NOTICE");
}

}  // namespace vmferry
