// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "engine/base/log.h"
#include "engine/daemon/commands.h"
#include "engine/daemon/daemon.h"
#include "engine/daemon/preflight_facts.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kProgressInterval = 500 * kMillisecond;

struct Wish {
  std::vector<std::string> volumes;
  std::string peer;
  MigrateRequest request;
  uint64_t bandwidth = 0;
  bool dry_run = false;
  bool background = false;
  bool overwrite_peer = false;
};

Result<Wish> read_wish(const RpcCall& call) {
  Wish wish;
  const auto volumes = call.names("volumes");
  const auto peer = call.text("peer");
  const auto qmp = call.optional_text("qmp");
  const auto downtime = call.optional_text("downtime_limit", "300ms");
  const auto timeout = call.optional_text("timeout", "30m");
  const auto bandwidth = call.optional_text("bandwidth");
  for (const auto* text : {&peer, &qmp, &downtime, &timeout, &bandwidth}) {
    if (!*text) return tl::unexpected(text->error());
  }
  if (!volumes) return tl::unexpected(volumes.error());
  wish.volumes = *volumes;
  wish.peer = *peer;
  wish.request.qmp_path = *qmp;
  // The daemon's folder is not the caller's: what is meant would be somebody else's socket, or none.
  if (!qmp->empty() && !qmp->starts_with('/'))
    return fail(ErrorKind::InvalidArgument, "the QMP socket '{}' is no absolute path; give one that begins with /",
                *qmp);
  const auto downtime_limit = parse_duration(*downtime);
  const auto time_limit = parse_duration(*timeout);
  if (!downtime_limit) return tl::unexpected(downtime_limit.error());
  if (!time_limit) return tl::unexpected(time_limit.error());
  if (*downtime_limit <= 0) return fail(ErrorKind::InvalidArgument, "--downtime-limit has to be positive");
  wish.request.downtime_limit = *downtime_limit;
  wish.request.timeout = *time_limit;
  if (!bandwidth->empty() && *bandwidth != "0") {
    const auto rate = parse_bit_rate(*bandwidth);
    if (!rate) return tl::unexpected(rate.error());
    wish.bandwidth = *rate;
  }
  struct Flag {
    const char* name;
    bool* target;
  };
  for (const Flag& flag :
       {Flag{"dry_run", &wish.dry_run}, Flag{"background", &wish.background}, Flag{"detach", &wish.request.detach},
        Flag{"quit_source", &wish.request.quit_source}, Flag{"overwrite_peer", &wish.overwrite_peer}}) {
    const auto value = call.flag(flag.name);
    if (!value) return tl::unexpected(value.error());
    *flag.target = *value;
  }
  return wish;
}

Json progress_json(Group& group, const MigrateProgress& progress) {
  // The link's own figure needs a while of full load; a copy that is under way knows what it sends now.
  uint64_t rate = group.link_figures().send_rate;
  if (group.sender() != nullptr) rate = std::max(rate, group.sender()->status().wire_rate);
  const auto left = seconds_left(progress, {.rate = rate, .reduction = kTypicalReduction});
  return {{"volumes", group.record().members},
          {"phase", std::string(to_string(progress.phase))},
          {"attempt", progress.attempt.is_none() ? Json(nullptr) : Json(progress.attempt.to_string())},
          {"elapsed_s", progress.elapsed_s},
          {"phase_s", progress.phase_s},
          {"rounds", progress.rounds},
          {"remaining_bytes", progress.disk_remaining_bytes},
          {"memory_remaining_bytes", progress.memory_remaining_bytes},
          {"memory_total_bytes", progress.memory_total_bytes},
          {"wire_bytes", {{"disk", progress.wire_bytes_disk}, {"memory", progress.wire_bytes_memory}}},
          {"raw_bytes", {{"disk", progress.raw_bytes_disk}, {"memory", progress.raw_bytes_memory}}},
          {"predicted_last_round_ms", progress.predicted_last_round_ms},
          {"brake_held", progress.brake_held},
          {"send_rate", rate},
          {"eta_s", left ? Json(*left) : Json(nullptr)},
          {"error", progress.error}};
}

Json result_json(const MigrateResult& result) {
  return Json::parse(to_json_line(result));
}

// A refusal before anything was changed: who owns the group, and where its guest was seen (I10).
Json refused(Daemon& daemon, const Wish& wish, const PreflightFacts& facts, const std::string& error) {
  const std::string& volume = wish.volumes.front();
  const Group* const group = daemon.group_of(volume);
  const GroupRecord* const record =
      group != nullptr ? &group->record() : find_group_of(daemon.state().record(), volume);
  MigrateResult result;
  result.outcome = MigrateOutcome::Failed;
  result.owner = "unknown";
  result.error = error;
  if (record != nullptr) {
    const Ownership& ownership = group != nullptr ? group->ownership() : record->ownership;
    result.owner = owner_word(ownership);
    result.guest = guest_place(ownership, facts);
  }
  explain_unknown(result);
  Json json = result_json(result);
  json["begun"] = false;
  return json;
}

