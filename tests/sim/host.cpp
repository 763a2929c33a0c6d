// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/host.h"

#include <algorithm>

#include "engine/base/assert.h"
#include "tests/sim/oracle.h"

namespace vmferry::sim {

namespace {

constexpr uint64_t kRecordSlot = 16U << 10;
constexpr uint64_t kStagingSize = 2U << 20;

}  // namespace

// The node's record, one group: saved as the daemon saves it.
class Host::Record final : public OwnershipStore {
 public:
  Record(Host& host) : host_(host), durable_(*host.record_disk_, place()) {}

  static DurableRecordPlace place() {
    return {.offset = 0, .slot_size = kRecordSlot, .kind = record_kind("NODE"), .version = 1};
  }
  void load(std::function<void(Status)> done) {
    durable_.load([this, done = std::move(done)](Result<std::optional<Bytes>> loaded) {
      if (!loaded) return done(tl::unexpected(loaded.error()));
      record = host_.first_record();
      if (*loaded) {
        const auto json = parse_json(as_text(**loaded), {.line_size_max = kRecordSlot, .depth_max = 32});
        if (!json) return done(tl::unexpected(json.error()));
        auto node = node_record_from_json(*json);
        if (!node) return done(tl::unexpected(node.error()));
        record = node->groups.begin()->second;
      }
      host_.durable_ = record;
      done({});
    });
  }
  void save(const Ownership& ownership, std::function<void(Status)> done) override {
    record.ownership = ownership;
    save_all(std::move(done));
  }
  void save_config(const GroupRecord& changed) {
    const Ownership ownership = record.ownership;
    record = changed;
    record.ownership = ownership;
    save_all([](Status) {});
  }

  GroupRecord record;

 private:
  void save_all(std::function<void(Status)> done) {
    NodeRecord node;
    node.node.bytes[0] = static_cast<uint8_t>(1 + host_.index());
    node.groups.emplace(record.id, record);
    const std::string text = to_json_line(to_json(node));
    const ByteSpan bytes = as_bytes(text);
    durable_.save(Bytes(bytes.begin(), bytes.end()), [this, saved = record, done = std::move(done)](Status status) {
      if (status) {
        const Ownership before = host_.durable_.ownership;
        host_.durable_ = saved;
        if (before.role != Role::Primary && saved.ownership.role == Role::Primary) {
          // From Superseded it is the operator's choice between two truths, not a promotion.
          const bool by_promotion =
              saved.ownership.state == HandoverState::Own && before.state != HandoverState::Superseded;
          host_.oracle_.became_primary(host_, by_promotion, saved.ownership.forced);
        }
      }
      done(std::move(status));
    });
  }

