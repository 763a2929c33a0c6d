// SPDX-License-Identifier: Apache-2.0
//
// Everything a daemon durably knows about itself besides data: volumes, groups with their ownership, peers.
//
// One record (docs/on-disk.md, "Node state") that is replaced as a whole, so that a change of ownership, of a group's
// members or of a peer is one atomic act. Small: some hundred bytes per volume.
// Threads: the daemon's executor.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "blockdev/durable_record.h"
#include "engine/control/config.h"
#include "engine/migrate/ownership.h"
#include "engine/runtime/executor.h"
#include "netproto/rpc/json_lines.h"

namespace vmferry {

// How a group is replicated, by the side that is or was its source. Kept when roles change, so that it goes on after.
struct ReplicationConfig {
  bool active = false;  // the group follows `peer`, in whichever direction the roles say
  bool paused = false;
  std::string mode = "batch";
  Nanoseconds rpo = 30 * kSecond;
  uint64_t bandwidth = 0;  // bytes per second; 0: no cap
  bool overwrite_peer = false;
};

struct GroupRecord {
  Id128 id{};
  std::vector<std::string> members;  // volume names in the order both sides use
  std::string peer;                  // "" when none
  Id128 left{};                      // the group that these volumes were before `replicate stop` here; none otherwise
  ReplicationConfig replication{};
  Ownership ownership{};
};

inline constexpr uint32_t kAttachConnectionsMax = 16;

// A volume that is a block device of this host. Recorded before the kernel is told and until it has let go, so that a
// restarted daemon finds every device that waits for it.
struct AttachmentRecord {
  std::string device;      // "/dev/nbd0"
  std::string identifier;  // ours, kept by the kernel
  uint32_t connections = 1;
  uint32_t dead_timeout_s = 0;
  uint32_t request_timeout_s = 0;
};

// A hook that is owed: the guest runs here, and the program was not seen to end yet. See hooks.h.
struct HookRecord {
  std::vector<std::string> volumes;
  std::string peer;  // that the guest came from
  bool guest_running = true;
  uint64_t starts = 0;
};

struct NodeRecord {
  Id128 node{};
  std::map<std::string, VolumeConfig> volumes;
  std::map<std::string, AttachmentRecord> attachments;  // by volume
  std::map<Id128, GroupRecord> groups;
  std::map<Id128, HookRecord> hooks;  // by attempt
  Json peers = Json::array();         // PeerDirectory's own form
};

Json to_json(const NodeRecord& record);
Result<NodeRecord> node_record_from_json(const Json& value);  // every field checked; fuzzed with the configuration

class NodeState {
 public:
  using Done = std::function<void(Status)>;

  static constexpr uint32_t kSlotSize = 1U << 20;
  static constexpr uint64_t kFileSize = DurableRecord::footprint(kSlotSize);

  NodeState(Executor& executor, BlockDevice& device);

  // A fresh node id when nothing was saved yet.
  void load(Done done);
  const NodeRecord& record() const { return record_; }

  // Changes the record in memory and makes it durable. `done` runs when it is. Changes complete in order.
  void update(const std::function<void(NodeRecord&)>& change, Done done);

 private:
  Executor& executor_;
  DurableRecord durable_;
  NodeRecord record_;
};

// The group that holds the volume; nullptr when none does.
const GroupRecord* find_group_of(const NodeRecord& record, const std::string& volume);

// Ownership of one group inside the node's record.
class GroupOwnershipStore final : public OwnershipStore {
 public:
  // The end of a handover here, durable, with its hook. Empty: hooks are not noted.
  using Arrived = std::function<void(const Id128& attempt)>;

  GroupOwnershipStore(Executor& executor, NodeState& state, Id128 group, Arrived arrived = {})
      : executor_(executor), state_(state), group_(group), arrived_(std::move(arrived)) {}
  void save(const Ownership& ownership, std::function<void(Status)> done) override;

 private:
  Executor& executor_;
  NodeState& state_;
  const Id128 group_;
  const Arrived arrived_;
};

}  // namespace vmferry
