// SPDX-License-Identifier: Apache-2.0
//
// Migration capabilities and parameters of a QEMU: set for an attempt, and put back.
#include <algorithm>
#include <array>

#include "engine/migrate/qmp_qemu.h"

namespace vmferry {

namespace {

constexpr const char* kSwitchoverBandwidth = "avail-switchover-bandwidth";  // QEMU 8.2
constexpr uint64_t kBandwidthUnlimited = 1ULL << 40;                        // bytes per second
constexpr uint64_t kDowntimeLimitMaxMs = 2'000'000;                         // QEMU's own bound

// Design section 6: what the stream engine or the handover cannot live with. Names that a QEMU does not list are not
// sent.
constexpr std::array kOff = {
    "multifd",        "xbzrle",       "compress",     "return-path",     "postcopy-ram",        "postcopy-preempt",
    "switchover-ack", "block",        "mapped-ram",   "x-ignore-shared", "background-snapshot", "x-colo",
    "zero-copy-send", "rdma-pin-all", "dirty-bitmaps"};
constexpr std::array kOn = {"events", "pause-before-switchover", "late-block-activate"};

bool contains(const auto& list, std::string_view name) {
  return std::any_of(list.begin(), list.end(), [&](const char* entry) { return name == entry; });
}

}  // namespace

void QmpQemu::set_capabilities(Side side, Done done) {
  client_.execute("query-migrate-capabilities", nullptr, [this, side, done = std::move(done)](Result<Json> listed) {
    if (!listed) return done(tl::unexpected(listed.error()));
    Json wanted = Json::array();
    for (const Json& entry : *listed) {
      const std::string name = qmp::text_of(entry, "capability");
      const bool state = qmp::flag_of(entry, "state");
      const bool off = contains(kOff, name);
      const bool on = name == "events" || (name == "pause-before-switchover" && side == Side::Source) ||
                      (name == "late-block-activate" && side == Side::Destination);
      if ((on && state) || (off && !state) || (!on && !off)) continue;
      wanted.push_back({{"capability", name}, {"state", on}});
    }
    if (wanted.empty()) return done({});
    command("migrate-set-capabilities", {{"capabilities", wanted}}, done);
  });
}

void QmpQemu::capabilities(std::function<void(Result<std::string>)> done) {
  client_.execute("query-migrate-capabilities", nullptr, [done = std::move(done)](Result<Json> listed) {
    if (!listed) return done(tl::unexpected(listed.error()));
    std::string on;
    for (const Json& entry : *listed) {
      const std::string name = qmp::text_of(entry, "capability");
      if (!qmp::flag_of(entry, "state") || !(contains(kOn, name) || contains(kOff, name))) continue;
      on += (on.empty() ? "" : ",") + name;
    }
    done(on);
  });
}

void QmpQemu::restore_capabilities(const std::string& on, Done done) {
  const std::string names = "," + on + ",";
  client_.execute("query-migrate-capabilities", nullptr, [this, names, done = std::move(done)](Result<Json> listed) {
    if (!listed) return done(tl::unexpected(listed.error()));
    Json wanted = Json::array();
    for (const Json& entry : *listed) {
      const std::string name = qmp::text_of(entry, "capability");
      const bool before = names.find("," + name + ",") != std::string::npos;
      if (!(contains(kOn, name) || contains(kOff, name)) || qmp::flag_of(entry, "state") == before) continue;
      wanted.push_back({{"capability", name}, {"state", before}});
    }
    if (wanted.empty()) return restore_parameters(done);
    command("migrate-set-capabilities", {{"capabilities", wanted}}, [this, done](Status status) {
      if (!status) return done(std::move(status));
      restore_parameters(done);
    });
  });
}

void QmpQemu::restore_parameters(Done done) {
  const Json parameters = std::exchange(parameters_before_, Json::object());
  if (parameters.empty()) {
    reactor_.post([done = std::move(done)] { done({}); });
    return;
  }
  command("migrate-set-parameters", parameters, std::move(done));
}

void QmpQemu::set_parameters(const MigrateOptions& options, Done done) {
  client_.execute("query-migrate-parameters", nullptr, [this, options, done = std::move(done)](Result<Json> now) {
    if (!now) return done(tl::unexpected(now.error()));
    Json before = Json::object();
    for (const char* key : {"downtime-limit", "max-bandwidth", kSwitchoverBandwidth})
      if (now->is_object() && now->contains(key)) before[key] = (*now)[key];
    if (parameters_before_.empty()) parameters_before_ = before;
    const auto limit_ms = static_cast<uint64_t>(std::max<Nanoseconds>(options.downtime_limit, 0) / kMillisecond);
    const uint64_t bandwidth = options.bandwidth_max == 0 ? kBandwidthUnlimited : options.bandwidth_max;
    Json wanted{{"downtime-limit", std::min(limit_ms, kDowntimeLimitMaxMs)}, {"max-bandwidth", bandwidth}};
    knows_switchover_bandwidth_ = before.contains(kSwitchoverBandwidth);
    if (knows_switchover_bandwidth_ && options.switchover_bandwidth > 0)
      wanted[kSwitchoverBandwidth] = options.switchover_bandwidth;
    command("migrate-set-parameters", wanted, done);
  });
}

void QmpQemu::set_switchover_bandwidth(uint64_t bytes_per_second) {
  if (!knows_switchover_bandwidth_) return;
  command("migrate-set-parameters", {{kSwitchoverBandwidth, bytes_per_second}}, [](const Status&) {});
}

}  // namespace vmferry
