// SPDX-License-Identifier: Apache-2.0
//
// Volumes of a daemon: opened together with their group, added, removed; and what becomes of those that fail.
//
// A volume that cannot be opened (its file is missing, its metadata damaged, its socket taken) does not keep the others
// from being served. It is listed with its reason and has no export; `volume add` with its name tries it again. The
// volumes of one guest fail together, because their group is sealed, written and handed over as one.
#include <filesystem>
#include <set>
#include <utility>

#include "engine/base/log.h"
#include "engine/base/text.h"
#include "engine/daemon/daemon.h"
#include "engine/runtime/steps.h"

namespace vmferry {

namespace {

// As in --volume: a doubled comma stands for one.
std::string option_value(const std::string& value) {
  std::string text;
  for (const char c : value) text.append(c == ',' ? 2 : 1, c);
  return text;
}

}  // namespace

Result<Volume*> Daemon::volume(const std::string& name) const {
  if (const auto it = volumes_.find(name); it != volumes_.end()) return it->second.get();
  if (const auto it = failed_.find(name); it != failed_.end()) {
    return fail(ErrorKind::Unavailable, "volume '{}' has failed: {}", name, it->second.reason);
  }
  return fail(ErrorKind::NotFound, "there is no volume '{}'; see: vmferry volume list", name);
}

// A socket that nobody accepts on would leave its clients waiting for ever.
Status Daemon::check_passed_sockets(const NodeRecord& record) const {
  const auto add = [](std::string& list, const std::string& item) { list += (list.empty() ? "" : ", ") + item; };
  std::set<std::string> names;
  for (const VolumeConfig& volume : config_.volumes) names.insert(volume.name);
  for (const auto& [name, volume] : record.volumes) names.insert(name);
  std::string strangers;
  for (const auto& [name, addresses] : passed_.addresses()) {
    if (!names.contains(name)) add(strangers, fmt::format("'{}' ({})", printable(name), addresses.front().to_string()));
  }
  if (strangers.empty()) return {};
  std::string known;
  for (const std::string& name : names) add(known, name);
  return fail(ErrorKind::NotFound,
              "the service manager passed a socket named {}, and there is no such volume: FileDescriptorName= in the "
              ".socket unit has to be the name of a volume (there {})",
              strangers, known.empty() ? "is none" : "are: " + known);
}

Status Daemon::make_volume(const VolumeConfig& given, Volume::Origin origin) {
  if (auto apart = attachments_.check_path(given.path); !apart) return apart;
  VolumeConfig config = given;
  const std::vector<PassedSocket>* const sockets = passed_.of_volume(config.name);
  config.passed.clear();
  if (sockets != nullptr) {
    for (const PassedSocket& socket : *sockets) config.passed.push_back(socket.address);
  }
  // Before a file is made. Also for a recorded one: it was accepted under another configuration of the daemon.
  if (auto same = check_passed(config); !same) return same;
  if (auto safe = check_nbd_tls(config_.nbd_tls, config); !safe) return safe;
  auto volume = Volume::create(reactor_, config, path_in_state("volumes/" + config.name + ".meta"), origin);
  if (!volume) return tl::unexpected(volume.error());
  (*volume)->set_nbd({config_.nbd_tls, nbd_credentials_, config_.nbd_limits, sockets});
  (*volume)->set_peer_name([this, name = config.name] {
    const Group* const group = group_of(name);
    return group != nullptr ? group->record().peer : std::string();
  });
  volumes_.emplace(config.name, std::move(*volume));
  return {};
}

void Daemon::make_new_volumes() {
  for (const VolumeConfig& config : config_.volumes) {
    if (state_->record().volumes.contains(config.name)) continue;
    if (auto made = make_volume(config, Volume::Origin::New); !made) note_failure(config, made.error().text, false);
  }
}

void Daemon::open_volumes(Done done) {
  std::vector<AsyncStep> steps;
  for (const auto& entry : state_->record().groups) {  // clang 14 captures no structured binding
    steps.push_back(
        [this, record = entry.second](StepDone next) { open_volumes_of(record, [next](const Status&) { next({}); }); });
  }
  run_steps(std::move(steps), std::move(done));
}

// The volumes of one group, the group, and their exports. When something fails, all of it is closed and noted.
void Daemon::open_volumes_of(const GroupRecord& record, Done done) {
  const auto culprit = std::make_shared<std::string>(record.members.front());
  std::vector<AsyncStep> steps;
  for (const std::string& name : record.members) {
    steps.push_back([this, name, culprit](StepDone next) {
      *culprit = name;
      if (!volumes_.contains(name)) {
        const auto origin = started_ ? Volume::Origin::Retried : Volume::Origin::Recorded;
        if (auto made = make_volume(state_->record().volumes.at(name), origin); !made) {
          return next(made);
        }
      }
      volumes_.at(name)->open(std::move(next));
    });
  }
  steps.push_back([this, record](StepDone next) { open_group(record, std::move(next)); });
  for (const std::string& name : record.members) {
    steps.push_back([this, name, culprit](StepDone next) {
      *culprit = name;
      next(volumes_.at(name)->serve());
    });
  }
  run_steps(std::move(steps), [this, record, culprit, done = std::move(done)](const Status& status) {
    if (status) return done(status);
    fail_volumes_of(record, *culprit, status.error(), done);
  });
}

void Daemon::fail_volumes_of(const GroupRecord& record, const std::string& culprit, const Error& error, Done done) {
  std::vector<AsyncStep> steps;
  for (const std::string& name : record.members) {
    if (!volumes_.contains(name)) continue;
    steps.push_back(
        [stopped = volumes_.at(name).get()](StepDone next) { stopped->stop_serving([next] { next({}); }); });
  }
  steps.push_back([this, id = record.id](StepDone next) { close_groups({id}, std::move(next)); });
  for (const std::string& name : record.members) {
    if (!volumes_.contains(name)) continue;
    steps.push_back([closed = volumes_.at(name).get()](StepDone next) { closed->close(std::move(next)); });
  }
  run_all_steps(std::move(steps), [this, record, culprit, error, done = std::move(done)](const Status&) {
    reactor_.post([this, record, culprit, error, done] {
      for (const std::string& name : record.members) {
        volumes_.erase(name);
        note_failure(state_->record().volumes.at(name),
                     name == culprit
                         ? error.text
                         : fmt::format("it is of one guest with '{}', and that failed: {}", culprit, error.text),
                     true);
      }
      done(tl::unexpected(error));
    });
  });
}

void Daemon::note_failure(const VolumeConfig& config, const std::string& reason, bool recorded) {
  const std::string text =
      fmt::format("{}. To try again: vmferry volume add name={},path={}. To give it up: vmferry volume remove {}",
                  reason, config.name, option_value(config.path), config.name);
  log::error("volume={} state=failed reason=\"{}\"", config.name, text);
  events_.add("volume_failed", {{"volume", config.name}, {"reason", text}});
  failed_[config.name] = {config, text, recorded};
}

void Daemon::add_volume(const VolumeConfig& config, Done done) {
  if (volumes_.contains(config.name)) {
    return done(fail(ErrorKind::Exists, "volume '{}' exists already", config.name));
  }
  const auto failed = failed_.find(config.name);
  if (failed == failed_.end()) return add_new_volume(config, std::move(done));
  const VolumeConfig merged = with_settings(failed->second.config, config);
  if (failed->second.recorded) return retry_volume(merged, std::move(done));
  add_new_volume(merged, [this, name = config.name, done = std::move(done)](const Status& status) {
    if (status) failed_.erase(name);
    done(status);
  });
}

void Daemon::add_new_volume(const VolumeConfig& config, Done done) {
  if (auto made = make_volume(config, Volume::Origin::New); !made) return done(made);
  Volume* const added = volumes_.at(config.name).get();
  const GroupRecord record = new_group_record({config.name}, config.secondary ? Role::Secondary : Role::Primary);
  run_steps({[added](StepDone next) { added->open(std::move(next)); },
             [this, config, record](StepDone next) {
               state_->update(
                   [&](NodeRecord& node) {
                     node.volumes[config.name] = config;
                     node.groups.emplace(record.id, record);
                   },
                   std::move(next));
             },
             [this, record](StepDone next) { open_group(record, std::move(next)); },
             [added](StepDone next) { next(added->serve()); }},
            [this, name = config.name, id = record.id, done = std::move(done)](const Status& status) {
              if (status) {
                volumes_.at(name)->keep_files();
                events_.add("volume_added", {{"volume", name}});
                return done(status);
              }
              drop_volume(name, id, [done, status](const Status&) { done(status); });
            });
}

// Its group is closed, so that nothing else can change meanwhile but by us.
void Daemon::retry_volume(VolumeConfig config, Done done) {  // by value: it may be out of failed_
  if (regrouping_) return done(fail(ErrorKind::Busy, "another group is being formed; try again"));
  const GroupRecord* const found = find_group_of(state_->record(), config.name);
  if (found == nullptr) return done(fail(ErrorKind::Internal, "volume '{}' is of no group", config.name));
  regrouping_ = true;
  const GroupRecord record = *found;
  for (const std::string& name : record.members) failed_.erase(name);
  run_steps({[this, config](StepDone next) {
               state_->update(
                   [&](NodeRecord& node) {
                     VolumeConfig& recorded = node.volumes.at(config.name);
                     const std::optional<uint64_t> grown = recorded.size;
                     recorded = config;
                     if (config.size && grown && *grown > *config.size) recorded.size = grown;
                   },
                   std::move(next));
             },
             [this, record](StepDone next) { open_volumes_of(record, std::move(next)); }},
            [this, record, done = std::move(done)](const Status& status) {
              regrouping_ = false;
              if (!status) return done(status);
              for (const std::string& name : record.members) events_.add("volume_recovered", {{"volume", name}});
              // The peer was told that they have failed.
              connect_anew(*groups_.at(record.id).group);
              done({});
            });
}

Status Daemon::check_not_attached(const std::vector<std::string>& names) const {
  for (const std::string& name : names) {
    const std::string device = attachments_.device_of(name);
    if (device.empty()) continue;
    return fail(ErrorKind::Busy, "volume '{0}' is attached as {1} on this host; first: vmferry detach {0}", name,
                device);
  }
  return {};
}

void Daemon::remove_volume(const std::string& name, Done done) {
  if (const auto* const sockets = passed_.of_volume(name); sockets != nullptr) {
    return done(
        fail(ErrorKind::Busy,
             "the service manager holds a socket for volume '{}' ({}), and its clients would wait for ever: take "
             "it out of the .socket unit and restart vmferryd first",
             name, sockets->front().address.to_string()));
  }
  if (Status free = check_not_attached({name}); !free) return done(free);
  if (failed_.contains(name)) return give_up_volume(name, std::move(done));
  const auto found = volume(name);
  if (!found) return done(tl::unexpected(found.error()));
  Group* const group = group_of(name);
  if (group == nullptr) return done(fail(ErrorKind::Busy, "volume '{}' is being regrouped; try again", name));
  if ((group->record().members.size() > 1 || !group->record().peer.empty())) {
    return done(
        fail(ErrorKind::Busy, "volume '{}' is replicated; end that first: vmferry replicate stop {}", name, name));
  }
  if (const size_t clients = (*found)->connections(); clients > 0) {
    return done(fail(ErrorKind::Busy, "volume '{}' is in use by {} client{}; end the guest or unplug the disk first",
                     name, clients, clients == 1 ? "" : "s"));
  }
  drop_volume(name, group->id(), [this, name, done = std::move(done)](const Status& status) {
    if (status) events_.add("volume_removed", {{"volume", name}});
    done(status);
  });
}

// A volume that has failed leaves its group, whose other volumes begin anew without it and without their peer: what the
// two sides have in common counts for the whole group only.
void Daemon::give_up_volume(const std::string& name, Done done) {
  if (regrouping_) return done(fail(ErrorKind::Busy, "another group is being formed; try again"));
  const auto removed = [this, name, done = std::move(done)](const Status& status) {
    if (status) {
      failed_.erase(name);
      delete_metadata(name);
      events_.add("volume_removed", {{"volume", name}});
    }
    done(status);
  };
  const GroupRecord* const found = find_group_of(state_->record(), name);
  if (found == nullptr) return removed({});
  const GroupRecord old = *found;
  GroupRecord rest = old;
  rest.id = reactor_.new_id();
  rest.peer.clear();
  rest.replication = {};
  std::erase(rest.members, name);
  regrouping_ = true;
  state_->update(
      [&](NodeRecord& node) {
        node.volumes.erase(name);
        node.groups.erase(old.id);
        if (!rest.members.empty()) node.groups[rest.id] = rest;
      },
      [this, old, rest, removed](const Status& status) {
        regrouping_ = false;
        if (!status) return removed(status);
        delete_staging(old.id);
        if (rest.members.empty()) return removed(status);
        retry_volume(failed_.at(rest.members.front()).config, [removed](const Status&) { removed({}); });
      });
}

void Daemon::drop_volume(const std::string& name, const Id128& group, Done done) {
  Volume* const dropped = volumes_.at(name).get();
  run_steps({[dropped](StepDone next) { dropped->stop_serving([next] { next({}); }); },
             [this, group](StepDone next) { close_groups({group}, std::move(next)); },
             [dropped](StepDone next) { dropped->close(std::move(next)); },
             [this, name, group](StepDone next) {
               state_->update(
                   [&](NodeRecord& record) {
                     record.volumes.erase(name);
                     record.groups.erase(group);
                   },
                   std::move(next));
             }},
            [this, name, group, done = std::move(done)](const Status& status) {
              if (!status) return done(status);
              reactor_.post([this, name, group, done] {
                volumes_.erase(name);
                delete_staging(group);
                delete_metadata(name);
                done({});
              });
            });
}

void Daemon::delete_metadata(const std::string& name) {
  std::error_code ignored;
  std::filesystem::remove(path_in_state("volumes/" + name + ".meta"), ignored);
}

}  // namespace vmferry
