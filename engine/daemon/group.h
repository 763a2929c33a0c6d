// SPDX-License-Identifier: Apache-2.0
//
// One group of volumes on one daemon: everything that belongs to it, put together, and messages routed to it.
//
// Flow: Daemon makes groups from the node's record and gives them their peer's channel. As primary with a peer the
// group has a Sender, as secondary a Receiver; the HandoverCoordinator decides which, durably, and tells us. Nothing
// here knows sockets, files or processes: tests/sim runs the same class.
// Threads: the group's executor. See docs/architecture.md.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/daemon/channel_switch.h"
#include "engine/daemon/group_devices.h"
#include "engine/daemon/group_memory.h"
#include "engine/daemon/node_state.h"
#include "engine/migrate/coordinator.h"
#include "engine/replicate/receiver.h"
#include "engine/replicate/sender.h"
#include "netproto/repl/group_hello.h"

namespace vmferry {

class GroupReplicationLink;

struct GroupOptions {
  SenderOptions sender{};
  ReceiverOptions receiver{};
  CoordinatorOptions coordinator{};
  MemorySourceOptions memory{};
  Nanoseconds accept_timeout = 15 * kSecond;  // for the peer to accept a group that is offered to it
};

// What the peer may do here (design section 10).
struct GroupRights {
  bool replicate_in = true;
  bool verify = true;
  bool migrate_in = true;
};

struct GroupParts {
  Executor& executor;
  OwnershipStore& ownership;
  BlockDevice& staging;  // replica state and staged epochs of this group
  std::function<std::unique_ptr<Qemu>(const std::string& qmp_path)> make_qemu;
  std::string qmp_path;  // of the QEMU that uses the volumes; "" when none
};

struct GroupEvents {
  std::function<void(const std::string& event, Json fields)> event;
  std::function<void(const GroupRecord&)> config_changed;  // to be made durable: peer or replication
};

class Group final : private GroupChannelHandler {
 public:
  using Done = std::function<void(Status)>;

  // Devices and parts outlive this. record.ownership is what the journal holds.
  Group(GroupRecord record, std::vector<ReplicaVolume> volumes, GroupParts parts, GroupOptions options,
        GroupEvents events);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Recovers replica state and ownership; gates are set when it is done, so exports open after it.
  void open(Done done);
  // Stops sending and taking, lets a commit under way finish. The devices are closed by their owner afterwards.
  void close(Done done);

  const Id128& id() const { return record_.id; }
  const GroupRecord& record() const { return record_; }
  bool is_open() const { return open_; }  // before, there is nothing to ask or to command
  const Ownership& ownership() const { return coordinator_ ? coordinator_->ownership() : record_.ownership; }
  HandoverCoordinator& coordinator() { return *coordinator_; }
  const std::vector<ReplicaVolume>& volumes() const { return volumes_; }
  Sender* sender() { return sender_.get(); }

  // --- the peer
  GroupChannelHandler& channel_handler() { return *this; }
  void set_channel(std::unique_ptr<GroupChannel> channel, GroupRights rights);
  // The hello that made this group, delivered once there is a channel.
  void stash_hello(Bytes payload);
  bool connected() const { return channel_.connected(); }
  LinkFigures link_figures() const { return channel_.figures(); }
  // A peer's hello for this group, before there was a channel: whether its volumes are ours.
  Status check_offer(const GroupHello& hello) const;

  // --- replication, by the primary
  // Offers the group to its peer (set_channel before) and replicates; done when the peer accepted, or why not.
  void start_replication(ReplicationConfig config, Done done);
  void change_replication(const ReplicationConfig& config);
  Json replication_status() const;  // one entry per volume, as the contract says
  void wait_in_sync(Done done);     // Unavailable when it cannot happen: not replicating
  void verify(std::function<void(Result<std::vector<VerifyDifference>>)> done);
  // Whether the peer may be forgotten now, or what has to be decided before.
  Status may_stop_replication() const;
  void say_stopped();  // to the peer; the group is closed next

  // --- migration and roles
  // An error: nothing was begun, and `done` is never called.
  Status migrate(const MigrateRequest& request, HandoverCoordinator::MigrateDone done);
  void promote(PromoteOptions options, Done done);
  void resolve(ResolveChoice choice, bool force, Done done);
  Qemu* connected_qemu(const std::string& path) const;  // the same, only if it is connected
  Qemu* qemu(const std::string& path);  // made on first use; "" is the group's own; nullptr when there is none
  const std::string& qmp_path() const { return parts_.qmp_path; }
  bool handover_under_way() const;  // a QEMU is watched for it
  bool copy_is_consistent() const;
  CopyQuality copy_quality() const;
  bool holds_foreign_data() const;  // as a secondary: data that is no earlier copy

 private:
  friend class GroupReplicationLink;

  // GroupChannelHandler
  void channel_connected() override;
  void channel_disconnected() override;
  void channel_message(MessageType type, ByteSpan payload) override;
  void channel_writable(TrafficClass traffic) override;

  void handle_hello(ByteSpan payload);
  void handle_reject(ByteSpan payload);
  Status route(MessageType type, ByteSpan payload);
  void refuse_peer(const Error& error);
  void note_refusal(const Error& error);
  void note_apart();
  void rejoin_if_copy();
  std::string no_contact() const;
  std::string paused_there(Nanoseconds duration) const;
  void send_hello();
  void feed_hello();  // gives the peer's hello to whoever can use it now
  PeerOwnership peer_ownership() const;

  bool wants_sender() const;
  bool taking_over() const;
  void start_sender();
  void make_receiver();
  void open_receiver(Done done);
  void open_copy();
  bool peer_has_everything() const;
  void prepare_to_follow(uint64_t epoch, Done done);
  void role_changed(Role role);
  void set_active(bool active);
  void own_unfinished_copy();
  void close_receiver(Done done);
  void finish_accept(const Status& status);
  void start_coordinator();
  std::vector<TrackedDevice*> tracked_devices() const;

  GroupRecord record_;
  std::vector<ReplicaVolume> volumes_;
  GroupParts parts_;
  GroupOptions options_;
  GroupEvents events_;
  GroupRights rights_;

  ChannelSwitch channel_;
  ReplicaState state_;
  VolumeGroupDevices devices_;
  std::unique_ptr<Sender> sender_;
  bool sender_started_ = false;
  std::unique_ptr<Receiver> receiver_;
  bool receiver_open_ = false;
  std::map<std::string, std::unique_ptr<Qemu>> qemus_;
  std::unique_ptr<GroupReplicationLink> replication_;
  std::unique_ptr<GroupMemory> memory_;
  std::unique_ptr<HandoverCoordinator> coordinator_;

  bool open_ = false;
  bool rejoining_ = false;  // Superseded ends without anything new for the peer
  bool hello_sent_ = false;
  std::optional<GroupHello> peer_hello_;  // of this connection
  bool hello_accepted_ = false;           // by the coordinator
  bool hello_given_ = false;              // to the sender that is there now
  Bytes stashed_hello_;
  std::optional<Error> refusal_;            // of this connection, by either side: nothing flows
  bool refused_by_us_ = false;              // and no hello since told that it is over
  std::optional<Nanoseconds> apart_since_;  // as a copy: nothing has come from its source since then
  std::vector<Done> accept_waiters_;
  Timer accept_timer_;
  Timer retry_timer_;  // of a sender that did not start or a copy that did not open
  std::function<void(const Id128&, uint64_t)> final_listener_;
  Alive alive_;
};

}  // namespace vmferry
