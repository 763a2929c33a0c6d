// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/daemon.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "engine/base/log.h"
#include "engine/daemon/commands.h"
#include "engine/daemon/metrics.h"
#include "engine/daemon/nbd_tls.h"
#include "engine/replicate/peer_identity.h"
#include "engine/runtime/steps.h"
#include "kmod-shim/nbd_kernel_driver.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kShutdownMigrationWait = 5 * kSecond;
constexpr Nanoseconds kStatePollInterval = 200 * kMillisecond;

std::string host_name() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0) return "peer";
  std::string text(name);
  text = text.substr(0, text.find('.'));
  return is_valid_name(text) ? text : "peer";
}

Status make_private_folder(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return fail(ErrorKind::Io, "cannot make folder '{}': {}", path, errno_text(errno));
  }
  struct stat info {};
  if (stat(path.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return fail(ErrorKind::Io, "'{}' is not a folder", path);
  }
  if ((info.st_mode & 0077) != 0 && chmod(path.c_str(), 0700) != 0) {
    return fail(ErrorKind::Denied, "folder '{}' is open to others and cannot be closed: {}", path, errno_text(errno));
  }
  return {};
}

}  // namespace

Daemon::Daemon(Reactor& reactor, const DaemonConfig& config, PassedSockets passed)
    : reactor_(reactor),
      config_(config),
      passed_(std::move(passed)),
      events_(reactor),
      dialer_(reactor),
      attachments_({.reactor = reactor,
                    .events = events_,
                    .driver = std::make_shared<NbdKernelDriver>(),
                    .state = [this]() -> NodeState& { return *state_; },
                    .volume = [this](const std::string& name) -> Volume* {
                      const auto found = volumes_.find(name);
                      return found != volumes_.end() && found->second->serving() ? found->second.get() : nullptr;
                    },
                    .may_write =
                        [this](const std::string& name) {
                          const Group* const group = group_of(name);
                          return group != nullptr && group->ownership().role == Role::Primary;
                        }}),
      shutdown_timer_(reactor),
      state_timer_(reactor),
      reopen_timer_(reactor) {}

Daemon::~Daemon() = default;

void Daemon::start(Done done) {
  const auto step = [](auto function) { return [function](StepDone next) { next(function()); }; };
  run_steps({step([this] { return load_credentials(); }), step([this] { return lock_state_dir(); }),
             [this](StepDone next) { load_state(std::move(next)); },
             [this](StepDone next) { open_volumes(std::move(next)); }, step([this] { return open_sockets(); })},
            [this, done = std::move(done)](const Status& status) {
              if (status) {
                started_ = true;
                events_.add(
                    "started",
                    {{"version", VMFERRY_VERSION}, {"volumes", volumes_.size()}, {"failed_volumes", failed_.size()}});
                watch_replication_states();
                attachments_.start();
                hooks_->resume();
                sd_notify(0, "READY=1");
              }
              done(status);
            });
}

Status Daemon::load_credentials() {
  auto credentials = load_nbd_credentials(config_.nbd_tls);
  if (!credentials) return tl::unexpected(credentials.error());
  nbd_credentials_ = std::move(*credentials);
  if (const Status safe = check_hook(config_.on_running); !safe) return fail_with(safe.error(), "on-running");
  return {};
}

