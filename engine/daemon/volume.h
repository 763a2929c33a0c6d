// SPDX-License-Identifier: Apache-2.0
//
// One volume: its store, its tracking metadata, the tracked device on both, and the exports of that: NBD,
// vhost-user-blk.
//
// Flow: Daemon opens volumes from its node state, groups decide the gates, then exports open. Threads: the reactor's.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "blockdev/file_store.h"
#include "blockdev/nbd/nbd_server.h"
#include "blockdev/vhost/vhost_server.h"
#include "engine/control/config.h"
#include "engine/daemon/dirty_contexts.h"
#include "engine/daemon/passed_sockets.h"
#include "engine/runtime/listener.h"
#include "engine/track/tracked_device.h"
#include "netproto/tls/tls_credentials.h"

namespace vmferry {

class Volume {
 public:
  using Done = std::function<void(Status)>;

  // Opens the files; blocks for a moment. Then open(). The file of a New volume is made when it has a size; that of a
  // Recorded one never: an empty file in its place would be taken for its content and copied over the peer's. Retried
  // is a Recorded one while others are served: then it does not wait for locks.
  enum class Origin : uint8_t { New, Recorded, Retried };
  static Result<std::unique_ptr<Volume>> create(Reactor& reactor, const VolumeConfig& config,
                                                const std::string& metadata_path, Origin origin);
  // What the daemon as a whole says of NBD exports; before serve().
  struct NbdSupport {
    NbdTlsConfig tls{};
    std::shared_ptr<const TlsCredentials> credentials{};  // nullptr when the configuration names none
    NbdExportLimits limits{};
    // That were passed for this volume; they outlive it, and VolumeConfig::passed says their addresses. nullptr: none.
    const std::vector<PassedSocket>* sockets = nullptr;
  };
  void set_nbd(const NbdSupport& support) { nbd_ = support; }
  // Asked whenever an NBD client looks for meta contexts; before serve().
  void set_peer_name(DirtyContexts::PeerName peer) { peer_name_ = std::move(peer); }
  ~Volume();  // after close(). Removes the files that create() made, unless keep_files() was called.

  // The volume is recorded, so that what was made for it is there to stay; before, nothing was written by a guest.
  void keep_files() { made_files_.clear(); }

  void open(Done done);
  Status serve();  // starts the exports that were configured
  bool serving() const { return serving_; }
  // The export for the kernel of this host: no listener, only sockets that are made here. Made on first use, while
  // serving(); ends with stop_serving() or close_kernel_export().
  NbdServer& kernel_export();
  void close_kernel_export(std::function<void()> done);
  // Sockets of the kernel that are alive, as far as this side knows.
  uint64_t kernel_connections() const { return kernel_server_ != nullptr ? kernel_server_->stats().connections : 0; }
  void stop_serving(std::function<void()> done);
  void close(Done done);  // after stop_serving(): drains, saves dirty state; also when open() failed
  // Grows tracking, then the file. The peer has grown before.
  void resize(uint64_t size, Done done);

  const VolumeConfig& config() const { return config_; }
  const std::string& name() const { return config_.name; }
  TrackedDevice& device() { return *device_; }
  const FileStore& store() const { return *store_; }
  std::vector<std::string> export_uris() const;
  NbdStats nbd_stats() const;  // of the export and the kernel's together
  VhostStats vhost_stats() const { return vhost_ != nullptr ? vhost_->stats() : VhostStats{}; }
  uint64_t connections() const { return nbd_stats().connections + vhost_stats().connections; }

 private:
  Volume(Reactor& reactor, VolumeConfig config) : reactor_(reactor), config_(std::move(config)) {}
  Status open_metadata(const std::string& path, Origin origin);
  void make_device();
  StoreStamp stamp() const;
  Status serve_nbd();
  Status serve_vhost();
  Result<ListenOptions> listen_options() const;
  Status listen_nbd();
  NbdTls nbd_tls() const;
  NbdExport nbd_export();

  Reactor& reactor_;
  VolumeConfig config_;
  NbdSupport nbd_;
  std::unique_ptr<FileStore> store_;
  std::unique_ptr<FileStore> metadata_;
  std::optional<uint64_t> metadata_size_found_;  // of a known volume, where it was not enough
  std::unique_ptr<TrackedDevice> device_;
  DirtyContexts::PeerName peer_name_;
  std::unique_ptr<DirtyContexts> dirty_contexts_;
  std::vector<std::string> made_files_;
  bool opened_ = false;
  bool serving_ = false;
  std::unique_ptr<NbdServer> server_;
  std::unique_ptr<NbdServer> kernel_server_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::unique_ptr<VhostServer> vhost_;
  std::unique_ptr<Listener> vhost_listener_;
};

}  // namespace vmferry
