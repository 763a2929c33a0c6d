// SPDX-License-Identifier: Apache-2.0
//
// One host of the simulator: disks that survive, a daemon made of the real classes that comes and goes, and QEMUs.
//
// The daemon is engine/daemon/group.h over TrackedDevice, as vmferryd builds it; only files, sockets and processes are
// simulated. The node's record is the real JSON in a real DurableRecord.
// Threads: the world's.
#pragma once

#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "blockdev/durable_record.h"
#include "engine/daemon/group.h"
#include "tests/sim/disk_model.h"
#include "tests/sim/sim_disk.h"
#include "tests/sim/sim_link.h"
#include "tests/sim/sim_qemu.h"

namespace vmferry::sim {

struct Faults {
  TrackFaults track;
  ReplicateFaults replicate;
  HandoverFaults handover;
};

struct HostSettings {
  std::string name;
  std::string peer;
  size_t index = 0;
  std::vector<uint64_t> volume_sizes;
  Role role = Role::Primary;
  Id128 group{};
  Faults faults;
};

struct DiskRequest final : BlockCompletion {
  BlockRequest request;
  Bytes data;
  size_t volume = 0;
  uint64_t first = 0;              // sector
  std::vector<uint64_t> versions;  // of a write
  uint64_t flush_sequence = 0;
  std::function<void(DiskRequest&, Errno)> answer;  // runs on `reply_to`; not after the guest died
  SimExecutor* reply_to = nullptr;
  Host* host = nullptr;
  bool orphaned = false;  // nobody waits for the answer any more

  void block_done(BlockRequest&, Errno error) noexcept override;
};

class Host {
 public:
  Host(SimWorld& world, SimLink& link, Oracle& oracle, HostSettings settings, SimDiskTotals& totals);
  ~Host();

  const std::string& name() const { return settings_.name; }
  size_t index() const { return settings_.index; }
  SimWorld& world() const { return world_; }
  SimExecutor& executor() { return executor_; }

  // --- the daemon
  bool daemon_runs() const { return daemon_ != nullptr; }
  bool serving() const { return daemon_ != nullptr && daemon_->serving; }
  void start_daemon();
  void kill_daemon();                            // SIGKILL
  void stop_daemon(std::function<void()> done);  // SIGTERM
  void lose_power();                             // everything on this host dies
  Group* group() { return serving() ? daemon_->group.get() : nullptr; }
  const std::optional<Error>& start_error() const { return start_error_; }

  // Ownership as it is durable, whether or not a daemon runs. What an observer would find after a crash now.
  const Ownership& durable_ownership() const { return durable_.ownership; }
  SimDisk& store(size_t volume) const { return *stores_[volume]; }
  size_t volume_count() const { return stores_.size(); }
  bool accepts_writes() const;
  bool parks_writes() const;

  // --- QEMU
  std::shared_ptr<QemuProcess> spawn_qemu(QemuProcess::Start start);
  std::shared_ptr<QemuProcess> qemu() const;  // the newest, alive or not; nullptr when there never was one
  ProcessFate fate_of(const ProcessIdentity& identity) const;
  ProcessIdentity identity_of(const QemuProcess& process) const;

  // --- disk requests of guests
  void submit(std::unique_ptr<DiskRequest> request);
  bool requests_outstanding() const { return !requests_.empty(); }
  void orphan_requests(const SimExecutor& of);

  const HostSettings& settings() const { return settings_; }

 private:
  friend struct DiskRequest;
  class Record;
  struct Daemon {
    std::vector<std::unique_ptr<TrackedDevice>> devices;
    std::unique_ptr<Record> record;
    std::unique_ptr<Group> group;
    bool serving = false;
  };

  void open_devices(size_t next);
  void make_group();
  void forward(DiskRequest& request);
  void answered(DiskRequest& request, Errno error);
  void end_daemon();
  GroupRecord first_record() const;

  SimWorld& world_;
  SimLink& link_;
  Oracle& oracle_;
  const HostSettings settings_;
  SimExecutor& executor_;
  std::vector<std::unique_ptr<SimDisk>> stores_;
  std::vector<std::unique_ptr<SimDisk>> metadata_;
  std::unique_ptr<SimDisk> staging_;
  std::unique_ptr<SimDisk> record_disk_;
  GroupRecord durable_;
  std::unique_ptr<Daemon> daemon_;
  std::optional<Error> start_error_;
  uint64_t boot_ = 1;
  int64_t next_pid_ = 100;
  std::vector<std::shared_ptr<QemuProcess>> qemus_;
  std::list<std::unique_ptr<DiskRequest>> requests_;  // not yet answered, in the order of submission
  std::list<std::unique_ptr<DiskRequest>> answered_;  // on their way back
};

}  // namespace vmferry::sim
