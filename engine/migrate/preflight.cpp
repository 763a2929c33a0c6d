// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/preflight.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace vmferry {
namespace {

// The tail after `migrate-continue` is about 200 KB, 18 KB compressed (docs/migration.md).
constexpr uint64_t kTailWireBytes = 18'000;
// Loading device state and starting vCPUs, measured 30..60 ms.
constexpr Nanoseconds kLoadTime = 50 * kMillisecond;
// In the path of the pause: Fenced and GoSent here; last epoch (data and record), Primary and Started there.
constexpr int64_t kRecordsHere = 2;
constexpr int64_t kRecordsThere = 4;

double ms(Nanoseconds duration) {
  return static_cast<double>(duration) / static_cast<double>(kMillisecond);
}

class Checks {
 public:
  explicit Checks(const PreflightFacts& facts) : facts_(facts) {}

  PreflightReport run() {
    ownership();
    volumes();
    source_qemu();
    destination_qemu();
    if (facts_.source.reachable && facts_.destination.reachable) {
      both_qemus();
      blocks();
    }
    space();
    pause();
    return std::move(report_);
  }

 private:
  template <typename... Args>
  void problem(fmt::format_string<Args...> format, Args&&... args) {
    report_.problems.push_back(fmt::format(format, std::forward<Args>(args)...));
  }
  template <typename... Args>
  void warning(fmt::format_string<Args...> format, Args&&... args) {
    report_.warnings.push_back(fmt::format(format, std::forward<Args>(args)...));
  }

  void ownership() {
    if (!facts_.not_owner_reason.empty()) problem("{}", facts_.not_owner_reason);
    if (!facts_.peer_trouble.empty()) return problem("{}", facts_.peer_trouble);
    if (!facts_.peer_connected) return problem("peer '{}' is not connected", facts_.peer_name);
    if (!facts_.peer_grants_migrate)
      problem("peer '{}' does not grant us migrate-in; invite it again with --grant", facts_.peer_name);
    if (!facts_.peer_not_ready_reason.empty())
      problem("peer '{}' is not ready: {}", facts_.peer_name, facts_.peer_not_ready_reason);
  }

  void volumes() {
    if (facts_.volumes.empty()) problem("no volume is named");
    if (!facts_.peer_connected) return;
    for (const VolumeFacts& volume : facts_.volumes) {
      if (!volume.primary_here) problem("volume '{}' is not primary here", volume.name);
      if (!volume.size_there) {
        problem("peer '{}' has no volume '{}'; run there: vmferry volume add name={},path=FILE,size={},role=secondary",
                facts_.peer_name, volume.name, volume.name, volume.size_here);
        continue;
      }
      if (*volume.size_there != volume.size_here)
        problem("volume '{}' has {} bytes here and {} at peer '{}'", volume.name, volume.size_here, *volume.size_there,
                facts_.peer_name);
      if (!volume.secondary_there) problem("volume '{}' is not secondary at peer '{}'", volume.name, facts_.peer_name);
      if (volume.foreign_data_there && !facts_.overwrite_peer)
        problem("volume '{}' holds data at peer '{}' that is no earlier copy; add --overwrite-peer to replace it",
                volume.name, facts_.peer_name);
    }
  }

  void source_qemu() {
    const QemuPreflight& qemu = facts_.source;
    if (!qemu.reachable) return problem("the QEMU here does not answer: {}", qemu.error);
    if (!qemu.running && !qemu.paused) problem("the guest here is neither running nor paused");
    for (const std::string& reason : qemu.blocked_reasons) problem("QEMU here cannot migrate: {}", reason);
    constexpr uint32_t kTcgDirtyPagesFixed = 9;
    if (!qemu.kvm && qemu.major < kTcgDirtyPagesFixed)
      warning(
          "QEMU {} here runs the guest without KVM: before 9.0 it loses dirty pages, and the guest may crash at "
          "the peer",
          qemu.version);
  }

  void destination_qemu() {
    if (!facts_.peer_connected) return;
    const QemuPreflight& qemu = facts_.destination;
    if (!qemu.reachable) return problem("the QEMU at peer '{}' does not answer: {}", facts_.peer_name, qemu.error);
    if (!qemu.fresh)
      problem("the QEMU at peer '{}' is not waiting for its first migration; start a fresh one with -incoming defer",
              facts_.peer_name);
  }

  void both_qemus() {
    const QemuPreflight& here = facts_.source;
    const QemuPreflight& there = facts_.destination;
    if (here.machine != there.machine)
      problem("machine type is '{}' here and '{}' at peer '{}'", here.machine, there.machine, facts_.peer_name);
    if (here.cpu != there.cpu)
      problem("CPU model is '{}' here and '{}' at peer '{}'", here.cpu, there.cpu, facts_.peer_name);
    if (here.ram_bytes != there.ram_bytes)
      problem("memory is {} bytes here and {} at peer '{}'", here.ram_bytes, there.ram_bytes, facts_.peer_name);
    if (there.major < here.major)
      warning("QEMU is {} here and {} at peer '{}': an older one may not load the stream", here.version, there.version,
              facts_.peer_name);
  }

  const BlockFacts* find(const QemuPreflight& qemu, const std::string& device) const {
    const auto found = std::find_if(qemu.blocks.begin(), qemu.blocks.end(),
                                    [&device](const BlockFacts& block) { return block.device == device; });
    return found == qemu.blocks.end() ? nullptr : &*found;
  }

