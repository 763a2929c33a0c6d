// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/commands.h"
#include "engine/daemon/daemon.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kProgressInterval = 500 * kMillisecond;

Json status_of(const std::vector<Group*>& groups) {
  Json volumes = Json::array();
  for (const Group* group : groups) {
    for (Json& entry : group->replication_status()) volumes.push_back(std::move(entry));
  }
  return {{"volumes", volumes}};
}

// Mode, RPO and bandwidth of a command, on top of what the group has.
Result<ReplicationConfig> read_settings(const RpcCallPtr& call, ReplicationConfig config) {
  const auto mode = call->optional_text("mode");
  const auto rpo = call->optional_text("rpo");
  const auto bandwidth = call->optional_text("bandwidth");
  if (!mode) return tl::unexpected(mode.error());
  if (!rpo) return tl::unexpected(rpo.error());
  if (!bandwidth) return tl::unexpected(bandwidth.error());
  if (!mode->empty() && *mode != "batch") {
    const bool known = *mode == "sync" || *mode == "semi-sync" || *mode == "async";
    return fail(ErrorKind::InvalidArgument, "mode '{}' {}; use batch", *mode,
                known ? "is not available in this version" : "does not exist");
  }
  if (!rpo->empty()) {
    const auto value = parse_duration(*rpo);
    if (!value) return tl::unexpected(value.error());
    if (*value < kSecond)
      return fail(ErrorKind::InvalidArgument, "--rpo '{}' is below 1s, the least in mode batch", *rpo);
    config.rpo = *value;
  }
  if (!bandwidth->empty()) {
    if (*bandwidth == "0") {
      config.bandwidth = 0;
    } else {
      const auto value = parse_bit_rate(*bandwidth);
      if (!value) return tl::unexpected(value.error());
      config.bandwidth = *value;
    }
  }
  return config;
}

void apply_bandwidth(Daemon& daemon, const Group& group, const ReplicationConfig& config) {
  if (PeerLink* const link = daemon.peers().link(group.record().peer); link != nullptr) {
    link->set_rate_limit(config.bandwidth);
  }
}

void start(Daemon& daemon, const RpcCallPtr& call) {
  const auto names = call->names("volumes");
  const auto peer = call->text("peer");
  const auto overwrite = call->flag("overwrite_peer");
  if (!names) return call->error(names.error());
  if (!peer) return call->error(peer.error());
  if (!overwrite) return call->error(overwrite.error());
  if (auto settings = read_settings(call, {}); !settings) return call->error(settings.error());
  daemon.form_group(*names, *peer, *overwrite, [&daemon, call, overwrite = *overwrite](const Result<Group*>& formed) {
    if (!formed) return call->error(formed.error());
    Group* const group = *formed;
    auto config = read_settings(call, group->record().replication);
    config->overwrite_peer = overwrite;
    config->paused = false;
    apply_bandwidth(daemon, *group, *config);
    group->start_replication(*config, [call, group](const Status& status) {
      if (!status) return call->error(status.error());
      call->result(status_of({group}));
    });
  });
}

// Runs `act` on the replicated groups of the named volumes, all in one group.
void with_group(Daemon& daemon, const RpcCallPtr& call, const std::function<void(Group&)>& act) {
  const auto names = call->names("volumes");
  if (!names) return call->error(names.error());
  const auto group = daemon.group_of_all(*names);
  if (!group) return call->error(group.error());
  if ((*group)->record().peer.empty()) {
    return call->error({ErrorKind::Unavailable,
                        fmt::format("volume '{}' is not replicated; see: vmferry replicate start", names->front())});
  }
  act(**group);
}

void set_paused(Daemon& daemon, const RpcCallPtr& call, bool paused) {
  with_group(daemon, call, [&](Group& group) {
    // What this side records is read only by a sender: the command would succeed and the copy go on.
    if (group.ownership().role != Role::Primary) {
      return call->error({ErrorKind::Fenced, fmt::format("{} at the primary: this side is the copy, of peer '{}'",
                                                         paused ? "pause" : "resume", group.record().peer)});
    }
    ReplicationConfig config = group.record().replication;
    config.paused = paused;
    group.change_replication(config);
    call->result(status_of({&group}));
  });
}