// Sends progress of one group's migration to one client until `over`.
struct Follower : std::enable_shared_from_this<Follower> {
  Follower(Daemon& daemon_in, RpcCallPtr call_in, std::string volume_in)
      : daemon(daemon_in), call(std::move(call_in)), volume(std::move(volume_in)), tick(daemon_in.reactor()) {}

  void look() {
    if (over || !call->client_present()) return;
    if (Group* const group = daemon.group_of(volume); group != nullptr) {
      call->progress(progress_json(*group, group->coordinator().progress()));
      if (until_idle && !group->coordinator().migrating()) {
        over = true;
        const auto last = group->coordinator().last_result();
        return last ? call->result(result_json(*last))
                    : call->error({ErrorKind::NotFound, fmt::format("there was no migration of '{}'", volume)});
      }
    }
    tick.start(kProgressInterval, [self = weak_from_this()] {
      if (const auto follower = self.lock()) follower->look();
    });
  }

  Daemon& daemon;
  RpcCallPtr call;
  std::string volume;
  bool until_idle = false;
  bool over = false;
  Timer tick;
};

void run(Daemon& daemon, const RpcCallPtr& call, const Wish& wish, const PreflightFacts& facts, Group& group) {
  ReplicationConfig config = group.record().replication;
  config.overwrite_peer = wish.overwrite_peer;
  config.paused = false;
  if (wish.bandwidth != 0) config.bandwidth = wish.bandwidth;
  if (PeerLink* const link = daemon.peers().link(wish.peer); link != nullptr) link->set_rate_limit(config.bandwidth);
  config.active = true;
  group.change_replication(config);
  MigrateRequest request = wish.request;
  request.memory_bytes = facts.source.ram_bytes;
  auto follower = std::make_shared<Follower>(daemon, call, wish.volumes.front());
  const bool background = wish.background;
  const auto ended = [&daemon, follower, call, background, names = wish.volumes](const MigrateResult& result) {
    Json json = result_json(result);
    daemon.events().add("migration_ended", {{"volumes", names}, {"result", json["result"]}, {"error", json["error"]}});
    follower->over = true;
    if (!background) call->result(json);
  };
  if (const Status begun = group.migrate(request, ended); !begun)
    return call->result(refused(daemon, wish, facts, begun.error().text));
  if (background) {
    call->result({{"result", "started"}, {"volumes", wish.volumes}});
  } else {
    follower->look();
  }
}

void start(Daemon& daemon, const RpcCallPtr& call) {
  const auto wish = read_wish(*call);
  if (!wish) return call->error(wish.error());
  // Of a volume that is not served here nothing is known, least of all where its guest runs.
  for (const std::string& name : wish->volumes) {
    if (const auto served = daemon.volume(name); !served) return call->error(served.error());
  }
  if (const Status free = daemon.check_not_attached(wish->volumes); !free) return call->error(free.error());
  gather_preflight(daemon,
                   {.volumes = wish->volumes,
                    .peer = wish->peer,
                    .qmp_path = wish->request.qmp_path,
                    .overwrite_peer = wish->overwrite_peer,
                    .bandwidth = wish->bandwidth,
                    .downtime_limit = wish->request.downtime_limit},
                   [&daemon, call, wish = *wish](const Result<PreflightFacts>& facts) {
                     if (!facts) return call->result(refused(daemon, wish, {}, facts.error().text));
                     const PreflightReport report = preflight(*facts);
                     for (const std::string& warning : report.warnings)
                       log::warn("preflight volume={} {}", wish.volumes.front(), warning);
                     if (!report.ok()) {
                       std::string text;
                       for (const std::string& problem : report.problems) text += (text.empty() ? "" : "; ") + problem;
                       return call->result(refused(daemon, wish, *facts, text));
                     }
                     if (wish.dry_run) {
                       return call->result({{"result", "possible"},
                                            {"warnings", report.warnings},
                                            {"pause_ms_min", static_cast<double>(report.smallest_pause) / 1e6},
                                            {"estimate_s", estimate_seconds(daemon, wish.volumes, *facts)}});
                     }
                     daemon.form_group(wish.volumes, wish.peer, wish.overwrite_peer,
                                       [&daemon, call, wish, facts = *facts](const Result<Group*>& formed) {
                                         if (!formed)
                                           return call->result(refused(daemon, wish, facts, formed.error().text));
                                         run(daemon, call, wish, facts, **formed);
                                       });
                   });
}

