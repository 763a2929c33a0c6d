// SPDX-License-Identifier: Apache-2.0
//
// Groups of a daemon: made for new volumes, merged when volumes are first named together, offered by a peer, and
// connected to their peer's link.
#include <algorithm>
#include <set>
#include <utility>

#include "engine/base/log.h"
#include "engine/daemon/daemon.h"
#include "engine/migrate/qmp_qemu.h"
#include "engine/runtime/steps.h"

namespace vmferry {

namespace {

// One staged epoch may hold every block of the group and its records; the file is sparse and trimmed after use.
constexpr uint64_t kStagingSpare = 256U << 20;

uint64_t staging_size(const std::vector<ReplicaVolume>& volumes) {
  uint64_t total = kStagingSpare;
  for (const ReplicaVolume& volume : volumes) total += volume.device->size() + volume.device->size() / 4;
  return round_up(total, 1_MiB);
}

// A connection to a group that is refused before it exists here.
class NoGroup final : public GroupChannelHandler {
 public:
  void channel_connected() override {}
  void channel_disconnected() override {}
  void channel_message(MessageType, ByteSpan) override {}
  void channel_writable(TrafficClass) override {}
};

}  // namespace

GroupRecord Daemon::new_group_record(const std::vector<std::string>& members, Role role) {
  GroupRecord record;
  record.id = reactor_.new_id();
  record.members = members;
  record.ownership.role = role;
  record.ownership.owner = role == Role::Primary ? Owner::Self : Owner::Unknown;
  record.ownership.state = role == Role::Primary ? HandoverState::Own : HandoverState::Secondary;
  return record;
}

Group* Daemon::group_of(const std::string& volume) const {
  for (const auto& [id, slot] : groups_) {
    if (slot.group == nullptr || !slot.group->is_open()) continue;
    const auto& members = slot.group->record().members;
    if (std::find(members.begin(), members.end(), volume) != members.end()) return slot.group.get();
  }
  return nullptr;
}

Result<Group*> Daemon::group_of_all(const std::vector<std::string>& names) const {
  Group* result = nullptr;
  for (const std::string& name : names) {
    if (const auto found = volume(name); !found) return tl::unexpected(found.error());
    Group* const group = group_of(name);
    if (group == nullptr) return fail(ErrorKind::Busy, "{}", why_without_group(name));
    if (result != nullptr && result != group) {
      return fail(ErrorKind::InvalidArgument, "volumes '{}' and '{}' are not of one group", names.front(), name);
    }
    result = group;
  }
  return result;
}

void Daemon::open_group(const GroupRecord& record, Done done) {
  std::vector<ReplicaVolume> volumes;
  for (const std::string& name : record.members) {
    const auto found = volume(name);
    if (!found) return done(tl::unexpected(found.error()));
    volumes.push_back({name, &(*found)->device()});
  }
  const std::string name = name_of_staging(record.id);
  FileStoreOptions file_options{.lock_wait = kLockWaitAtStart, .folder = &groups_folder_};
  const uint64_t needed = staging_size(volumes);
  if (!groups_folder_.holds(name)) file_options.create_size = needed;
  auto staging = FileStore::open(reactor_, name, file_options);
  if (!staging) return done(fail_with(staging.error(), "staging area"));

  GroupSlot& slot = groups_[record.id];
  slot.staging = std::move(*staging);
  GroupOwnershipStore::Arrived arrived;
  if (hooks_->wanted()) arrived = [this](const Id128& attempt) { hooks_->begin(attempt); };
  slot.ownership = std::make_unique<GroupOwnershipStore>(reactor_, *state_, record.id, std::move(arrived));
  std::string qmp;
  for (const std::string& name : record.members) {
    if (qmp.empty()) qmp = volumes_.at(name)->config().qmp;
  }
  GroupParts parts{.executor = reactor_,
                   .ownership = *slot.ownership,
                   .staging = *slot.staging,
                   .make_qemu = [this](const std::string& path_of_qmp) -> std::unique_ptr<Qemu> {
                     return std::make_unique<QmpQemu>(reactor_, path_of_qmp);
                   },
                   .qmp_path = qmp};
  GroupEvents events;
  events.event = [this](const std::string& event, Json fields) { events_.add(event, std::move(fields)); };
  events.config_changed = [this](const GroupRecord& changed) {
    state_->update(
        [&](NodeRecord& node) {
          const auto it = node.groups.find(changed.id);
          if (it == node.groups.end()) return;
          it->second.peer = changed.peer;
          it->second.replication = changed.replication;
        },
        [](const Status& status) {
          if (!status) log::error("replication settings are not saved: {}", status.error().text);
        });
  };
  slot.group = std::make_unique<Group>(record, std::move(volumes), std::move(parts), GroupOptions{}, std::move(events));
  run_steps({[staging_store = slot.staging.get(), needed](StepDone next) {
               if (staging_store->size() >= needed) return next({});
               staging_store->resize(needed, std::move(next));
             },
             [group = slot.group.get()](StepDone next) { group->open(std::move(next)); }},
            [name = record.members.front(), done = std::move(done)](const Status& status) {
              if (!status) return done(fail_with(status.error(), fmt::format("volume '{}'", name)));
              done({});
            });
}

void Daemon::connect_group(Group& group) {
  const std::string& peer = group.record().peer;
  if (peer.empty() || peers_ == nullptr) return;
  PeerLink* const link = peers_->link(peer);
  const PeerRecord* const record = peers_->find(peer);
  if (link == nullptr || record == nullptr) return;
  if (group.record().replication.bandwidth != 0) link->set_rate_limit(group.record().replication.bandwidth);
  group.set_channel(link->open_group(group.id(), group.channel_handler()), {.replicate_in = record->rights.replicate_in,
                                                                            .verify = record->rights.verify,
                                                                            .migrate_in = record->rights.migrate_in});
}

void Daemon::form_group(const std::vector<std::string>& names, const std::string& peer, bool overwrite_peer,
                        std::function<void(Result<Group*>)> done) {
  form_group_when_asked(names, peer, overwrite_peer, false, std::move(done));
}

// Groups are merged only after the peer has said that it would take the result: closing them ends the replication that
// they have, and a refusal afterwards would leave none. While the peer was asked all may have changed, so that every
// check is made again.
void Daemon::form_group_when_asked(const std::vector<std::string>& names, const std::string& peer, bool overwrite_peer,
                                   bool asked, std::function<void(Result<Group*>)> done) {
  const auto refuse = [&](Error error) { done(tl::unexpected(std::move(error))); };
  if (peers_->find(peer) == nullptr) {
    return refuse({ErrorKind::NotFound, fmt::format("there is no peer '{}'; see: vmferry peer list", peer)});
  }
  if (regrouping_) return refuse({ErrorKind::Busy, "another group is being formed; try again"});
  std::set<Group*> present;
  for (const std::string& name : names) {
    if (const auto found = volume(name); !found) return refuse(found.error());
    Group* const group = group_of(name);
    if (group == nullptr) return refuse({ErrorKind::Busy, why_without_group(name)});
    present.insert(group);
    const Ownership& ownership = group->ownership();
    if (ownership.role != Role::Primary || ownership.split_brain) {
      return refuse(
          {ErrorKind::Fenced, fmt::format("volume '{}' is {} here; run the command at the primary, or promote it", name,
                                          ownership.split_brain ? "in split brain" : "secondary")});
    }
    if (!group->record().peer.empty() && group->record().peer != peer) {
      return refuse(
          {ErrorKind::Busy, fmt::format("volume '{}' replicates to '{}'; end that first: vmferry replicate stop {}",
                                        name, group->record().peer, name)});
    }
    for (const std::string& member : group->record().members) {
      if (std::find(names.begin(), names.end(), member) != names.end()) continue;
      return refuse({ErrorKind::InvalidArgument,
                     fmt::format("volume '{}' is of one group with '{}'; name all of them", name, member)});
    }
  }
  Group* const first = *present.begin();
  if (present.size() == 1 && first->record().peer == peer) return done(first);
  if (std::any_of(present.begin(), present.end(), [](Group* group) { return group->coordinator().migrating(); })) {
    return refuse({ErrorKind::Busy, "a migration of one of these volumes is under way"});
  }
  if (present.size() > 1 && !asked) {
    return ask_to_take(names, peer, overwrite_peer, [this, names, peer, overwrite_peer, done](const Status& status) {
      if (!status) return done(tl::unexpected(status.error()));
      form_group_when_asked(names, peer, overwrite_peer, true, done);
    });
  }
  GroupRecord record = new_group_record(names, Role::Primary);
  record.peer = peer;
  std::vector<Id128> old_ids;
  for (Group* group : present) {
    old_ids.push_back(group->id());
    record.ownership.term = std::max(record.ownership.term, group->ownership().term);
    record.ownership.wrote = record.ownership.wrote || group->ownership().wrote;
  }
  replace_groups(old_ids, record, overwrite_peer ? CopyState::Forget : CopyState::Keep, std::move(done));
}

void Daemon::ask_to_take(const std::vector<std::string>& names, const std::string& peer, bool overwrite_peer,
                         Done done) {
  Json volumes = Json::array();
  for (const std::string& name : names)
    volumes.push_back({{"name", name}, {"size", volumes_.at(name)->device().size()}});
  // A ping waits for a connection, so that a peer that is about to come back is not refused.
  peers_->ping(peer, [this, peer, done = std::move(done),
                      request = to_json_line({{"volumes", volumes}, {"overwrite", overwrite_peer}})](
                         const Result<Nanoseconds>& rtt) {
    if (!rtt) return done(fail_with(rtt.error(), fmt::format("peer '{}' cannot be asked for these volumes", peer)));
    PeerLink* const link = peers_->link(peer);
    if (link == nullptr) return done(fail(ErrorKind::NotFound, "peer '{}' was removed", peer));
    link->request("offer", request, [done](const Result<std::string>& answer) {
      if (!answer) return done(tl::unexpected(answer.error()));
      done({});
    });
  });
}

// --- offered by a peer

Result<std::vector<Id128>> Daemon::check_offer(const std::string& peer, const Id128& id,
                                               const GroupHello& hello) const {
  if (const Status allowed = peers_->check_right(peer, &PeerRights::replicate_in); !allowed) {
    return tl::unexpected(allowed.error());
  }
  if (hello.role != static_cast<uint8_t>(Role::Primary)) {
    return fail(ErrorKind::NotFound, "this group is not known here; start replication again at the primary");
  }
  std::set<Id128> old_ids;
  for (const GroupHello::Volume& offered_volume : hello.volumes) {
    const auto it = volumes_.find(offered_volume.name);
    if (failed_.contains(offered_volume.name)) {
      return fail(ErrorKind::Unavailable, "at the peer: {}", volume(offered_volume.name).error().text);
    }
    if (it == volumes_.end()) {
      return fail(ErrorKind::NotFound,
                  "there is no volume '{0}' at the peer; run there: vmferry volume add "
                  "name={0},path=FILE,size={1},role=secondary",
                  offered_volume.name, offered_volume.size);
    }
    const uint64_t size = it->second->device().size();
    if (size != offered_volume.size) {
      return fail(ErrorKind::Mismatch, "volume '{}' has {} bytes at the primary and {} bytes at the peer",
                  offered_volume.name, offered_volume.size, size);
    }
    Group* const group = group_of(offered_volume.name);
    if (group == nullptr)
      return fail(ErrorKind::Busy, "volume '{}' is being regrouped at the peer", offered_volume.name);
    const Ownership& ownership = group->ownership();
    const bool idle = ownership.state == HandoverState::Secondary || ownership.state == HandoverState::Aborted;
    if (ownership.role != Role::Secondary || !idle || ownership.split_brain) {
      return fail(ErrorKind::Fenced, "volume '{0}' is {1} at the peer; run there: vmferry demote {0}",
                  offered_volume.name, ownership.role == Role::Primary ? "primary" : "busy");
    }
    if (!id.is_none() && group->record().left == id) {
      return fail(
          ErrorKind::Denied,
          "replication of volume '{0}' was stopped at the peer; stop it here too (vmferry replicate stop {0}) and "
          "start it again",
          offered_volume.name);
    }
    if (!group->record().peer.empty() && group->record().peer != peer) {
      return fail(ErrorKind::Busy, "volume '{}' is the copy of another peer's; run there: vmferry replicate stop {}",
                  offered_volume.name, offered_volume.name);
    }
    old_ids.insert(group->id());
  }
  return std::vector<Id128>(old_ids.begin(), old_ids.end());
}

// The primary asks whether a group would be taken, before it gives up the groups that it has.
Status Daemon::answer_offer(const std::string& peer, const Json& request) const {
  const auto malformed = [] { return fail(ErrorKind::Corrupt, "a malformed question for a group"); };
  if (!request.is_object()) return malformed();
  const auto volumes = request.find("volumes");
  const auto overwrite = request.find("overwrite");
  if (volumes == request.end() || !volumes->is_array() || volumes->empty() || volumes->size() > kGroupVolumesMax ||
      overwrite == request.end() || !overwrite->is_boolean()) {
    return malformed();
  }
  GroupHello hello;
  hello.role = static_cast<uint8_t>(Role::Primary);
  for (const Json& item : *volumes) {
    if (!item.is_object()) return malformed();
    const auto name = item.find("name");
    const auto size = item.find("size");
    if (name == item.end() || !name->is_string() || size == item.end() || !size->is_number_unsigned()) {
      return malformed();
    }
    if (!is_valid_name(name->get<std::string>())) return malformed();
    hello.volumes.push_back({name->get<std::string>(), size->get<uint64_t>()});
  }
  if (regrouping_) return fail(ErrorKind::Busy, "another group is being formed at the peer; try again");
  if (const auto taken = check_offer(peer, {}, hello); !taken) return tl::unexpected(taken.error());
  if (overwrite->get<bool>()) return {};
  for (const GroupHello::Volume& offered_volume : hello.volumes) {
    const Group* const group = group_of(offered_volume.name);
    // A new group is a copy of nothing yet: what its volumes were copies of does not count any more.
    if (!group->holds_foreign_data() && group->copy_quality() == CopyQuality::None) continue;
    return fail(ErrorKind::Denied,
                "volume '{}' at the peer holds data, and would be copied anew in another group; --overwrite-peer "
                "replaces it",
                offered_volume.name);
  }
  return {};
}

void Daemon::reject_offer(PeerLink& link, const Id128& id, const Error& error) {
  log::warn("peer={} group={} refused: {}", link.name(), id.to_string(), error.text);
  events_.add("peer_refused", {{"peer", link.name()}, {"group", id.to_string()}, {"reason", error.text}});
  NoGroup nobody;
  const auto channel = link.open_group(id, nobody);
  channel->send(TrafficClass::Control, MessageType::GroupReject,
                encode(GroupReject{.kind = error.kind, .reason = error.text.substr(0, kRejectReasonMax)}));
}

void Daemon::offered(PeerLink& link, const Id128& id, ByteSpan payload) {
  if (resizing_ == id) return;  // said again when it is open
  const auto hello = decode_group_hello(payload);
  if (!hello) return reject_offer(link, id, hello.error());
  if (regrouping_ && joining_ == id && joining_peer_ == link.name()) {
    joining_hello_.assign(payload.begin(), payload.end());
    return;
  }
  if (regrouping_) return reject_offer(link, id, {ErrorKind::Busy, "another group is being formed; try again"});
  // Its volumes have failed here; it is neither new nor unknown.
  if (const auto known = state_->record().groups.find(id); known != state_->record().groups.end()) {
    const auto served = volume(known->second.members.front());
    if (!served) return reject_offer(link, id, served.error());
  }
  const auto old_ids = check_offer(link.name(), id, *hello);
  if (!old_ids) return reject_offer(link, id, old_ids.error());
  GroupRecord record = new_group_record({}, Role::Secondary);
  record.id = id;
  record.peer = link.name();
  record.replication.active = true;
  record.ownership.owner = Owner::Peer;
  for (const GroupHello::Volume& offered_volume : hello->volumes) record.members.push_back(offered_volume.name);
  // Terms belong to a group: what these volumes went through before, here or there, says nothing about this one.
  record.ownership.term = hello->term;
  joining_ = id;
  joining_peer_ = link.name();
  joining_hello_.assign(payload.begin(), payload.end());
  replace_groups(*old_ids, record, CopyState::Keep, [this, name = link.name(), id](const Result<Group*>& formed) {
    joining_ = {};
    const Bytes latest = std::exchange(joining_hello_, {});
    if (!formed) {
      PeerLink* const present = peers_->link(name);
      if (present != nullptr) reject_offer(*present, id, formed.error());
      return;
    }
    events_.add("group_joined", {{"volumes", (*formed)->record().members}, {"peer", name}});
    (*formed)->stash_hello(latest);
  });
}

// --- PeerServiceHandler

void Daemon::link_connected(PeerLink& link) {
  events_.add("peer_connected", {{"peer", link.name()}});
}

void Daemon::link_disconnected(PeerLink& link, const Error& error) {
  events_.add("peer_disconnected", {{"peer", link.name()}, {"reason", error.text}});
}

void Daemon::link_unknown_group(PeerLink& link, const Id128& group, MessageType type, ByteSpan payload) {
  if (type == MessageType::GroupHello) return offered(link, group, payload);
  log::debug("peer={} group={} message {} for an unknown group", link.name(), group.to_string(),
             static_cast<unsigned>(type));
}

void Daemon::link_request(PeerLink& link, const std::string& method, const std::string& json,
                          PeerRequests::Answer answer) {
  const auto request = parse_json(json);
  if (!request) return answer(tl::unexpected(request.error()));
  if (method == "preflight") {
    if (const Status allowed = peers_->check_right(link.name(), &PeerRights::migrate_in); !allowed) {
      return answer(tl::unexpected(allowed.error()));
    }
    return answer_preflight(*request, [answer](const Result<Json>& facts) {
      if (!facts) return answer(tl::unexpected(facts.error()));
      answer(facts->dump(-1, ' ', false, Json::error_handler_t::replace));
    });
  }
  if (method == "offer") {
    const Status taken = answer_offer(link.name(), *request);
    if (taken) return answer(std::string("{}"));
    log::warn("peer={} would be refused: {}", link.name(), taken.error().text);
    return answer(tl::unexpected(taken.error()));
  }
  if (method == "resize") return answer_resize(link, *request, std::move(answer));
  answer(fail(ErrorKind::NotFound, "this daemon does not know the question '{}'", method));
}

void Daemon::save_peers(const nlohmann::json& state, std::function<void(Status)> done) {
  state_->update([&](NodeRecord& record) { record.peers = state; }, std::move(done));
}

void Daemon::peer_added(PeerLink& link) {
  if (started_) events_.add("peer_added", {{"peer", link.name()}});  // and not those that were there before
  for (Group* group : groups()) {
    if (group->record().peer == link.name()) connect_group(*group);
  }
}

void Daemon::peer_removed(const std::string& name) {
  events_.add("peer_removed", {{"peer", name}});
}

}  // namespace vmferry