// Follows a wait: progress to the client, an answer when it is over or too late.
struct Waiting : std::enable_shared_from_this<Waiting> {
  Waiting(Daemon& daemon_in, RpcCallPtr call_in, Group& group_in)
      : daemon(daemon_in), call(std::move(call_in)), group(group_in.id()), tick(daemon_in.reactor()) {}

  Group* find() const {
    for (Group* candidate : daemon.groups()) {
      if (candidate->id() == group) return candidate;
    }
    return nullptr;
  }
  void finish(const Status& status) {
    if (over) return;
    over = true;
    tick.cancel();
    Group* const present = find();
    if (!status) return call->error(status.error());
    Json result{{"state", state}};
    if (present != nullptr) result["volumes"] = present->replication_status();
    call->result(result);
  }
  void look() {
    if (over) return;
    if (!call->client_present()) {
      over = true;
      return;
    }
    Group* const present = find();
    if (present == nullptr) return finish(fail(ErrorKind::NotFound, "replication was stopped"));
    const Json volumes = present->replication_status();
    if (volumes.empty()) return finish(fail(ErrorKind::Unavailable, "replication was stopped"));
    const Json& first = volumes.front();
    if (state != "in-sync" && first["state"] == state) return finish({});
    const std::string reason = first.value("reason", std::string());
    if (daemon.reactor().now() > deadline) {
      return finish(fail(ErrorKind::Timeout, "volume '{}' is {} and not {} after {}: {}",
                         first["name"].get<std::string>(), first["state"].get<std::string>(), state,
                         format_duration(timeout), reason.empty() ? "it takes longer" : reason));
    }
    call->progress({{"state", first["state"]},
                    {"remaining_bytes", first.value("remaining_bytes", Json(0))},
                    {"send_rate", first.value("send_rate", Json(0))}});
    tick.start(kProgressInterval, [self = weak_from_this()] {
      if (const auto waiting = self.lock()) waiting->look();
    });
  }

  Daemon& daemon;
  RpcCallPtr call;
  Id128 group;
  std::string state;
  Nanoseconds timeout = 0;
  Nanoseconds deadline = 0;
  bool over = false;
  Timer tick;
};

void wait(Daemon& daemon, const RpcCallPtr& call) {
  static const std::vector<std::string> kStates{"initial", "catching-up",  "in-sync",      "degraded",
                                                "paused",  "disconnected", "inconsistent", "split-brain"};
  const auto state = call->optional_text("state", "in-sync");
  const auto timeout_text = call->optional_text("timeout", "10m");
  if (!state) return call->error(state.error());
  if (!timeout_text) return call->error(timeout_text.error());
  if (std::find(kStates.begin(), kStates.end(), *state) == kStates.end()) {
    return call->error({ErrorKind::InvalidArgument, fmt::format("--state '{}' does not exist", *state)});
  }
  const auto timeout = parse_duration(*timeout_text);
  if (!timeout) return call->error(timeout.error());
  with_group(daemon, call, [&](Group& group) {
    auto waiting = std::make_shared<Waiting>(daemon, call, group);
    waiting->state = *state;
    waiting->timeout = *timeout;
    waiting->deadline = daemon.reactor().now() + *timeout;
    call->on_client_left([waiting] { waiting->over = true; });  // also keeps it alive as long as the call
    if (*state == "in-sync") {
      group.wait_in_sync([waiting](const Status& status) { waiting->finish(status); });
    }
    waiting->look();
  });
}

// Tells a client how far the verification of a group is, until it is over.
struct VerifyProgress : std::enable_shared_from_this<VerifyProgress> {
  VerifyProgress(Daemon& daemon_in, RpcCallPtr call_in, const Id128& group_in, uint64_t total_in)
      : daemon(daemon_in), call(std::move(call_in)), group(group_in), total(total_in), tick(daemon_in.reactor()) {}
  // Whoever owed the answer is gone: the role changed, or replication was stopped.
  ~VerifyProgress() {
    if (!over) call->error({ErrorKind::Unavailable, "replication from here ended before the verification did"});
  }