  bool is_of_group(const std::string& volume) const {
    return std::any_of(facts_.volumes.begin(), facts_.volumes.end(),
                       [&volume](const VolumeFacts& facts) { return facts.name == volume; });
  }

  void blocks() {
    for (const BlockFacts& block : facts_.source.blocks) {
      if (!block.inserted) continue;
      const BlockFacts* there = find(facts_.destination, block.device);
      if (!block.writable && block.volume.empty()) {
        if (!there || !there->inserted)
          problem("read-only medium '{}' of device '{}' is missing at peer '{}'", block.medium, block.device,
                  facts_.peer_name);
        continue;
      }
      if (block.volume.empty()) {
        problem("device '{}' writes to '{}', which is no volume of this group: its data would stay behind",
                block.device, block.medium);
        continue;
      }
      if (!is_of_group(block.volume)) {
        problem("device '{}' uses volume '{}', which was not named: name all volumes of the guest", block.device,
                block.volume);
        continue;
      }
      if (!there || !there->inserted) {
        problem("device '{}' (volume '{}') is missing in the QEMU at peer '{}'", block.device, block.volume,
                facts_.peer_name);
      } else if (there->volume != block.volume) {
        problem("device '{}' is on volume '{}' here and on '{}' at peer '{}'", block.device, block.volume,
                there->volume.empty() ? there->medium : there->volume, facts_.peer_name);
      }
      if (block.nbd_without_reconnect)
        warning("device '{}': no reconnect-delay on QEMU's command line: the guest sees errors when vmferryd restarts",
                block.device);
      if (there && there->nbd_without_reconnect)
        warning("device '{}' at peer '{}': no reconnect-delay on QEMU's command line", block.device, facts_.peer_name);
    }
    for (const BlockFacts& block : facts_.destination.blocks)
      if (block.inserted && block.writable && !find(facts_.source, block.device))
        problem("device '{}' exists only in the QEMU at peer '{}'", block.device, facts_.peer_name);
  }

  void space() {
    if (facts_.peer_connected && facts_.staging_free_there < facts_.staging_needed)
      problem("peer '{}' has {} bytes free for a staged epoch and needs {}", facts_.peer_name,
              facts_.staging_free_there, facts_.staging_needed);
  }

  void pause() {
    report_.smallest_pause = smallest_pause(facts_);
    if (facts_.downtime_limit > 0 && report_.smallest_pause > facts_.downtime_limit)
      problem(
          "the pause cannot be shorter than {:.0f} ms (round trip {:.0f} ms, fsync {:.1f} ms here and {:.1f} ms "
          "there, loading {:.0f} ms); the limit is {:.0f} ms: allow more with --downtime-limit {:.0f}ms",
          ms(report_.smallest_pause), ms(facts_.rtt), ms(facts_.fsync_here), ms(facts_.fsync_there), ms(kLoadTime),
          ms(facts_.downtime_limit), std::ceil(ms(report_.smallest_pause) * 1.5 / 100) * 100);
    const uint64_t rate = link_rate_max(facts_);
    if (rate > 0 && facts_.disk_dirty_rate + facts_.memory_dirty_rate >= rate)
      problem(
          "the guest makes {} bytes per second to send (disk {}, memory {}) and the link carries {}{}: this never "
          "ends; raise the bandwidth or calm the guest",
          facts_.disk_dirty_rate + facts_.memory_dirty_rate, facts_.disk_dirty_rate,
          facts_.memory_dirty_rate > 0 ? fmt::format("{}", facts_.memory_dirty_rate) : "not counted", rate,
          rate == facts_.bandwidth_cap ? " by the bandwidth that it is given" : "");
  }

  const PreflightFacts& facts_;
  PreflightReport report_;
};

}  // namespace

Nanoseconds smallest_pause(const PreflightFacts& facts) {
  uint64_t rate = facts.link_rate;
  if (facts.bandwidth_cap > 0) rate = rate == 0 ? facts.bandwidth_cap : std::min(rate, facts.bandwidth_cap);
  const Nanoseconds tail = rate == 0
                               ? 0
                               : static_cast<Nanoseconds>(static_cast<double>(kTailWireBytes) /
                                                          static_cast<double>(rate) * static_cast<double>(kSecond));
  return facts.rtt + kRecordsHere * facts.fsync_here + kRecordsThere * facts.fsync_there + tail + kLoadTime;
}

GuestPlace guest_place(const Ownership& ownership, const PreflightFacts& facts) {
  const std::string_view owner = owner_word(ownership);
  if (owner == "source") {
    if (facts.source.running) return GuestPlace::RunningSource;
    // Of a QEMU that waits for a stream nobody can say that it has a guest.
    if (facts.source.reachable && !facts.source.fresh) return GuestPlace::PausedSource;
  }
  // The contract has no word for a guest that is paused at the peer.
  if (owner == "peer" && facts.destination.running) return GuestPlace::RunningPeer;
  return GuestPlace::Unknown;
}

uint64_t link_rate_max(const PreflightFacts& facts) {
  const uint64_t measured = facts.link_rate_is_limit ? facts.link_rate : 0;
  if (facts.bandwidth_cap == 0) return measured;
  return measured == 0 ? facts.bandwidth_cap : std::min(measured, facts.bandwidth_cap);
}

PreflightReport preflight(const PreflightFacts& facts) {
  return Checks(facts).run();
}

}  // namespace vmferry
