// SPDX-License-Identifier: Apache-2.0
//
// What a daemon durably knows about the two copies of a group: which full copy both stem from, and how far it is.
//
// One per group and daemon, shared by Sender (source) and Receiver (copy), so that a change of roles keeps lineage and
// epoch. Lives at the beginning of the group's staging device. docs/on-disk.md, "Staging".
// Threads: the group's executor.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "blockdev/durable_record.h"
#include "engine/base/id.h"
#include "engine/track/tracked_device.h"
#include "netproto/repl/group_hello.h"

namespace vmferry {

// One volume of a group, in the group's order. The same order at both ends (checked by name and size).
struct ReplicaVolume {
  std::string name;
  TrackedDevice* device = nullptr;
};

struct ReplicaRecord {
  CopyQuality quality = CopyQuality::None;
  Id128 lineage{};
  uint64_t epoch = 0;          // source: last epoch known to be applied at the peer; copy: last epoch applied here
  uint64_t quality_epoch = 0;  // Consistent: at; Fuzzy: since
  Id128 final_attempt{};       // of the handover whose last epoch is `epoch`; none otherwise
  Id128 session{};             // copy: of the source whose epoch was applied last
  friend bool operator==(const ReplicaRecord&, const ReplicaRecord&) = default;
};

Bytes encode(const ReplicaRecord& record);
Result<ReplicaRecord> decode_replica_record(ByteSpan payload);

class ReplicaState {
 public:
  using Done = std::function<void(Status)>;

  // The first kReservedSize bytes of `staging` belong to this, the rest to the Receiver.
  static constexpr uint64_t kReservedSize = 64 * 1024;
  explicit ReplicaState(BlockDevice& staging);

  void open(Done done);
  const ReplicaRecord& record() const { return record_; }
  // record() is the new one at once; `done` when it is durable. Saves complete in order. After an error record() is the
  // one before again, or what was not recorded would be told to the peer.
  void save(const ReplicaRecord& record, Done done);

 private:
  DurableRecord durable_;
  ReplicaRecord record_;
};

// Same names, sizes and order, or the reason why not, for both sides' logs.
Status check_volumes(const std::vector<ReplicaVolume>& ours, const std::vector<GroupHello::Volume>& theirs);

}  // namespace vmferry
