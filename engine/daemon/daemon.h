// SPDX-License-Identifier: Apache-2.0
//
// vmferryd: the one place where volumes, groups, peers, exports and commands are put together.
//
//   daemon.cpp          start and stop
//   daemon_volumes.cpp  volumes: opened with their group, failed, tried again, added, removed
//   daemon_groups.cpp   groups: made, merged, offered by a peer, connected to their peer
//   daemon_regroup.cpp  one group takes the place of others, or all stays as it was
//   daemon_resize.cpp   a volume grows, its peer first
//   attachments.h       volumes as block devices of this host
//   rpc_*.cpp           the commands of the control socket, by subject
// Threads: the reactor's.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/control/events.h"
#include "engine/control/metrics_server.h"
#include "engine/control/rpc_server.h"
#include "engine/daemon/attachments.h"
#include "engine/daemon/group.h"
#include "engine/daemon/hooks.h"
#include "engine/daemon/node_state.h"
#include "engine/daemon/passed_sockets.h"
#include "engine/daemon/volume.h"
#include "engine/daemon/write_load.h"
#include "engine/replicate/peer_service.h"
#include "engine/replicate/socket_dialer.h"
#include "engine/runtime/folder.h"
#include "engine/runtime/reactor.h"
#include "engine/runtime/steps.h"

namespace vmferry {

// A volume that could not be opened. The daemon serves the others; this one is listed with its reason until it is tried
// again or given up.
struct FailedVolume {
  VolumeConfig config;
  std::string reason;     // a sentence: what failed, on what, what to do
  bool recorded = false;  // false: of the command line, and still new at the next start
};

class Daemon final : private PeerServiceHandler {
 public:
  using Done = std::function<void(Status)>;

  Daemon(Reactor& reactor, const DaemonConfig& config, PassedSockets passed = {});
  ~Daemon();

  void start(Done done);      // ready: the control socket exists
  void shut_down(Done done);  // drains, saves, closes; also after a start that failed or is under way

  // --- for the commands
  Reactor& reactor() { return reactor_; }
  EventLog& events() { return events_; }
  NodeState& state() { return *state_; }
  PeerService& peers() { return *peers_; }
  Attachments& attachments() { return attachments_; }
  const std::map<std::string, std::unique_ptr<Volume>>& volumes() const { return volumes_; }
  Result<Volume*> volume(const std::string& name) const;  // that is served; the reason when it has failed
  const std::map<std::string, FailedVolume>& failed_volumes() const { return failed_; }
  Group* group_of(const std::string& volume) const;  // nullptr also while it is being regrouped
  // Busy when one of them is a block device of this host: whoever uses that would go on writing here.
  Status check_not_attached(const std::vector<std::string>& names) const;
  // The one group of all of them.
  Result<Group*> group_of_all(const std::vector<std::string>& names) const;
  std::vector<Group*> groups() const;  // that are open; one that is being formed has no state yet

  // Whole or not at all. A volume of that name that has failed is tried again with these settings on top of its own.
  void add_volume(const VolumeConfig& config, Done done);
  void remove_volume(const std::string& name, Done done);
  void resize_volume(const std::string& name, uint64_t size, Done done);
  // Makes the named volumes one group with this peer, merging their present groups when that loses nothing and the peer
  // would take the result; otherwise nothing is changed.
  void form_group(const std::vector<std::string>& names, const std::string& peer, bool overwrite_peer,
                  std::function<void(Result<Group*>)> done);
  void forget_peer_of(Group& group, Done done);
  // Why the volume's group is not what was asked for last, or is not there at all; "" when all is well.
  std::string group_trouble(const std::string& volume) const;
  // Bytes per second that clients of the volume's exports wrote lately; nullopt: not watched long enough.
  std::optional<uint64_t> write_rate(const std::string& volume) const;
  // Facts for a migration to here; `volumes` as the source names them.
  void answer_preflight(const Json& request, std::function<void(Result<Json>)> answer);

 private:
  void prepare_state_dir(const Done& next);
  Status load_credentials();  // of the NBD exports
  Status lock_state_dir();
  void load_state(Done done);
  Status open_sockets();
  Status open_metrics();
  void register_commands();
  void watch_replication_states();
  void note_replication_states();
  void note_write_rates();
  std::string path_in_state(const std::string& name) const { return config_.state_dir + "/" + name; }

  // daemon_volumes.cpp
  Status check_passed_sockets(const NodeRecord& record) const;
  void make_new_volumes();  // of the command line
  Status make_volume(const VolumeConfig& given, Volume::Origin origin);
  void open_volumes(Done done);  // and their groups and exports; never fails, because volumes fail one by one
  void open_volumes_of(const GroupRecord& record, Done done);
  void fail_volumes_of(const GroupRecord& record, const std::string& culprit, const Error& error, Done done);
  void note_failure(const VolumeConfig& config, const std::string& reason, bool recorded);
  void add_new_volume(const VolumeConfig& config, Done done);
  void retry_volume(VolumeConfig config, Done done);
  void give_up_volume(const std::string& name, Done done);
  // Closes a volume and its group of one, forgets both durably; the volume's data stays.
  void drop_volume(const std::string& name, const Id128& group, Done done);
  void delete_metadata(const std::string& name);