  void look() {
    if (over || !call->client_present()) return;
    for (Group* candidate : daemon.groups()) {
      if (candidate->id() != group || candidate->sender() == nullptr) continue;
      call->progress({{"done_bytes", candidate->sender()->status().verified_bytes}, {"total_bytes", total}});
    }
    tick.start(kProgressInterval, [self = weak_from_this()] {
      if (const auto progress = self.lock()) progress->look();
    });
  }

  Daemon& daemon;
  RpcCallPtr call;
  Id128 group;
  uint64_t total;
  bool over = false;
  Timer tick;
};

void verify(Daemon& daemon, const RpcCallPtr& call) {
  with_group(daemon, call, [&](Group& group) {
    uint64_t total = 0;
    std::vector<std::string> names;
    for (const ReplicaVolume& volume : group.volumes()) {
      total += volume.device->size();
      names.push_back(volume.name);
    }
    auto progress = std::make_shared<VerifyProgress>(daemon, call, group.id(), total);
    group.verify([call, total, names, progress](const Result<std::vector<VerifyDifference>>& found) {
      progress->over = true;
      if (!found) return call->error(found.error());
      Json differences = Json::array();
      for (const VerifyDifference& item : *found) {
        differences.push_back(
            {{"volume", names[item.volume]}, {"offset", item.range.offset}, {"length", item.range.length}});
      }
      call->result({{"compared_bytes", total}, {"differences", differences}});
    });
    progress->look();
    call->on_client_left([&daemon, id = group.id(), left = std::weak_ptr(progress)] {
      const auto progress = left.lock();
      if (progress == nullptr || progress->over) return;
      for (Group* candidate : daemon.groups()) {
        if (candidate->id() != id || candidate->sender() == nullptr) continue;
        candidate->sender()->cancel_verify({ErrorKind::Unavailable, "nobody waits for the result any more"});
      }
    });
  });
}

}  // namespace

void add_replicate_methods(RpcServer& server, Daemon& daemon) {
  server.add_method("replicate.start", [&daemon](const RpcCallPtr& call) { start(daemon, call); });
  server.add_method("replicate.set", [&daemon](const RpcCallPtr& call) {
    with_group(daemon, call, [&](Group& group) {
      const auto config = read_settings(call, group.record().replication);
      if (!config) return call->error(config.error());
      apply_bandwidth(daemon, group, *config);
      group.change_replication(*config);
      call->result(status_of({&group}));
    });
  });
  server.add_method("replicate.status", [&daemon](const RpcCallPtr& call) {
    const Json& params = call->params();
    if (!params.contains("volumes") || params["volumes"].empty()) return call->result(status_of(daemon.groups()));
    const auto names = call->names("volumes");
    if (!names) return call->error(names.error());
    std::vector<Group*> chosen;
    for (const std::string& name : *names) {
      const auto found = daemon.volume(name);
      if (!found) return call->error(found.error());
      Group* const group = daemon.group_of(name);
      if (group != nullptr && std::find(chosen.begin(), chosen.end(), group) == chosen.end()) chosen.push_back(group);
    }
    call->result(status_of(chosen));
  });
  server.add_method("replicate.wait", [&daemon](const RpcCallPtr& call) { wait(daemon, call); });
  server.add_method("replicate.verify", [&daemon](const RpcCallPtr& call) { verify(daemon, call); });
  server.add_method("replicate.pause", [&daemon](const RpcCallPtr& call) { set_paused(daemon, call, true); });
  server.add_method("replicate.resume", [&daemon](const RpcCallPtr& call) { set_paused(daemon, call, false); });
  server.add_method("replicate.stop", [&daemon](const RpcCallPtr& call) {
    with_group(daemon, call, [&](Group& group) {
      daemon.forget_peer_of(group, [call](const Status& status) {
        if (!status) return call->error(status.error());
        call->result({{"volumes", Json::array()}});
      });
    });
  });
}

}  // namespace vmferry
