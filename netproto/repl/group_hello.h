// SPDX-License-Identifier: Apache-2.0
//
// First message of a group on every connection, from both sides (H6): who owns the group, and how far the copy is.
//
// Role, term, attempt and handover state are filled and judged by engine/migrate, volumes and copy by
// engine/replicate; the codec only bounds them. docs/replication-protocol.md, "Epochs".
// Threads: pure functions.
#pragma once

#include <string>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/id.h"
#include "engine/base/result.h"

namespace vmferry {

inline constexpr size_t kGroupVolumesMax = 64;

// What a side's files are worth as a copy of the group.
enum class CopyQuality : uint8_t {
  None = 0,          // never was a copy, and never had one
  Source = 1,        // the primary's own data
  Inconsistent = 2,  // a first full copy is under way: not usable
  Fuzzy = 3,         // whole, but its last epoch was read back from a running guest: not one point in time
  Consistent = 4,    // the image of the source at quality_epoch
};

struct GroupHello {
  struct Volume {
    std::string name;
    uint64_t size = 0;  // bytes
    friend bool operator==(const Volume&, const Volume&) = default;
  };
  std::vector<Volume> volumes;  // 1..kGroupVolumesMax, in the order that frames number them

  // Ownership (engine/migrate)
  uint8_t role = 0;
  uint8_t handover_state = 0;
  uint64_t term = 0;
  Id128 attempt{};
  bool forced = false;
  bool split_brain = false;
  bool wrote = false;
  Id128 requested_attempt{};  // the attempt that the sender wants an answer about; none: no question

  // Copy (engine/replicate)
  CopyQuality quality = CopyQuality::None;
  Id128 lineage{};             // names the full copy that both sides stem from; none: there was none
  uint64_t epoch = 0;          // copy: last epoch applied; source: last epoch acknowledged
  uint64_t quality_epoch = 0;  // Consistent: at this epoch; Fuzzy: since this one
  bool foreign_data = false;   // the files hold data that is no copy of anything known here
  bool diverged = false;       // a former source with writes that its peer may not have
  Id128 session{};             // source: its own; copy: the one whose epoch is staged or directly applied in part
  uint64_t staged_epoch = 0;   // copy: epoch in progress, 0 none
  uint64_t staged_frame = 0;   // copy: frames of `session` up to this one need not be sent again
  friend bool operator==(const GroupHello&, const GroupHello&) = default;
};

Bytes encode(const GroupHello& hello);
Result<GroupHello> decode_group_hello(ByteSpan payload);

struct GroupReject {
  ErrorKind kind = ErrorKind::Mismatch;
  std::string reason;  // one sentence, at most kRejectReasonMax bytes
  friend bool operator==(const GroupReject&, const GroupReject&) = default;
};
inline constexpr size_t kRejectReasonMax = 1024;

// From the source, after the hellos when it is paused, and at each change: whether anything will come.
struct SourceState {
  bool paused = false;
  uint64_t paused_ns = 0;  // for so long already; 0 when not paused
  friend bool operator==(const SourceState&, const SourceState&) = default;
};

Bytes encode(const GroupReject& reject);
Result<GroupReject> decode_group_reject(ByteSpan payload);
Bytes encode(const SourceState& state);
Result<SourceState> decode_source_state(ByteSpan payload);

}  // namespace vmferry
