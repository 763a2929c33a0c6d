// SPDX-License-Identifier: Apache-2.0
//
// Messages that carry epochs and full copies from a source to its copy, and the answers.
//
// Payloads of MessageType Epoch*, Credit and Verify*; all integers little-endian; layouts and meaning:
// docs/replication-protocol.md, "Epochs". The body of a data frame is compressed as a whole (engine/delta), so its
// layout is a codec of its own: FrameBody.
// Threads: pure functions.
#pragma once

#include <string>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/hash.h"
#include "engine/base/id.h"
#include "engine/base/result.h"
#include "engine/base/units.h"
#include "netproto/repl/group_hello.h"

namespace vmferry {

// How the frames of an epoch reach the files of the copy.
enum class EpochKind : uint8_t {
  Direct = 1,  // as they come: first full copy; the copy is marked inconsistent before the first
  Staged = 2,  // all at once after EpochEnd (I6)
};

struct EpochBegin {
  uint64_t epoch = 0;  // never reused within a lineage
  Id128 session{};     // of the source; numbers its frames
  Id128 lineage{};     // what the copy belongs to when this epoch is applied
  EpochKind kind = EpochKind::Staged;
  bool full = false;         // every block of every volume comes: a new lineage
  bool overwrite = false;    // the operator allowed to overwrite foreign data
  bool resume = false;       // goes on after staged_frame of the copy's hello
  Id128 final_attempt{};     // the last epoch of this handover; none: an ordinary epoch
  uint64_t first_frame = 0;  // sequence of the next data frame
  uint64_t dirty_bytes = 0;  // upper bound of literal bytes still to come, for the reservation of space
  friend bool operator==(const EpochBegin&, const EpochBegin&) = default;
};

struct EpochData {
  uint64_t epoch = 0;
  uint64_t frame = 0;      // sequence within the session, gap-free over all epochs
  uint64_t heals = 0;      // nonzero: repeats the references of this earlier frame as data
  uint32_t stream = 0;     // compression history; streams are numbered upwards
  bool fuzzy = false;      // read after the guest wrote: the epoch is not one point in time
  uint32_t body_size = 0;  // of the decoded body, the unit of Credit
  Hash128 body_hash{};     // XXH3-128 of the decoded body, from the read at the source to the write at the copy (I8)
  ByteSpan coded;          // delta::StreamCompressor's frame; points into the message
};

struct EpochEnd {
  uint64_t epoch = 0;
  uint64_t last_frame = 0;  // sequence of the last data frame of the epoch; first_frame - 1 when it had none
  bool consistent = false;  // nothing was written between the seal and the end of reading back (I7)
  friend bool operator==(const EpochEnd&, const EpochEnd&) = default;
};

// Every frame up to `frame` is durable at the copy: a direct epoch's blocks may be forgotten, a staged epoch goes on
// behind it after a cut.
struct EpochSegmentAck {
  uint64_t epoch = 0;
  uint64_t frame = 0;
  friend bool operator==(const EpochSegmentAck&, const EpochSegmentAck&) = default;
};

struct EpochAck {
  uint64_t epoch = 0;
  CopyQuality quality = CopyQuality::Fuzzy;
  friend bool operator==(const EpochAck&, const EpochAck&) = default;
};

// References of one frame did not match what the copy has. The frame counts as not received until it is healed.
struct EpochResend {
  uint64_t epoch = 0;
  uint64_t frame = 0;
  struct Range {
    uint16_t volume = 0;
    ByteRange range;
    friend bool operator==(const Range&, const Range&) = default;
  };
  std::vector<Range> ranges;  // 1..kRunsPerFrameMax
  friend bool operator==(const EpochResend&, const EpochResend&) = default;
};

// Body bytes that the source may have sent since the connection came up.
struct Credit {
  uint64_t granted = 0;
  friend bool operator==(const Credit&, const Credit&) = default;
};

// From the source: an epoch that it began is given up, its frames so far are void. From the copy: why it cannot take
// or apply this epoch; with `retrying` it goes on by itself and this is for the operator only.
struct EpochAbandon {
  uint64_t epoch = 0;
  ErrorKind kind = ErrorKind::Unavailable;
  bool retrying = false;
  std::string reason{};  // at most kRejectReasonMax bytes
  friend bool operator==(const EpochAbandon&, const EpochAbandon&) = default;
};

inline constexpr uint64_t kVerifyRangeMax = 64U << 20;

struct VerifyRequest {
  uint64_t id = 0;
  uint16_t volume = 0;
  ByteRange range;                 // at most kVerifyRangeMax bytes
  uint32_t piece_size = 1U << 20;  // one digest per piece; 4 KiB..64 MiB
  friend bool operator==(const VerifyRequest&, const VerifyRequest&) = default;
};

struct VerifyReply {
  uint64_t id = 0;
  uint64_t epoch = 0;  // that the digests belong to
  ErrorKind error_kind = ErrorKind::Internal;
  std::string error;  // not empty: no digests
  std::vector<Sha256Digest> digests;
  friend bool operator==(const VerifyReply&, const VerifyReply&) = default;
};

// --- Body of a data frame

inline constexpr size_t kRunsPerFrameMax = 4096;
inline constexpr uint32_t kFrameLiteralMax = 1U << 20;  // bytes of literal data in one frame
inline constexpr uint32_t kFrameBodyMax = kFrameLiteralMax + 35 * kRunsPerFrameMax + 64;

enum class RunKind : uint8_t {
  Zero = 1,       // reads as zeroes, and becomes a hole where the copy can
  Literal = 2,    // the next bytes of the literal part
  Reference = 3,  // the copy has these bytes at `source`
};

struct FrameRun {
  RunKind kind = RunKind::Zero;
  uint16_t volume = 0;
  ByteRange range;             // Zero: any length; Literal, Reference: at most kFrameLiteralMax
  uint16_t source_volume = 0;  // Reference
  uint64_t source_offset = 0;
  friend bool operator==(const FrameRun&, const FrameRun&) = default;
};

struct FrameBody {
  std::vector<FrameRun> runs;  // 1..kRunsPerFrameMax
  Sha256Digest references{};   // SHA-256 over the bytes of all references in order; only with references
  ByteSpan literals;           // of all literal runs in order; points into the decoded body
};

void append_frame_body(const FrameBody& body, Bytes& out);
// Checks counts, sizes and that literals fit exactly. Ranges against the volumes' sizes: the receiver.
Result<FrameBody> decode_frame_body(ByteSpan body);

// --- Codecs. decode_* accept exactly what encode gives: no trailing bytes, unknown flags refused.
Bytes encode(const EpochBegin& message);
Bytes encode(const EpochData& message);
Bytes encode(const EpochEnd& message);
Bytes encode(const EpochSegmentAck& message);
Bytes encode(const EpochAck& message);
Bytes encode(const EpochResend& message);
Bytes encode(const Credit& message);
Bytes encode(const EpochAbandon& message);
Bytes encode(const VerifyRequest& message);
Bytes encode(const VerifyReply& message);

Result<EpochBegin> decode_epoch_begin(ByteSpan payload);
Result<EpochData> decode_epoch_data(ByteSpan payload);
Result<EpochEnd> decode_epoch_end(ByteSpan payload);
Result<EpochSegmentAck> decode_epoch_segment_ack(ByteSpan payload);
Result<EpochAck> decode_epoch_ack(ByteSpan payload);
Result<EpochResend> decode_epoch_resend(ByteSpan payload);
Result<Credit> decode_credit(ByteSpan payload);
Result<EpochAbandon> decode_epoch_abandon(ByteSpan payload);
Result<VerifyRequest> decode_verify_request(ByteSpan payload);
Result<VerifyReply> decode_verify_reply(ByteSpan payload);

}  // namespace vmferry
