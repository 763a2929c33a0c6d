// SPDX-License-Identifier: Apache-2.0
//
// Messages of a handover and of a promotion, 128..146: docs/replication-protocol.md, "Handover".
//
// Every one begins with the attempt that it is about and a term. Flags that are not defined must be zero: a newer peer
// asks through the features of Hello first.
// Threads: pure functions.
#pragma once

#include <string>

#include "engine/base/bytes.h"
#include "engine/base/id.h"
#include "engine/base/result.h"
#include "netproto/repl/message_types.h"

namespace vmferry {

inline constexpr size_t kHandoverReasonMax = 512;  // bytes; longer ones are cut when encoded

struct PrepareMessage {
  Id128 attempt{};
  uint64_t term = 0;
  bool guest_was_running = true;
  bool detach = false;  // the source will not follow: the new primary keeps no copy up to date there
  friend bool operator==(const PrepareMessage&, const PrepareMessage&) = default;
};

// accepted: durable at the peer, and its QEMU waits for the stream. Otherwise nothing was recorded.
struct PreparedMessage {
  Id128 attempt{};
  uint64_t term = 0;
  bool accepted = false;
  std::string reason;  // of a refusal
  friend bool operator==(const PreparedMessage&, const PreparedMessage&) = default;
};

struct FenceNoticeMessage {
  Id128 attempt{};
  uint64_t term = 0;
  friend bool operator==(const FenceNoticeMessage&, const FenceNoticeMessage&) = default;
};

struct GoMessage {
  Id128 attempt{};
  uint64_t term = 0;
  bool guest_was_running = true;  // at the moment of the stop; the peer runs it only then
  // The source restarted: what the peer lacks of the memory stream never comes.
  bool stream_lost = false;
  friend bool operator==(const GoMessage&, const GoMessage&) = default;
};

struct PrimaryMessage {
  Id128 attempt{};
  uint64_t term = 0;
  friend bool operator==(const PrimaryMessage&, const PrimaryMessage&) = default;
};

struct StartedMessage {
  Id128 attempt{};
  uint64_t term = 0;
  friend bool operator==(const StartedMessage&, const StartedMessage&) = default;
};

struct RunningMessage {
  Id128 attempt{};
  uint64_t term = 0;
  uint64_t last_epoch = 0;      // that the peer took over at; 0: it did not (forced)
  uint64_t resumed_ago_ns = 0;  // since the guest resumed, for the measure of the pause; 0: not known
  friend bool operator==(const RunningMessage&, const RunningMessage&) = default;
};

// From the peer: its durable no. From the source: it took the group back, with this higher term.
struct AbortedMessage {
  Id128 attempt{};
  uint64_t term = 0;
  bool from_source = false;
  std::string reason;
  friend bool operator==(const AbortedMessage&, const AbortedMessage&) = default;
};

struct UnknownAttemptMessage {
  Id128 attempt{};
  uint64_t term = 0;  // of the answering side
  friend bool operator==(const UnknownAttemptMessage&, const UnknownAttemptMessage&) = default;
};

struct PromoteRequestMessage {
  Id128 attempt{};
  uint64_t term = 0;
  friend bool operator==(const PromoteRequestMessage&, const PromoteRequestMessage&) = default;
};

struct PromoteReplyMessage {
  Id128 attempt{};
  uint64_t term = 0;
  bool confirmed = false;  // the answering side is durably fenced for this term
  std::string reason;      // of a refusal
  friend bool operator==(const PromoteReplyMessage&, const PromoteReplyMessage&) = default;
};

struct DemoteNoticeMessage {
  Id128 attempt{};
  uint64_t term = 0;
  friend bool operator==(const DemoteNoticeMessage&, const DemoteNoticeMessage&) = default;
};

Bytes encode(const PrepareMessage& message);
Bytes encode(const PreparedMessage& message);
Bytes encode(const FenceNoticeMessage& message);
Bytes encode(const GoMessage& message);
Bytes encode(const PrimaryMessage& message);
Bytes encode(const StartedMessage& message);
Bytes encode(const RunningMessage& message);
Bytes encode(const AbortedMessage& message);
Bytes encode(const UnknownAttemptMessage& message);
Bytes encode(const PromoteRequestMessage& message);
Bytes encode(const PromoteReplyMessage& message);
Bytes encode(const DemoteNoticeMessage& message);

Result<PrepareMessage> decode_prepare(ByteSpan payload);
Result<PreparedMessage> decode_prepared(ByteSpan payload);
Result<FenceNoticeMessage> decode_fence_notice(ByteSpan payload);
Result<GoMessage> decode_go(ByteSpan payload);
Result<PrimaryMessage> decode_primary(ByteSpan payload);
Result<StartedMessage> decode_started(ByteSpan payload);
Result<RunningMessage> decode_running(ByteSpan payload);
Result<AbortedMessage> decode_aborted(ByteSpan payload);
Result<UnknownAttemptMessage> decode_unknown_attempt(ByteSpan payload);
Result<PromoteRequestMessage> decode_promote_request(ByteSpan payload);
Result<PromoteReplyMessage> decode_promote_reply(ByteSpan payload);
Result<DemoteNoticeMessage> decode_demote_notice(ByteSpan payload);

}  // namespace vmferry
