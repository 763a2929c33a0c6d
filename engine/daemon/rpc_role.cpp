// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/commands.h"
#include "engine/daemon/daemon.h"

namespace vmferry {

namespace {

// What the record says of its ownership holds, but nobody runs on a disk that is not served.
Json failed_json(Daemon& daemon, const std::string& name, const FailedVolume& failed) {
  const GroupRecord* const record = find_group_of(daemon.state().record(), name);
  Ownership ownership;
  if (record != nullptr)
    ownership = record->ownership;
  else
    ownership.role = failed.config.secondary ? Role::Secondary : Role::Primary;
  return {{"name", name},
          {"state", "failed"},
          {"role", std::string(to_string(ownership.role))},
          {"owner", std::string(to_string(ownership.owner))},
          {"term", ownership.term},
          {"attempt", ownership.attempt.is_none() ? Json(nullptr) : Json(ownership.attempt.to_string())},
          {"handover_state", std::string(to_string(ownership.state))},
          {"may_run", false},
          {"phase", std::string(to_string(MigratePhase::Idle))},
          {"split_brain", ownership.split_brain},
          {"reason", "the volume has failed: " + failed.reason},
          {"peer", record != nullptr ? record->peer : ""},
          {"connected", false},
          {"group", record != nullptr ? Json(record->id.to_string()) : Json(nullptr)}};
}

Json status_json(Daemon& daemon) {
  Json volumes = Json::array();
  for (const auto& [name, volume] : daemon.volumes()) {
    // While a group is formed anew there is no object of it for a moment, but always a record: no volume is ever
    // missing in the status.
    Group* const group = daemon.group_of(name);
    const GroupRecord* const record =
        group != nullptr ? &group->record() : find_group_of(daemon.state().record(), name);
    if (record == nullptr) continue;
    const Ownership& ownership = group != nullptr ? group->ownership() : record->ownership;
    std::string reason = explain(ownership);
    if (const std::string trouble = daemon.group_trouble(name); !trouble.empty()) reason += "; " + trouble;
    Json entry{{"name", name},
               {"state", "ready"},
               {"role", std::string(to_string(ownership.role))},
               {"owner", std::string(to_string(ownership.owner))},
               {"term", ownership.term},
               {"attempt", ownership.attempt.is_none() ? Json(nullptr) : Json(ownership.attempt.to_string())},
               {"handover_state", std::string(to_string(ownership.state))},
               {"may_run", may_run(ownership)},
               {"phase", std::string(to_string(group != nullptr && group->is_open() ? group->coordinator().phase()
                                                                                    : MigratePhase::Idle))},
               {"split_brain", ownership.split_brain},
               {"reason", reason},
               {"peer", record->peer},
               {"connected", group != nullptr && group->connected()},
               {"group", record->id.to_string()}};
    volumes.push_back(std::move(entry));
  }
  for (const auto& [name, failed] : daemon.failed_volumes()) volumes.push_back(failed_json(daemon, name, failed));
  Json peers = Json::array();
  for (const PeerStatus& peer : daemon.peers().list()) {
    peers.push_back({{"name", peer.record.name}, {"connected", peer.connected}, {"last_error", peer.last_error}});
  }
  return {{"version", VMFERRY_VERSION}, {"volumes", volumes}, {"peers", peers}};
}

void with_group(Daemon& daemon, const RpcCallPtr& call, const std::function<void(Group&)>& act) {
  const auto names = call->names("volumes");
  if (!names) return call->error(names.error());
  const auto group = daemon.group_of_all(*names);
  if (!group) return call->error(group.error());
  act(**group);
}

HandoverCoordinator::Done answer(Daemon& daemon, const RpcCallPtr& call) {
  return [&daemon, call](const Status& status) {
    if (status)
      call->result(status_json(daemon));
    else
      call->error(status.error());
  };
}

void resolve(Daemon& daemon, const RpcCallPtr& call) {
  const auto how = call->text("how");
  const auto force = call->flag("force");
  if (!how) return call->error(how.error());
  if (!force) return call->error(force.error());
  ResolveChoice choice{};
  if (*how == "run-here")
    choice = ResolveChoice::RunHere;
  else if (*how == "run-at-peer")
    choice = ResolveChoice::RunAtPeer;
  else if (*how == "discard-local")
    choice = ResolveChoice::DiscardLocal;
  else if (*how == "discard-peer")
    choice = ResolveChoice::DiscardPeer;
  else
    return call->error({ErrorKind::InvalidArgument, fmt::format("resolve does not know '{}'", *how)});
  with_group(daemon, call, [&](Group& group) { group.resolve(choice, *force, answer(daemon, call)); });
}

void follow_events(Daemon& daemon, const RpcCallPtr& call) {
  const auto follow = call->flag("follow");
  if (!follow) return call->error(follow.error());
  for (const Json& event : daemon.events().since(0)) call->progress(event);
  if (!*follow) return call->result(Json::object());
  // The call is kept by the watcher, the watcher by the log until the client leaves.
  const uint64_t id = daemon.events().watch([call](const Json& event) { call->progress(event); });
  call->on_client_left([&daemon, id] { daemon.events().unwatch(id); });
}

}  // namespace

void add_role_methods(RpcServer& server, Daemon& daemon) {
  server.add_method("status", [&daemon](const RpcCallPtr& call) { call->result(status_json(daemon)); });
  server.add_method("events", [&daemon](const RpcCallPtr& call) { follow_events(daemon, call); });
  server.add_method("promote", [&daemon](const RpcCallPtr& call) {
    const auto force = call->flag("force");
    const auto accept = call->flag("accept_inconsistent");
    if (!force) return call->error(force.error());
    if (!accept) return call->error(accept.error());
    with_group(daemon, call, [&](Group& group) {
      group.promote({.force = *force, .accept_inconsistent = *accept}, answer(daemon, call));
    });
  });
  server.add_method("demote", [&daemon](const RpcCallPtr& call) {
    with_group(daemon, call, [&](Group& group) {
      if (const Status free = daemon.check_not_attached(group.record().members); !free)
        return call->error(free.error());
      group.coordinator().demote(answer(daemon, call));
    });
  });
  server.add_method("resolve", [&daemon](const RpcCallPtr& call) { resolve(daemon, call); });
}

}  // namespace vmferry
