// SPDX-License-Identifier: Apache-2.0
//
// Gathers what preflight() judges: our QEMU, our volumes, and what the peer says about its own.
// Threads: the reactor's.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "engine/daemon/daemon.h"
#include "engine/migrate/preflight.h"
#include "engine/migrate/qemu_facts.h"

namespace vmferry {

struct PreflightWish {
  std::vector<std::string> volumes;
  std::string peer;
  std::string qmp_path;  // "": the volumes' own
  bool overwrite_peer = false;
  uint64_t bandwidth = 0;  // bytes per second, 0: no cap
  Nanoseconds downtime_limit = 0;
};

// An error: there is no such volume, or no group of it for the moment. Everything else is a fact to be judged.
void gather_preflight(Daemon& daemon, const PreflightWish& wish, std::function<void(Result<PreflightFacts>)> done);

// Shortest of a few pings: one that met a lost packet takes as long as its repetition, and a migration must not be
// refused for it.
void measure_round_trip(Daemon& daemon, const std::string& peer, const PeerLink::PingDone& done);

// One QEMU's facts in preflight's terms; `exports` maps the NBD sockets and ports of our volumes to their names.
QemuPreflight to_preflight(const QemuFacts& facts, const std::map<std::string, std::string>& exports);
std::map<std::string, std::string> export_places(const Daemon& daemon);

// As answered by one daemon and read by the other; every field checked.
Json to_json(const QemuPreflight& qemu);
Result<QemuPreflight> qemu_preflight_from_json(const Json& value);

// Before anything was sent: allocated bytes, or what is dirty. After a reduction that most disks reach.
constexpr double kTypicalReduction = 0.45;
uint64_t disk_bytes_to_send(Volume& volume);
double estimate_seconds(Daemon& daemon, const std::vector<std::string>& volumes, const PreflightFacts& facts);

}  // namespace vmferry