  Host& host_;
  DurableRecord durable_;
};

void DiskRequest::block_done(BlockRequest&, Errno error) noexcept {
  host->answered(*this, error);
}

Host::Host(SimWorld& world, SimLink& link, Oracle& oracle, HostSettings settings, SimDiskTotals& totals)
    : world_(world),
      link_(link),
      oracle_(oracle),
      settings_(std::move(settings)),
      executor_(world.add_executor(settings_.name)) {
  for (const uint64_t size : settings_.volume_sizes) {
    stores_.push_back(std::make_unique<SimDisk>(executor_, size, &totals));
    metadata_.push_back(std::make_unique<SimDisk>(executor_, TrackedDevice::metadata_size(size), &totals));
  }
  staging_ = std::make_unique<SimDisk>(executor_, kStagingSize, &totals);
  record_disk_ = std::make_unique<SimDisk>(executor_, DurableRecord::footprint(kRecordSlot), &totals);
  durable_ = first_record();
}

Host::~Host() {
  end_daemon();
}

GroupRecord Host::first_record() const {
  GroupRecord record;
  record.id = settings_.group;
  for (size_t i = 0; i < settings_.volume_sizes.size(); ++i) record.members.push_back(fmt::format("vd{}", i));
  record.peer = settings_.peer;
  record.replication.active = true;
  record.replication.rpo = 200 * kMillisecond;
  record.ownership.role = settings_.role;
  record.ownership.owner = settings_.role == Role::Primary ? Owner::Self : Owner::Peer;
  record.ownership.state = settings_.role == Role::Primary ? HandoverState::Own : HandoverState::Secondary;
  return record;
}

// --- Daemon

void Host::start_daemon() {
  if (daemon_ != nullptr) return;
  start_error_.reset();
  daemon_ = std::make_unique<Daemon>();
  oracle_.daemon_started(*this);
  for (size_t i = 0; i < stores_.size(); ++i) {
    TrackOptions options;
    options.name = fmt::format("vd{}", i);
    options.region_size = 32U << 10;
    options.active_regions_max = 8;
    options.save_interval = 200 * kMillisecond;
    options.idle_interval = 150 * kMillisecond;
    options.stamp = [size = stores_[i]->size()] { return StoreStamp{.identity = {}, .size = size, .modified_ns = 1}; };
    options.faults = settings_.faults.track;
    daemon_->devices.push_back(
        std::make_unique<TrackedDevice>(executor_, *stores_[i], *metadata_[i], std::move(options)));
  }
  daemon_->record = std::make_unique<Record>(*this);
  daemon_->record->load([this](Status status) {
    if (!status) {
      start_error_ = status.error();
      return;
    }
    open_devices(0);
  });
}

void Host::open_devices(size_t next) {
  if (next == daemon_->devices.size()) return make_group();
  daemon_->devices[next]->open([this, next](Status status) {
    if (!status) {
      start_error_ = status.error();
      return;
    }
    open_devices(next + 1);
  });
}

void Host::make_group() {
  std::vector<ReplicaVolume> volumes;
  for (size_t i = 0; i < daemon_->devices.size(); ++i) {
    volumes.push_back({.name = fmt::format("vd{}", i), .device = daemon_->devices[i].get()});
  }
  GroupParts parts{.executor = executor_,
                   .ownership = *daemon_->record,
                   .staging = *staging_,
                   .make_qemu = [this](const std::string&) { return std::make_unique<SimQemu>(*this, executor_); },
                   .qmp_path = "/run/qmp"};
  GroupOptions options;
  // Histories as small as the volumes, or most of the time goes into clearing them.
  options.sender.codec = {.level = 1, .window_log = 10};
  options.sender.urgent_window_log = 10;
  options.sender.index_bytes_max = 32U << 10;
  options.receiver.codec = options.sender.codec;
  options.receiver.segment_bytes = 32U << 10;
  options.receiver.segment_interval = 20 * kMillisecond;
  options.receiver.faults = settings_.faults.replicate;
  options.memory.compression_level = 1;
  options.memory.window_log = 10;
  options.coordinator.fenced_limit = 600 * kMillisecond;
  options.coordinator.peer_fence_limit = 1200 * kMillisecond;
  options.coordinator.peer_disconnect_limit = 1500 * kMillisecond;
  options.coordinator.qemu_answer_limit = 600 * kMillisecond;
  options.coordinator.doubt_limit = 1500 * kMillisecond;
  options.coordinator.promote_limit = 2 * kSecond;
  options.coordinator.poll_interval = 20 * kMillisecond;
  options.coordinator.retry_interval = 30 * kMillisecond;
  options.coordinator.faults = settings_.faults.handover;
  GroupEvents events;
  events.config_changed = [this](const GroupRecord& record) { daemon_->record->save_config(record); };
  daemon_->group = std::make_unique<Group>(daemon_->record->record, std::move(volumes), std::move(parts),
                                           std::move(options), std::move(events));
  daemon_->group->set_channel(link_.make_channel(index()), {});
  daemon_->group->open([this](Status status) {
    if (!status) {
      start_error_ = status.error();
      return;
    }
    daemon_->serving = true;
    link_.attach(index(), &daemon_->group->channel_handler());
    for (const auto& request : requests_) forward(*request);
  });
}

void Host::end_daemon() {
  if (daemon_ == nullptr) return;
  link_.detach(index());
  executor_.kill();
  daemon_.reset();
  executor_.kill();  // what destructors posted
  std::erase_if(requests_, [](const auto& request) { return request->orphaned; });
}

void Host::kill_daemon() {
  if (daemon_ == nullptr) return;
  end_daemon();
  for (auto& disk : stores_) disk->daemon_died();
  for (auto& disk : metadata_) disk->daemon_died();
  staging_->daemon_died();
  record_disk_->daemon_died();
}

void Host::stop_daemon(std::function<void()> done) {
  if (!serving()) return;
  daemon_->serving = false;
  daemon_->group->close([this, done = std::move(done)](Status) {
    auto left = std::make_shared<size_t>(daemon_->devices.size());
    for (auto& device : daemon_->devices) {
      device->close([left, done](Status) {
        if (--*left == 0) done();
      });
    }
  });
}

void Host::lose_power() {
  for (const auto& process : qemus_) process->die();
  end_daemon();
  for (auto& disk : stores_) disk->power_cut();
  for (auto& disk : metadata_) disk->power_cut();
  staging_->power_cut();
  record_disk_->power_cut();
  ++boot_;
  requests_.clear();
  if (oracle_.holds_truth(*this) || durable_.ownership.role == Role::Primary) {
    for (DiskModel& disk : oracle_.disks(*this)) disk.power_lost();
  }
}

bool Host::accepts_writes() const {
  return serving() && daemon_->devices.front()->gate() == WriteGate::Open;
}

bool Host::parks_writes() const {
  return serving() && daemon_->devices.front()->gate() == WriteGate::Parked;
}

// --- QEMU

std::shared_ptr<QemuProcess> Host::spawn_qemu(QemuProcess::Start start) {
  if (!qemus_.empty()) qemus_.back()->die();  // one at a time behind the QMP path
  SimExecutor& executor = world_.add_executor(fmt::format("{}.qemu{}", name(), next_pid_));
  qemus_.push_back(std::make_shared<QemuProcess>(*this, executor, oracle_, start, next_pid_));
  ++next_pid_;
  return qemus_.back();
}

std::shared_ptr<QemuProcess> Host::qemu() const {
  return qemus_.empty() ? nullptr : qemus_.back();
}

ProcessIdentity Host::identity_of(const QemuProcess& process) const {
  return {.pid = process.pid(),
          .start_time = static_cast<uint64_t>(process.pid()) * 7,
          .boot_id = fmt::format("boot-{}-{}", name(), boot_)};
}

ProcessFate Host::fate_of(const ProcessIdentity& identity) const {
  if (identity.boot_id != fmt::format("boot-{}-{}", name(), boot_)) return ProcessFate::Dead;
  for (const auto& process : qemus_) {
    if (process->pid() == identity.pid) return process->alive() ? ProcessFate::Alive : ProcessFate::Dead;
  }
  return ProcessFate::Dead;
}

// --- Disk requests

void Host::submit(std::unique_ptr<DiskRequest> request) {
  request->host = this;
  request->request.completion = request.get();
  requests_.push_back(std::move(request));
  if (serving()) forward(*requests_.back());
}

void Host::forward(DiskRequest& request) {
  executor_.post([this, &request] { daemon_->devices[request.volume]->submit(request.request); });
}

void Host::answered(DiskRequest& request, Errno error) {
  if (error == ESHUTDOWN) return;  // the client connects again and sends it to the next daemon
  const auto found =
      std::find_if(requests_.begin(), requests_.end(), [&](const auto& r) { return r.get() == &request; });
  VF_ASSERT(found != requests_.end());
  auto owned = std::shared_ptr<DiskRequest>(std::move(*found));
  requests_.erase(found);
  if (owned->orphaned) return;
  const auto delay = static_cast<Nanoseconds>(world_.random().below(100)) * kMicrosecond;
  owned->reply_to->start_timer(delay, [this, owned, error, boot = boot_] {
    if (boot == boot_) owned->answer(*owned, error);  // clients on this host lose power with it
  });
}

void Host::orphan_requests(const SimExecutor& of) {
  for (const auto& request : requests_) {
    if (request->reply_to == &of) request->orphaned = true;
  }
}

}  // namespace vmferry::sim