Status Daemon::lock_state_dir() {
  std::error_code error;
  const auto parent = std::filesystem::path(config_.state_dir).parent_path();
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  for (const std::string& folder : {config_.state_dir, path_in_state("volumes"), path_in_state("groups")}) {
    if (auto made = make_private_folder(folder); !made) return made;
  }
  const std::string path = path_in_state("lock");
  state_lock_ = UniqueFd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (state_lock_.get() < 0) return fail(ErrorKind::Io, "cannot open '{}': {}", path, errno_text(errno));
  if (flock(state_lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    return fail(ErrorKind::Busy, "state folder '{}' is in use by another vmferryd", config_.state_dir);
  }
  auto groups = Folder::open(path_in_state("groups"));
  if (!groups) return tl::unexpected(groups.error());
  groups_folder_ = std::move(*groups);
  return {};
}

void Daemon::load_state(Done done) {
  auto file = FileStore::open(reactor_, path_in_state("state"),
                              {.create_size = NodeState::kFileSize, .lock_wait = kLockWaitAtStart});
  if (!file) return done(fail_with(file.error(), "node state"));
  state_file_ = std::move(*file);
  state_ = std::make_unique<NodeState>(reactor_, *state_file_);
  hooks_ = std::make_unique<Hooks>(reactor_, *state_, events_, config_.on_running);
  auto identity = load_or_create_identity(path_in_state("identity.pem"));
  if (!identity) return done(tl::unexpected(identity.error()));
  identity_ = std::make_unique<TlsIdentity>(std::move(*identity));
  state_->load([this, done = std::move(done)](const Status& loaded) {
    if (!loaded) return done(loaded);
    if (auto known = check_passed_sockets(state_->record()); !known) return done(known);
    make_new_volumes();
    // The command line's settings win over what was saved; its role counts only for a volume that is new.
    state_->update(
        [this](NodeRecord& record) {
          for (const VolumeConfig& volume : config_.volumes) {
            if (failed_.contains(volume.name)) continue;  // still new at the next start
            // size= is the size of a volume that is new; it may have grown since.
            const std::optional<uint64_t> grown = record.volumes[volume.name].size;
            record.volumes[volume.name] = volume;
            if (volume.size && grown && *grown > *volume.size) record.volumes[volume.name].size = grown;
            if (find_group_of(record, volume.name) != nullptr) continue;
            const GroupRecord group =
                new_group_record({volume.name}, volume.secondary ? Role::Secondary : Role::Primary);
            record.groups.emplace(group.id, group);
          }
        },
        [this, done](const Status& saved) {
          if (saved) {
            for (auto& [name, volume] : volumes_) volume->keep_files();
          }
          done(saved);
        });
  });
}

Status Daemon::open_sockets() {
  PeerServiceOptions options;
  options.daemon_version = VMFERRY_VERSION;
  options.default_name = host_name();
  if (config_.listen) {
    options.listen_port = config_.listen->port;
    if (config_.listen->host != "0.0.0.0" && config_.listen->host != "::" && !config_.listen->host.empty()) {
      options.listen_addresses = {config_.listen->to_string()};
    }
  }
  PeerServiceHandler& handler = *this;
  peers_ = std::make_unique<PeerService>(reactor_, dialer_, *identity_, options, handler);
  if (auto loaded = peers_->load(state_->record().peers); !loaded) return loaded;
  if (config_.listen) {
    ListenOptions listen;
    listen.socket = peer_socket_options();
    auto listener = Listener::create(reactor_, *config_.listen, listen, [this](std::unique_ptr<SocketStream> stream) {
      peers_->accept(std::move(stream));
    });
    if (!listener) return fail_with(listener.error(), "listen");
    peer_listener_ = std::move(*listener);
  }
  peers_->start();  // peer_added() connects the groups

  if (auto opened = open_metrics(); !opened) return opened;
  rpc_ = std::make_unique<RpcServer>(reactor_);
  register_commands();
  Endpoint control;
  control.is_unix = true;
  control.path = config_.control_path;
  auto listener = Listener::create(reactor_, control, ListenOptions{}, [this](std::unique_ptr<SocketStream> stream) {
    const auto credentials = stream->credentials();
    if (!credentials || (credentials->uid != 0 && credentials->uid != geteuid())) {
      log::warn("control client refused: user {}", credentials ? static_cast<int64_t>(credentials->uid) : -1);
      return;
    }
    rpc_->accept(std::move(stream));
  });
  if (!listener) return fail_with(listener.error(), "control socket");
  control_listener_ = std::move(*listener);
  return {};
}

Status Daemon::open_metrics() {
  if (!config_.metrics) return {};
  metrics_ = std::make_unique<MetricsServer>(reactor_, [this] { return metrics_text(*this); });
  auto listener = Listener::create(reactor_, *config_.metrics, ListenOptions{},
                                   [this](std::unique_ptr<SocketStream> s) { metrics_->accept(std::move(s)); });
  if (!listener) return fail_with(listener.error(), "metrics");
  metrics_listener_ = std::move(*listener);
  return {};
}

void Daemon::register_commands() {
  add_volume_methods(*rpc_, *this);
  add_peer_methods(*rpc_, *this);
  add_replicate_methods(*rpc_, *this);
  add_migrate_methods(*rpc_, *this);
  add_role_methods(*rpc_, *this);
  add_attach_methods(*rpc_, *this);
}

void Daemon::watch_replication_states() {
  note_replication_states();
  note_write_rates();
  state_timer_.start(kStatePollInterval, [this] { watch_replication_states(); });
}

// Looked at from outside: the state follows from several facts, each with its own moment.
void Daemon::note_replication_states() {
  std::map<Id128, std::string> states;
  for (const Group* group : groups()) {
    const Json status = group->replication_status();
    if (status.empty()) continue;
    const Json& first = status.front();
    const std::string state = first["state"];
    const auto before = states_seen_.find(group->id());
    if (before == states_seen_.end() || before->second != state) {
      events_.add("replication_state", {{"volumes", group->record().members},
                                        {"peer", group->record().peer},
                                        {"direction", first["direction"]},
                                        {"state", state},
                                        {"reason", first.value("reason", std::string())}});
    }
    states.emplace(group->id(), state);
  }
  states_seen_ = std::move(states);
}

void Daemon::note_write_rates() {
  std::erase_if(write_rates_, [this](const auto& entry) { return !volumes_.contains(entry.first); });
  for (const auto& [name, volume] : volumes_) {
    write_rates_[name].add(volume->nbd_stats().written_bytes_total + volume->vhost_stats().written_bytes_total,
                           reactor_.now());
  }
}

std::optional<uint64_t> Daemon::write_rate(const std::string& volume) const {
  const auto found = write_rates_.find(volume);
  return found != write_rates_.end() ? found->second.rate() : std::nullopt;
}

void Daemon::shut_down(Done done) {
  sd_notify(0, "STOPPING=1");
  if (hooks_ != nullptr) hooks_->stop();
  state_timer_.cancel();
  reopen_timer_.cancel();
  control_listener_.reset();
  metrics_listener_.reset();
  metrics_.reset();
  if (rpc_ != nullptr) rpc_->shut_down();
  // A migration that can still be given up is given up: its guest goes on here, on a QEMU that outlives us.
  bool migrating = false;
  for (Group* group : groups()) {
    if (group->coordinator().migrating() && group->coordinator().cancel()) migrating = true;
  }
  const Nanoseconds deadline = reactor_.now() + kShutdownMigrationWait;
  const auto drained = [this, done = std::move(done)] {
    peer_listener_.reset();
    std::vector<AsyncStep> steps;
    // While volumes are still served: what the kernel is doing may wait for them.
    steps.push_back([this](StepDone next) { attachments_.stop([next] { next({}); }); });
    for (auto& [name, volume] : volumes_) {
      steps.push_back([opened = volume.get()](StepDone next) { opened->stop_serving([next] { next({}); }); });
    }
    for (Group* group : groups()) {
      steps.push_back([group](StepDone next) { group->close(std::move(next)); });
    }
    steps.push_back([this](StepDone next) {
      if (peers_ != nullptr) peers_->stop();
      next({});
    });
    for (auto& [name, volume] : volumes_) {
      steps.push_back([opened = volume.get()](StepDone next) { opened->close(std::move(next)); });
    }
    for (auto& [id, slot] : groups_) {
      if (slot.staging == nullptr) continue;
      steps.push_back([staging = slot.staging.get()](StepDone next) { staging->when_idle([next] { next({}); }); });
    }
    if (state_file_ != nullptr) {
      steps.push_back([this](StepDone next) { state_file_->when_idle([next] { next({}); }); });
    }
    // The destructors of links and streams run from a task of their own.
    steps.push_back([this](StepDone next) { reactor_.post([next] { next({}); }); });
    run_all_steps(std::move(steps), done);
  };
  if (!migrating && !regrouping_) return drained();
  auto wait = std::make_shared<std::function<void()>>();
  *wait = [this, drained, deadline, wait] {
    bool busy = regrouping_;
    for (Group* group : groups()) busy = busy || group->coordinator().migrating();
    if (!busy || reactor_.now() > deadline) {
      const auto go_on = drained;
      shutdown_timer_.cancel();
      *wait = nullptr;
      return go_on();
    }
    shutdown_timer_.start(20 * kMillisecond, [wait] { (*wait)(); });
  };
  (*wait)();
}

std::vector<Group*> Daemon::groups() const {
  std::vector<Group*> result;
  for (const auto& [id, slot] : groups_) {
    if (slot.group != nullptr && slot.group->is_open()) result.push_back(slot.group.get());
  }
  return result;
}

}  // namespace vmferry