  // daemon_resize.cpp
  void grow_volume(const std::string& name, uint64_t size, Done done);
  void regroup_with_size(Group& group, AsyncStep grow, Done done);
  void answer_resize(const PeerLink& link, const Json& request, PeerRequests::Answer answer);

  // daemon_groups.cpp
  GroupRecord new_group_record(const std::vector<std::string>& members, Role role);
  void open_group(const GroupRecord& record, Done done);
  void connect_group(Group& group);
  void form_group_when_asked(const std::vector<std::string>& names, const std::string& peer, bool overwrite_peer,
                             bool asked, std::function<void(Result<Group*>)> done);
  void ask_to_take(const std::vector<std::string>& names, const std::string& peer, bool overwrite_peer, Done done);
  Status answer_offer(const std::string& peer, const Json& request) const;
  // `id` none: a question only.
  Result<std::vector<Id128>> check_offer(const std::string& peer, const Id128& id, const GroupHello& hello) const;
  void offered(PeerLink& link, const Id128& id, ByteSpan payload);
  void reject_offer(PeerLink& link, const Id128& id, const Error& error);

  // daemon_regroup.cpp
  enum class CopyState : uint8_t { Keep, Forget };  // whether a group of the same volumes knows the copy it was or had
  void close_groups(const std::vector<Id128>& ids, Done done);
  void replace_groups(const std::vector<Id128>& old_ids, const GroupRecord& record, CopyState copy,
                      std::function<void(Result<Group*>)> done);
  void restore_groups(const std::vector<GroupRecord>& before, const GroupRecord& failed, const Error& error,
                      const std::function<void(Result<Group*>)>& done);
  void connect_anew(Group& group);
  void group_lost(const GroupRecord& record, const Error& error);
  void reopen_lost_groups();
  std::string why_without_group(const std::string& volume) const;
  static std::string name_of_staging(const Id128& id);  // in the folder `groups`
  Status hand_over_staging(const Id128& from, const Id128& to);
  void delete_staging(const Id128& id);

  // PeerServiceHandler
  void link_connected(PeerLink& link) override;
  void link_disconnected(PeerLink& link, const Error& error) override;
  void link_unknown_group(PeerLink& link, const Id128& group, MessageType type, ByteSpan payload) override;
  void link_request(PeerLink& link, const std::string& method, const std::string& json,
                    PeerRequests::Answer answer) override;
  void save_peers(const nlohmann::json& state, std::function<void(Status)> done) override;
  void peer_added(PeerLink& link) override;
  void peer_removed(const std::string& name) override;

  Reactor& reactor_;
  const DaemonConfig config_;
  const PassedSockets passed_;
  EventLog events_;
  UniqueFd state_lock_;
  Folder groups_folder_;  // of the state folder; what a peer makes us create is in it
  std::unique_ptr<FileStore> state_file_;
  std::unique_ptr<NodeState> state_;
  std::unique_ptr<Hooks> hooks_;
  std::unique_ptr<TlsIdentity> identity_;
  std::shared_ptr<const TlsCredentials> nbd_credentials_;
  SocketDialer dialer_;
  std::map<std::string, std::unique_ptr<Volume>> volumes_;
  std::map<std::string, FailedVolume> failed_;  // never in volumes_ at the same time

  struct GroupSlot {
    std::unique_ptr<FileStore> staging;
    std::unique_ptr<GroupOwnershipStore> ownership;
    std::unique_ptr<Group> group;
  };
  std::map<Id128, GroupSlot> groups_;
  Id128 resizing_;           // its hello comes while it is closed here
  bool regrouping_ = false;  // one change of membership at a time
  // The offer that is being taken now, and its latest hello: a primary says hello again when its sender has started,
  // which may be before the group is formed here.
  Id128 joining_;
  std::string joining_peer_;
  Bytes joining_hello_;
  std::map<Id128, GroupRecord> lost_groups_;           // could not be opened; tried again
  std::map<std::string, std::string> group_troubles_;  // by volume, for status

  Attachments attachments_;
  std::unique_ptr<PeerService> peers_;
  std::unique_ptr<Listener> peer_listener_;
  std::unique_ptr<RpcServer> rpc_;
  std::unique_ptr<Listener> control_listener_;
  std::unique_ptr<MetricsServer> metrics_;
  std::unique_ptr<Listener> metrics_listener_;
  bool started_ = false;
  Timer shutdown_timer_;
  Timer state_timer_;
  Timer reopen_timer_;
  std::map<Id128, std::string> states_seen_;  // of replication, for events
  std::map<std::string, WriteRate> write_rates_;
  Alive alive_;
};

}  // namespace vmferry