// The group of the named volumes, or the only one that migrates.
Result<Group*> choose(Daemon& daemon, const RpcCallPtr& call) {
  const Json& params = call->params();
  if (params.contains("volumes") && !params["volumes"].empty()) {
    const auto names = call->names("volumes");
    if (!names) return tl::unexpected(names.error());
    return daemon.group_of_all(*names);
  }
  Group* chosen = nullptr;
  for (Group* group : daemon.groups()) {
    if (!group->coordinator().migrating()) continue;
    if (chosen != nullptr) return fail(ErrorKind::InvalidArgument, "several migrations are under way; name the volume");
    chosen = group;
  }
  if (chosen == nullptr) return fail(ErrorKind::NotFound, "no migration is under way");
  return chosen;
}

void show(Daemon& daemon, const RpcCallPtr& call) {
  std::vector<Group*> groups = daemon.groups();
  if (call->params().contains("volumes") && !call->params()["volumes"].empty()) {
    const auto names = call->names("volumes");
    if (!names) return call->error(names.error());
    std::erase_if(groups, [&names](const Group* group) {
      const auto& members = group->record().members;
      return std::none_of(names->begin(), names->end(), [&members](const std::string& name) {
        return std::find(members.begin(), members.end(), name) != members.end();
      });
    });
    for (const std::string& name : *names) {
      if (const auto served = daemon.volume(name); !served) return call->error(served.error());
    }
  }
  Json migrations = Json::array();
  for (Group* group : groups) {
    const auto last = group->coordinator().last_result();
    if (!group->coordinator().migrating() && !last) continue;
    Json entry = progress_json(*group, group->coordinator().progress());
    entry["under_way"] = group->coordinator().migrating();
    if (last) entry["last_result"] = result_json(*last);
    migrations.push_back(std::move(entry));
  }
  call->result({{"migrations", migrations}});
}

void estimate(Daemon& daemon, const RpcCallPtr& call) {
  const auto volumes = call->names("volumes");
  const auto peer = call->text("peer");
  if (!volumes) return call->error(volumes.error());
  if (!peer) return call->error(peer.error());
  PeerLink* const link = daemon.peers().link(*peer);
  if (link == nullptr) return call->error({ErrorKind::NotFound, fmt::format("there is no peer '{}'", *peer)});
  uint64_t bytes = 0;
  for (const std::string& name : *volumes) {
    const auto volume = daemon.volume(name);
    if (!volume) return call->error(volume.error());
    bytes += disk_bytes_to_send(**volume);
  }
  measure_round_trip(daemon, *peer, [&daemon, call, bytes, peer = *peer](const Result<Nanoseconds>& rtt) {
    if (!rtt) return call->error(rtt.error());
    const PeerLink* const present = daemon.peers().link(peer);
    uint64_t rate = present != nullptr ? present->figures().send_rate : 0;
    // The link's own figure needs a while of full load; a copy that is under way knows what it sends now.
    for (Group* group : daemon.groups()) {
      if (group->record().peer != peer || group->sender() == nullptr) continue;
      rate = std::max(rate, group->sender()->status().wire_rate);
    }
    call->result(
        {{"disk_bytes", bytes},
         {"rtt_ms", static_cast<double>(*rtt) / 1e6},
         {"link_rate", rate},
         {"estimate_s", rate > 0 ? Json(static_cast<double>(bytes) * kTypicalReduction / static_cast<double>(rate))
                                 : Json(nullptr)}});
  });
}

}  // namespace

void add_migrate_methods(RpcServer& server, Daemon& daemon) {
  server.add_method("migrate.start", [&daemon](const RpcCallPtr& call) { start(daemon, call); });
  server.add_method("migrate.status", [&daemon](const RpcCallPtr& call) { show(daemon, call); });
  server.add_method("migrate.cancel", [&daemon](const RpcCallPtr& call) {
    const auto group = choose(daemon, call);
    if (!group) return call->error(group.error());
    if (const Status cancelled = (*group)->coordinator().cancel(); !cancelled) return call->error(cancelled.error());
    call->result({{"volumes", (*group)->record().members}});
  });
  server.add_method("migrate.watch", [&daemon](const RpcCallPtr& call) {
    const auto group = choose(daemon, call);
    if (!group) return call->error(group.error());
    auto follower = std::make_shared<Follower>(daemon, call, (*group)->record().members.front());
    follower->until_idle = true;
    call->on_client_left([follower] { follower->over = true; });
    follower->look();
  });
  server.add_method("estimate", [&daemon](const RpcCallPtr& call) { estimate(daemon, call); });
}

}  // namespace vmferry
