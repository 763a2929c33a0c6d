// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/volume.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "engine/base/assert.h"
#include "engine/base/hash.h"
#include "engine/base/log.h"
#include "engine/runtime/steps.h"

namespace vmferry {

namespace {

constexpr uint64_t kSectorSize = 512;

// For a query of a URI (RFC 3986): a path may hold '&', '#', '%' or a space.
std::string percent_encoded(std::string_view text) {
  std::string encoded;
  for (const char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       std::string_view("-._~/").find(c) != std::string_view::npos;
    if (plain)
      encoded.push_back(c);
    else
      encoded += fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  return encoded;
}

AioKind to_aio(AioSetting setting) {
  return setting == AioSetting::Libaio ? AioKind::LibAio : AioKind::IoUring;
}

}  // namespace

Result<std::unique_ptr<Volume>> Volume::create(Reactor& reactor, const VolumeConfig& config,
                                               const std::string& metadata_path, Origin origin) {
  auto volume = std::unique_ptr<Volume>(new Volume(reactor, config));
  auto store = FileStore::open(reactor, config.path,
                               {.create_size = config.size,
                                .cache = config.cache == CacheSetting::None ? CacheMode::None : CacheMode::Writeback,
                                .aio = to_aio(config.aio),
                                .must_exist = origin != Origin::New,
                                .lock_wait = origin == Origin::Recorded ? kLockWaitAtStart : 0});
  if (!store && store.error().kind == ErrorKind::NotFound && origin != Origin::New) {
    return fail(ErrorKind::NotFound,
                "volume '{}': its file '{}' is missing, and it is not made anew, because an empty one would count as "
                "the volume's content: bring the file back (is its file system mounted?)",
                config.name, config.path);
  }
  if (!store) return fail_with(store.error(), fmt::format("volume '{}'", config.name));
  volume->store_ = std::move(*store);
  if (volume->store_->created()) volume->made_files_.push_back(config.path);
  if (volume->store_->size() % kSectorSize != 0) {
    return fail(ErrorKind::InvalidArgument,
                "volume '{}': '{}' has {} bytes, no multiple of {}, and a guest sees whole sectors only: "
                "truncate -s %{} makes it one",
                config.name, config.path, volume->store_->size(), kSectorSize, kSectorSize);
  }
  if (auto opened = volume->open_metadata(metadata_path, origin); !opened) {
    return fail_with(opened.error(), fmt::format("volume '{}'", config.name));
  }
  volume->make_device();
  log::info("volume={} path={} size_bytes={} aio={} cache={}", config.name, config.path, volume->store_->size(),
            volume->store_->aio_name(), config.cache == CacheSetting::None ? "none" : "writeback");
  return volume;
}

// The metadata file is ours alone: made when missing, made larger when the volume grew while it was not open. One that
// is shorter than its own content says was cut off; TrackMetadata finds that out.
Status Volume::open_metadata(const std::string& path, Origin origin) {
  const uint64_t needed = TrackedDevice::metadata_size(store_->size());
  FileStoreOptions options{.aio = to_aio(config_.aio), .lock_wait = origin == Origin::Recorded ? kLockWaitAtStart : 0};
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) {
    if (errno != ENOENT) return fail(ErrorKind::Io, "metadata '{}': {}", path, errno_text(errno));
    options.create_size = needed;
    if (origin != Origin::New) metadata_size_found_ = 0;
  } else if (S_ISREG(info.st_mode) && static_cast<uint64_t>(info.st_size) < needed) {
    metadata_size_found_ = static_cast<uint64_t>(info.st_size);
    if (::truncate(path.c_str(), static_cast<off_t>(needed)) != 0) {
      return fail(ErrorKind::Io, "metadata '{}' cannot grow to {} bytes: {}", path, needed, errno_text(errno));
    }
  }
  auto metadata = FileStore::open(reactor_, path, options);
  if (!metadata) {
    return fail(ErrorKind::Io,
                "its metadata cannot be used: {}; repair that, or move the file away: then every block counts as "
                "changed, and a peer's copy is made anew",
                metadata.error().text);
  }
  metadata_ = std::move(*metadata);
  if (metadata_->created() && origin == Origin::New) made_files_.push_back(path);
  return {};
}

void Volume::make_device() {
  TrackOptions options;
  options.name = config_.name;
  options.stamp = [this] { return stamp(); };
  options.metadata_size_found = metadata_size_found_;
  device_ = std::make_unique<TrackedDevice>(reactor_, *store_, *metadata_, std::move(options));
  // Closed until the group has read who may write.
  device_->set_gate(WriteGate::Parked);
}

Volume::~Volume() {
  device_.reset();
  store_.reset();
  metadata_.reset();
  for (const std::string& path : made_files_) ::unlink(path.c_str());
}

StoreStamp Volume::stamp() const {
  const auto identity = store_->identity();
  if (!identity) return {};  // matches nothing: wholly dirty
  uint64_t numbers[2] = {identity->device, identity->inode};
  const Hash128 hash = xxh3_128(ByteSpan(reinterpret_cast<const uint8_t*>(numbers), sizeof(numbers)));
  return {.identity = Id128{hash}, .size = identity->size, .modified_ns = identity->modified_ns};
}

void Volume::open(Done done) {
  device_->open([this, done = std::move(done)](const Status& status) {
    if (!status) {
      return done(fail(status.error().kind,
                       "volume '{0}': {1} ('{2}'); repair that, or move the file away: then every block counts as "
                       "changed, and a peer's copy is made anew",
                       config_.name, status.error().text, metadata_->path()));
    }
    opened_ = true;
    done({});
  });
}

Status Volume::serve() {
  if (Status served = serve_nbd(); !served) return served;
  if (Status served = serve_vhost(); !served) return served;
  serving_ = true;
  return {};
}

Result<ListenOptions> Volume::listen_options() const {
  ListenOptions options;
  options.backlog = 1024;
  options.mode = config_.socket_access.mode;
  if (const std::string& text = config_.socket_access.owner; !text.empty()) {
    const auto owner = find_owner(text);
    if (!owner) return fail_with(owner.error(), fmt::format("volume '{}': socket-owner", config_.name));
    options.owner = owner->user;
    options.group = owner->group;
  }
  return options;
}

Status Volume::serve_vhost() {
  if (config_.vhost_user_blk.empty()) return {};
  VhostExport settings{
      .name = config_.name, .device = device_.get(), .clients = device_.get(), .read_only = config_.read_only};
  if (config_.queues > 0) settings.queues = config_.queues;
  vhost_ = std::make_unique<VhostServer>(reactor_, settings);
  Endpoint endpoint;
  endpoint.is_unix = true;
  endpoint.path = config_.vhost_user_blk;
  const auto options = listen_options();
  if (!options) return tl::unexpected(options.error());
  auto listener = Listener::create(reactor_, endpoint, *options,
                                   [this](std::unique_ptr<SocketStream> stream) { vhost_->accept(stream->release()); });
  if (!listener) return fail_with(listener.error(), fmt::format("volume '{}': vhost-user-blk", config_.name));
  vhost_listener_ = std::move(*listener);
  return {};
}

NbdTls Volume::nbd_tls() const {
  switch (nbd_tls_of(nbd_.tls, config_)) {
    case NbdTlsSetting::Require:
      return {nbd::TlsPolicy::Require, nbd_.credentials};
    case NbdTlsSetting::Allow:
      return {nbd::TlsPolicy::Allow, nbd_.credentials};
    case NbdTlsSetting::Off:
    case NbdTlsSetting::Automatic:
      break;
  }
  return {};
}

NbdExport Volume::nbd_export() {
  return {
      .name = config_.name,
      .description = config_.description.empty() ? fmt::format("vmferry volume {}", config_.name) : config_.description,
      .device = device_.get(),
      .clients = device_.get(),
      .read_only = config_.read_only};
}

NbdServer& Volume::kernel_export() {
  VF_ASSERT(serving_);
  if (kernel_server_ != nullptr) return *kernel_server_;
  NbdLimits limits;
  limits.drain_unanswered = true;  // the kernel sends them again
  limits.drop_requests_of_gone_clients = true;
  kernel_server_ = std::make_unique<NbdServer>(reactor_, limits);
  const Status added = kernel_server_->add_export(nbd_export());
  VF_ASSERT(added.has_value());  // the only one there, and every volume's name is one that NBD can carry
  return *kernel_server_;
}

void Volume::close_kernel_export(std::function<void()> done) {
  if (kernel_server_ == nullptr) return reactor_.post(std::move(done));
  kernel_server_->drain([this, done = std::move(done)] {
    reactor_.post([this, done] {  // later, because the server is on the stack
      kernel_server_.reset();
      done();
    });
  });
}

NbdStats Volume::nbd_stats() const {
  NbdStats sum;
  for (const NbdServer* server : {server_.get(), kernel_server_.get()}) {
    if (server == nullptr) continue;
    const NbdStats stats = server->stats();
    sum.connections += stats.connections;
    sum.handshakes += stats.handshakes;
    sum.connections_total += stats.connections_total;
    sum.refused_total += stats.refused_total;
    sum.requests_total += stats.requests_total;
    sum.errors_total += stats.errors_total;
    sum.read_bytes_total += stats.read_bytes_total;
    sum.written_bytes_total += stats.written_bytes_total;
    sum.inflight_bytes += stats.inflight_bytes;
  }
  return sum;
}

Status Volume::serve_nbd() {
  if (config_.nbd_addresses().empty()) return {};
  if (auto safe = check_nbd_tls(nbd_.tls, config_); !safe) return safe;
  if (peer_name_) dirty_contexts_ = std::make_unique<DirtyContexts>(*device_, peer_name_);
  NbdLimits limits;
  limits.drain_unanswered = true;
  limits.connections_max = nbd_.limits.connections;
  limits.handshake_time_max = nbd_.limits.handshake_timeout;
  server_ = std::make_unique<NbdServer>(reactor_, limits, nbd_tls());
  NbdExport settings = nbd_export();
  settings.status = dirty_contexts_.get();
  settings.tls_allow = config_.tls_allow;
  if (auto added = server_->add_export(settings); !added) {
    return fail_with(added.error(), fmt::format("volume '{}'", config_.name));
  }
  return listen_nbd();
}

Status Volume::listen_nbd() {
  const auto options = listen_options();
  if (!options) return tl::unexpected(options.error());
  const auto accept = [this](std::unique_ptr<SocketStream> stream) { server_->accept(std::move(stream)); };
  if (nbd_.sockets == nullptr) {
    auto listener = Listener::create(reactor_, *config_.nbd, *options, accept);
    if (!listener) return fail_with(listener.error(), fmt::format("volume '{}': nbd", config_.name));
    listeners_.push_back(std::move(*listener));
    return {};
  }
  for (const PassedSocket& socket : *nbd_.sockets) {
    UniqueFd fd(::fcntl(socket.fd.get(), F_DUPFD_CLOEXEC, 0));  // ours goes with the export, theirs is for the next one
    if (!fd.valid()) {
      return fail(ErrorKind::LimitExceeded, "volume '{}': the service manager's socket {}: {}", config_.name,
                  socket.address.to_string(), errno_text(errno));
    }
    listeners_.push_back(Listener::adopt(reactor_, std::move(fd), socket.address, *options, accept));
  }
  return {};
}

void Volume::stop_serving(std::function<void()> done) {
  serving_ = false;
  listeners_.clear();
  vhost_listener_.reset();
  if (server_ == nullptr && vhost_ == nullptr && kernel_server_ == nullptr) return reactor_.post(std::move(done));
  if (kernel_server_ != nullptr) kernel_server_->drain([] {});  // begun before parked writes fail, below
  run_steps({[this](StepDone next) {
               if (server_ == nullptr) return next({});
               server_->drain([next] { next({}); });
             },
             [this](StepDone next) {
               if (vhost_ == nullptr) return next({});
               vhost_->drain([next] { next({}); });
             },
             [this](StepDone next) { close_kernel_export([next] { next({}); }); }},
            [this, done = std::move(done)](const Status&) {
              // Later, because a server is on the stack.
              reactor_.post([this, done] {
                server_.reset();
                vhost_.reset();
                done();
              });
            });
  // Parked writes would keep the drain waiting for its time limit. They stay unanswered: the client sends them again
  // after the restart, to whichever side then answers.
  device_->fail_parked(ESHUTDOWN);
}

void Volume::close(Done done) {
  if (!std::exchange(opened_, false)) return reactor_.post([done = std::move(done)] { done({}); });
  // Read-backs of a sender that is gone, and a record on its way, come after the guest's requests.
  run_all_steps({[this](StepDone next) { device_->close(std::move(next)); },
                 [this](StepDone next) { store_->when_idle([next] { next({}); }); },
                 [this](StepDone next) { metadata_->when_idle([next] { next({}); }); }},
                std::move(done));
}

void Volume::resize(uint64_t size, Done done) {
  if (size <= store_->size()) {
    return reactor_.post([this, size, done = std::move(done)] {
      done(fail(ErrorKind::InvalidArgument, "volume '{}' has {} bytes; {} is not larger, and volumes only grow", name(),
                store_->size(), size));
    });
  }
  run_steps({[this, size](StepDone next) {
               const uint64_t needed = TrackedDevice::metadata_size(size);
               if (metadata_->size() >= needed) return next({});
               metadata_->resize(needed, std::move(next));
             },
             [this, size](StepDone next) { device_->resize(size, std::move(next)); },
             [this, size](StepDone next) { store_->resize(size, std::move(next)); }},
            [this, size, done = std::move(done)](const Status& status) {
              if (status && config_.size) config_.size = size;
              if (status && vhost_ != nullptr) vhost_->resized();
              done(status);
            });
}

std::vector<std::string> Volume::export_uris() const {
  std::vector<std::string> uris;
  for (const auto& listener : listeners_) {
    const Endpoint local = listener->local();
    const std::string_view scheme = nbd_tls().policy == nbd::TlsPolicy::Require ? "nbds" : "nbd";
    uris.push_back(local.is_unix
                       ? fmt::format("{}+unix:///{}?socket={}", scheme, config_.name, percent_encoded(local.path))
                       : fmt::format("{}://{}/{}", scheme, local.to_string(), config_.name));
  }
  if (vhost_listener_ != nullptr) uris.push_back("vhost-user-blk:" + config_.vhost_user_blk);
  return uris;
}

}  // namespace vmferry
