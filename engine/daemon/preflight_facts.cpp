// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/preflight_facts.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>

#include "engine/base/json_integer.h"
#include "engine/migrate/qmp_qemu.h"

namespace vmferry {

namespace {

std::string place_of(const QemuDisk& disk) {
  if (!disk.nbd_socket.empty()) return "unix:" + disk.nbd_socket;
  if (!disk.nbd_host.empty()) return fmt::format("{}:{}", disk.nbd_host, disk.nbd_port);
  if (!disk.vhost_socket.empty()) return "vhost-user-blk:" + disk.vhost_socket;
  return "";
}

// Facts of the QEMU behind a QMP path; a QEMU that cannot be asked is a fact, too.
void ask_qemu(Daemon& daemon, Group* group, const std::string& path, std::function<void(QemuPreflight)> done) {
  auto* qemu = group != nullptr ? dynamic_cast<QmpQemu*>(group->qemu(path)) : nullptr;
  // A QMP socket serves one client. Volumes of one guest that are not one group yet have one Qemu each for it, and
  // another of them may have been asked before.
  for (Group* other : daemon.groups()) {
    if (qemu == nullptr || qemu->connected()) break;
    if (auto* open = dynamic_cast<QmpQemu*>(other->connected_qemu(qemu->path())); open != nullptr) qemu = open;
  }
  if (qemu == nullptr) {
    QemuPreflight none;
    none.error = "no QMP socket is known: give --qmp PATH, or qmp=PATH of the volume";
    return done(none);
  }
  const auto ask = [&daemon, qemu, done] {
    qemu->preflight_facts([&daemon, qemu, done](const Result<QemuFacts>& facts) {
      QemuPreflight result;
      if (facts)
        result = to_preflight(*facts, export_places(daemon));
      else
        result.error = fmt::format("QMP socket '{}': {}", qemu->path(), facts.error().text);
      done(result);
    });
  };
  // Anew, because another QEMU may have taken the socket's path; but never away from one that is being watched.
  if (qemu->connected() && group->handover_under_way()) return ask();
  qemu->connect([qemu, ask, done](const Status& status) {
    if (status) return ask();
    QemuPreflight result;
    result.error = fmt::format("QMP socket '{}': {}", qemu->path(), status.error().text);
    done(result);
  });
}

// How long a record of the handover takes to be durable: the node's state as it is, written again. The best of five,
// because it enters the smallest possible pause: a disk that happens to be busy now is no reason to refuse.
void measure_record(Daemon& daemon, std::function<void(Nanoseconds)> done, Nanoseconds best = 3600 * kSecond,
                    int left = 5) {
  const Nanoseconds begun = daemon.reactor().now();
  daemon.state().update([](NodeRecord&) {},
                        [&daemon, begun, best, left, done = std::move(done)](const Status&) {
                          const Nanoseconds best_now = std::min(best, daemon.reactor().now() - begun);
                          if (left > 1) return measure_record(daemon, done, best_now, left - 1);
                          done(best_now);
                        });
}

}  // namespace

std::map<std::string, std::string> export_places(const Daemon& daemon) {
  std::map<std::string, std::string> places;
  for (const auto& [name, volume] : daemon.volumes()) {
    for (const Endpoint& address : volume->config().nbd_addresses()) places[address.to_string()] = name;
    if (const std::string& path = volume->config().vhost_user_blk; !path.empty())
      places["vhost-user-blk:" + path] = name;
  }
  return places;
}

QemuPreflight to_preflight(const QemuFacts& facts, const std::map<std::string, std::string>& exports) {
  QemuPreflight result;
  result.reachable = true;
  result.version = fmt::format("{}.{}.{}", facts.version_major, facts.version_minor, facts.version_micro);
  result.major = static_cast<uint32_t>(facts.version_major);
  result.machine = facts.machine;
  result.cpu = facts.cpu_model;
  result.ram_bytes = facts.memory_size;
  result.running = facts.state.run == RunState::Running;
  result.paused = facts.state.run == RunState::Paused;
  result.fresh = facts.state.run == RunState::InMigrate && !facts.ever_migrated;
  result.kvm = facts.kvm;
  result.blocked_reasons = facts.blocked_reasons;
  for (const QemuDisk& disk : facts.disks) {
    BlockFacts block;
    block.device = disk.device;
    block.writable = disk.writable;
    block.inserted = !disk.node.empty() || !disk.file.empty();
    block.medium = disk.file;
    block.nbd_without_reconnect = disk.is_nbd() && facts.reconnect_delay == false;
    if (const auto it = exports.find(place_of(disk)); it != exports.end()) block.volume = it->second;
    result.blocks.push_back(std::move(block));
  }
  return result;
}

Json to_json(const QemuPreflight& qemu) {
  Json blocks = Json::array();
  for (const BlockFacts& block : qemu.blocks) {
    blocks.push_back({{"device", block.device},
                      {"volume", block.volume},
                      {"writable", block.writable},
                      {"inserted", block.inserted},
                      {"medium", block.medium},
                      {"nbd_without_reconnect", block.nbd_without_reconnect}});
  }
  return {{"reachable", qemu.reachable},
          {"error", qemu.error},
          {"version", qemu.version},
          {"machine", qemu.machine},
          {"cpu", qemu.cpu},
          {"ram_bytes", qemu.ram_bytes},
          {"running", qemu.running},
          {"paused", qemu.paused},
          {"fresh", qemu.fresh},
          {"kvm", qemu.kvm},
          {"major", qemu.major},
          {"blocked_reasons", qemu.blocked_reasons},
          {"blocks", blocks}};
}

Result<QemuPreflight> qemu_preflight_from_json(const Json& value) {
  QemuPreflight qemu;
  // The one place where the library's exceptions are let in: every member has to be there with its type.
  try {
    qemu.reachable = value.at("reachable").get<bool>();
    qemu.error = value.at("error").get<std::string>();
    qemu.version = value.at("version").get<std::string>();
    qemu.machine = value.at("machine").get<std::string>();
    qemu.cpu = value.at("cpu").get<std::string>();
    qemu.ram_bytes = integer_at<uint64_t>(value, "ram_bytes");
    qemu.running = value.at("running").get<bool>();
    qemu.paused = value.at("paused").get<bool>();
    qemu.fresh = value.at("fresh").get<bool>();
    qemu.kvm = value.at("kvm").get<bool>();
    qemu.major = integer_at<uint32_t>(value, "major");
    qemu.blocked_reasons = value.at("blocked_reasons").get<std::vector<std::string>>();
    for (const Json& item : value.at("blocks")) {
      BlockFacts block;
      block.device = item.at("device").get<std::string>();
      block.volume = item.at("volume").get<std::string>();
      block.writable = item.at("writable").get<bool>();
      block.inserted = item.at("inserted").get<bool>();
      block.medium = item.at("medium").get<std::string>();
      block.nbd_without_reconnect = item.at("nbd_without_reconnect").get<bool>();
      qemu.blocks.push_back(std::move(block));
    }
  } catch (const Json::exception& error) {
    return fail(ErrorKind::Corrupt, "the peer's answer to preflight cannot be read: {}", error.what());
  }
  return qemu;
}

void Daemon::answer_preflight(const Json& request, std::function<void(Result<Json>)> answer) {
  const auto volumes = request.find("volumes");
  if (!request.is_object() || volumes == request.end() || !volumes->is_array() || volumes->empty()) {
    return answer(fail(ErrorKind::InvalidArgument, "preflight without volumes"));
  }
  Json facts = Json::array();
  Group* first = nullptr;
  std::string not_ready;
  for (const Json& item : *volumes) {
    const std::string name = item.is_string() ? item.get<std::string>() : "";
    const auto it = volumes_.find(name);
    if (failed_.contains(name)) not_ready = volume(name).error().text;
    if (it == volumes_.end()) continue;  // missing in the answer: missing here
    Group* const group = group_of(name);
    if (group == nullptr) {
      not_ready = fmt::format("volume '{}' is being regrouped", name);
      continue;
    }
    if (first == nullptr) first = group;
    const Ownership& ownership = group->ownership();
    if (group->coordinator().migrating()) not_ready = fmt::format("a migration of volume '{}' is under way", name);
    facts.push_back({{"name", name},
                     {"size", it->second->device().size()},
                     {"secondary", ownership.role == Role::Secondary && !ownership.split_brain},
                     {"foreign_data", group->holds_foreign_data()}});
  }
  std::error_code ignored;
  const auto space = std::filesystem::space(config_.state_dir, ignored);
  const Json base{{"volumes", facts}, {"not_ready", not_ready}, {"staging_free", space.available}};
  measure_record(*this, [this, first, base, answer = std::move(answer)](Nanoseconds record_time) {
    ask_qemu(*this, first, "", [base, record_time, answer](const QemuPreflight& qemu) {
      Json result = base;
      result["record_ns"] = record_time;
      result["qemu"] = to_json(qemu);
      answer(result);
    });
  });
}

namespace {

Status read_peer(const Json& answer, PreflightFacts& facts) {
  try {
    for (const Json& item : answer.at("volumes")) {
      const auto it = std::find_if(facts.volumes.begin(), facts.volumes.end(), [&](const VolumeFacts& volume) {
        return volume.name == item.at("name").get<std::string>();
      });
      if (it == facts.volumes.end()) continue;
      it->size_there = integer_at<uint64_t>(item, "size");
      it->secondary_there = item.at("secondary").get<bool>();
      it->foreign_data_there = item.at("foreign_data").get<bool>();
    }
    facts.peer_not_ready_reason = answer.at("not_ready").get<std::string>();
    facts.staging_free_there = integer_at<uint64_t>(answer, "staging_free");
    // It only enters a prediction, but a prediction refuses: nothing above a minute, nothing negative.
    facts.fsync_there = std::clamp<Nanoseconds>(integer_at<int64_t>(answer, "record_ns"), 0, 60 * kSecond);
    auto qemu = qemu_preflight_from_json(answer.at("qemu"));
    if (!qemu) return tl::unexpected(qemu.error());
    facts.destination = std::move(*qemu);
  } catch (const Json::exception& error) {
    return fail(ErrorKind::Corrupt, "the peer's answer to preflight cannot be read: {}", error.what());
  }
  return {};
}

// What the link carried lately was this guest's own writes, and no cap made it that: then it would have carried more if
// it could.
bool is_under_load(const Daemon& daemon, const PreflightWish& wish) {
  Group* const group = daemon.group_of(wish.volumes.front());
  if (group == nullptr || group->sender() == nullptr || group->record().peer != wish.peer) return false;
  if (group->record().replication.bandwidth != 0) return false;
  return group->sender()->status().state == ReplicationState::CatchingUp;
}

void ask_peer(Daemon& daemon, const PreflightWish& wish, PreflightFacts facts,
              const std::function<void(Result<PreflightFacts>)>& done) {
  const auto without_peer = [done](PreflightFacts known, std::string why) {
    known.peer_connected = false;
    known.peer_trouble = std::move(why);
    done(std::move(known));
  };
  if (daemon.peers().link(wish.peer) == nullptr)
    return without_peer(facts, fmt::format("there is no peer '{}'; see: vmferry peer list", wish.peer));
  // A ping waits for a connection, so that a peer that is about to come back is not refused.
  measure_round_trip(
      daemon, wish.peer, [&daemon, wish, facts, done, without_peer](const Result<Nanoseconds>& rtt) mutable {
        if (!rtt)
          return without_peer(facts, fmt::format("peer '{}' cannot be reached: {}", wish.peer, rtt.error().text));
        PeerLink* const link = daemon.peers().link(wish.peer);
        if (link == nullptr) return without_peer(facts, fmt::format("peer '{}' was removed", wish.peer));
        facts.peer_connected = true;
        facts.rtt = *rtt;
        if (const PeerRecord* const record = daemon.peers().find(wish.peer); record != nullptr)
          facts.peer_grants_migrate = record->granted.migrate_in;
        link->request("preflight", Json{{"volumes", wish.volumes}}.dump(),
                      [&daemon, wish, facts, done, without_peer](const Result<std::string>& text) mutable {
                        const auto answer = text ? parse_json(*text) : Result<Json>(tl::unexpected(text.error()));
                        const Status read = answer ? read_peer(*answer, facts) : tl::unexpected(answer.error());
                        if (!read)
                          return without_peer(facts, fmt::format("peer '{}': {}", wish.peer, read.error().text));
                        if (const PeerLink* const present = daemon.peers().link(wish.peer); present != nullptr) {
                          facts.link_rate = present->figures().send_rate;
                          facts.link_rate_is_limit = is_under_load(daemon, wish);
                        }
                        measure_write_load(daemon, wish.volumes, link_rate_max(facts),
                                           [facts, done](uint64_t wire_rate) mutable {
                                             facts.disk_dirty_rate = wire_rate;
                                             done(facts);
                                           });
                      });
      });
}

}  // namespace

void gather_preflight(Daemon& daemon, const PreflightWish& wish, std::function<void(Result<PreflightFacts>)> done) {
  PreflightFacts facts;
  facts.peer_name = wish.peer;
  facts.overwrite_peer = wish.overwrite_peer;
  facts.downtime_limit = wish.downtime_limit;
  Group* first = nullptr;
  for (const std::string& name : wish.volumes) {
    const auto volume = daemon.volume(name);
    if (!volume) return done(tl::unexpected(volume.error()));
    Group* const group = daemon.group_of(name);
    if (group == nullptr) return done(fail(ErrorKind::Busy, "volume '{}' is being regrouped; try again", name));
    if (first == nullptr) first = group;
    const Ownership& ownership = group->ownership();
    VolumeFacts volume_facts;
    volume_facts.name = name;
    volume_facts.size_here = (*volume)->device().size();
    volume_facts.primary_here = ownership.role == Role::Primary;
    facts.volumes.push_back(std::move(volume_facts));
    if (!may_run(ownership)) facts.not_owner_reason = explain(ownership);
    if (group->coordinator().migrating())
      facts.not_owner_reason = fmt::format("a migration of '{}' is under way", name);
    // Without --bandwidth the cap that its replication has stays.
    facts.bandwidth_cap = wish.bandwidth != 0 || group->record().peer != wish.peer
                              ? wish.bandwidth
                              : group->record().replication.bandwidth;
    facts.staging_needed += std::min<uint64_t>((*volume)->device().dirty_bytes(), 1_GiB);
  }
  // First of all our own side: also a refusal for the peer's sake says where the guest is.
  ask_qemu(daemon, first, wish.qmp_path, [&daemon, wish, facts, done](const QemuPreflight& qemu) mutable {
    facts.source = qemu;
    measure_record(daemon, [&daemon, wish, facts, done](Nanoseconds record_time) mutable {
      facts.fsync_here = record_time;
      ask_peer(daemon, wish, facts, done);
    });
  });
}

namespace {

struct RoundTrip {
  int left = 0;
  Nanoseconds shortest = INT64_MAX;
};

void ping_again(Daemon& daemon, const std::string& peer, RoundTrip trip, const PeerLink::PingDone& done) {
  daemon.peers().ping(peer, [&daemon, peer, trip, done](const Result<Nanoseconds>& rtt) mutable {
    if (!rtt && trip.shortest == INT64_MAX) return done(rtt);
    if (rtt) trip.shortest = std::min(trip.shortest, *rtt);
    if (!rtt || --trip.left == 0) return done(trip.shortest);
    ping_again(daemon, peer, trip, done);
  });
}

}  // namespace

void measure_round_trip(Daemon& daemon, const std::string& peer, const PeerLink::PingDone& done) {
  ping_again(daemon, peer, {.left = 4}, done);
}

uint64_t disk_bytes_to_send(Volume& volume) {
  if (volume.device().tracking()) return volume.device().dirty_bytes();
  struct stat info {};
  if (stat(volume.store().path().c_str(), &info) == 0 && S_ISREG(info.st_mode)) {
    return std::min<uint64_t>(static_cast<uint64_t>(info.st_blocks) * 512, volume.device().size());
  }
  return volume.device().size();
}

double estimate_seconds(Daemon& daemon, const std::vector<std::string>& volumes, const PreflightFacts& facts) {
  uint64_t bytes = facts.source.ram_bytes;
  for (const std::string& name : volumes) {
    if (const auto volume = daemon.volume(name); volume) bytes += disk_bytes_to_send(**volume);
  }
  uint64_t rate = facts.bandwidth_cap != 0 ? facts.bandwidth_cap : facts.link_rate;
  if (rate == 0) rate = 125'000'000;  // nothing was sent yet: a fast link, so the estimate is a lower bound
  return static_cast<double>(bytes) * kTypicalReduction / static_cast<double>(rate);
}

}  // namespace vmferry
