// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/commands.h"
#include "engine/daemon/daemon.h"

namespace vmferry {

namespace {

Json volume_json(Daemon& daemon, Volume& volume) {
  Json value{{"name", volume.name()},
             {"state", "ready"},
             {"size", volume.device().size()},
             {"path", volume.store().path()},
             {"exports", volume.export_uris()},
             {"aio", std::string(volume.store().aio_name())},
             {"cache", volume.config().cache == CacheSetting::None ? "none" : "writeback"},
             {"read_only", volume.config().read_only},
             {"description", volume.config().description},
             {"qmp", volume.config().qmp},
             {"dirty_bytes", volume.device().dirty_bytes()}};
  value["attachment"] = daemon.attachments().to_json(volume.name());
  const NbdStats nbd = volume.nbd_stats();
  const VhostStats vhost = volume.vhost_stats();
  value["connections"] = nbd.connections + vhost.connections;
  value["read_bytes"] = nbd.read_bytes_total + vhost.read_bytes_total;
  value["written_bytes"] = nbd.written_bytes_total + vhost.written_bytes_total;
  if (!volume.config().vhost_user_blk.empty()) {
    value["vhost_user_blk"] = {{"connections_total", vhost.connections_total},
                               {"requests", vhost.requests_total},
                               {"errors", vhost.errors_total},
                               {"broken_queues", vhost.broken_queues_total},
                               {"copied_bytes", vhost.copied_bytes_total},
                               {"kicks", vhost.kicks_total},
                               {"calls", vhost.calls_total},
                               {"inflight", vhost.inflight},
                               {"requests_of_queue", vhost.requests_of_queue}};
  }
  if (Group* const group = daemon.group_of(volume.name()); group != nullptr) {
    value["role"] = std::string(to_string(group->ownership().role));
    value["term"] = group->ownership().term;
    value["group"] = group->id().to_string();
    value["peer"] = group->record().peer;
  } else {
    value["role"] = "secondary";  // being regrouped: nobody may write
    value["term"] = 0;
  }
  return value;
}

// The same members as far as they are known: its size only if it was given.
Json failed_json(Daemon& daemon, const std::string& name, const FailedVolume& failed) {
  Json value{{"name", name},
             {"state", "failed"},
             {"error", failed.reason},
             {"size", failed.config.size ? Json(*failed.config.size) : Json(nullptr)},
             {"path", failed.config.path},
             {"exports", Json::array()},
             {"cache", failed.config.cache == CacheSetting::None ? "none" : "writeback"},
             {"read_only", failed.config.read_only},
             {"description", failed.config.description},
             {"qmp", failed.config.qmp},
             {"role", failed.config.secondary ? "secondary" : "primary"},
             {"term", 0},
             {"attachment", daemon.attachments().to_json(name)}};
  if (const GroupRecord* const group = find_group_of(daemon.state().record(), name); group != nullptr) {
    value["role"] = std::string(to_string(group->ownership.role));
    value["term"] = group->ownership.term;
    value["group"] = group->id.to_string();
    value["peer"] = group->peer;
  }
  return value;
}

void answer(const RpcCallPtr& call, const Status& status, const std::function<Json()>& value) {
  if (status)
    call->result(value());
  else
    call->error(status.error());
}

void add(Daemon& daemon, const RpcCallPtr& call) {
  const auto spec = call->text("spec");
  if (!spec) return call->error(spec.error());
  std::vector<ConfigProblem> problems;
  const VolumeConfig config = parse_volume_option(*spec, "", problems);
  if (!problems.empty()) {
    std::string text;
    for (const ConfigProblem& problem : problems) text += (text.empty() ? "" : "; ") + problem.to_string();
    return call->error({ErrorKind::InvalidArgument, text});
  }
  // Relative to what? The caller's working directory is not the daemon's, and that may be another after a restart.
  for (const std::string& path :
       {config.path, config.nbd && config.nbd->is_unix ? config.nbd->path : "", config.vhost_user_blk, config.qmp}) {
    if (path.empty() || path.starts_with('/')) continue;
    return call->error(
        {ErrorKind::InvalidArgument, fmt::format("path '{}' is relative; `volume add` takes absolute paths", path)});
  }
  daemon.add_volume(config, [&daemon, call, name = config.name](const Status& status) {
    answer(call, status, [&] { return volume_json(daemon, **daemon.volume(name)); });
  });
}

void resize(Daemon& daemon, const RpcCallPtr& call) {
  const auto name = call->text("name");
  const auto size_text = call->text("size");
  if (!name) return call->error(name.error());
  if (!size_text) return call->error(size_text.error());
  const auto size = parse_size(*size_text);
  if (!size) return call->error(size.error());
  if (*size % 512 != 0) return call->error({ErrorKind::InvalidArgument, "a size is a multiple of 512"});
  daemon.resize_volume(*name, *size, [&daemon, call, name = *name](const Status& status) {
    answer(call, status, [&] { return volume_json(daemon, **daemon.volume(name)); });
  });
}

}  // namespace

void add_volume_methods(RpcServer& server, Daemon& daemon) {
  server.add_method("volume.list", [&daemon](const RpcCallPtr& call) {
    Json volumes = Json::array();
    for (const auto& [name, volume] : daemon.volumes()) volumes.push_back(volume_json(daemon, *volume));
    for (const auto& [name, failed] : daemon.failed_volumes()) volumes.push_back(failed_json(daemon, name, failed));
    call->result({{"volumes", volumes}});
  });
  server.add_method("volume.show", [&daemon](const RpcCallPtr& call) {
    const auto name = call->text("name");
    if (!name) return call->error(name.error());
    const auto failed = daemon.failed_volumes().find(*name);
    if (failed != daemon.failed_volumes().end()) return call->result(failed_json(daemon, *name, failed->second));
    const auto volume = daemon.volume(*name);
    if (!volume) return call->error(volume.error());
    call->result(volume_json(daemon, **volume));
  });
  server.add_method("volume.add", [&daemon](const RpcCallPtr& call) { add(daemon, call); });
  server.add_method("volume.resize", [&daemon](const RpcCallPtr& call) { resize(daemon, call); });
  server.add_method("volume.remove", [&daemon](const RpcCallPtr& call) {
    const auto name = call->text("name");
    if (!name) return call->error(name.error());
    const auto failed = daemon.failed_volumes().find(*name);
    const auto volume = daemon.volume(*name);
    if (!volume && failed == daemon.failed_volumes().end()) return call->error(volume.error());
    const std::string path = volume ? (*volume)->store().path() : failed->second.config.path;
    daemon.remove_volume(*name, [call, path](const Status& status) {
      answer(call, status, [&] { return Json{{"path", path}}; });
    });
  });
}

}  // namespace vmferry
