// SPDX-License-Identifier: Apache-2.0
//
// Volumes as block devices of this host: attached, kept connected over restarts of this daemon, resized, detached.
//
// Flow: the commands attach and detach come from rpc_attach.cpp; what they decide is recorded in the node's state, and
// tend() makes it so: at the start, when the kernel says that a connection died, and every few seconds while something
// is missing. A device stays connected to a volume, whatever dies, until it is detached.
// Source of truth: docs/decisions/0006-attach.md. Threads: the reactor's; the driver is called on workers, because the
// kernel may wait for I/O that only this thread can do.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "engine/control/events.h"
#include "engine/daemon/kernel_socket.h"
#include "engine/daemon/node_state.h"
#include "engine/daemon/volume.h"
#include "kmod-shim/kernel_block_driver.h"

namespace vmferry {

struct AttachWish {
  std::string volume;
  std::string device;  // "": any that is free
  uint32_t connections = 1;
  uint32_t dead_timeout_s = 300;
  uint32_t request_timeout_s = 30;
};

class Attachments {
 public:
  using Done = std::function<void(Status)>;

  struct Parts {
    Reactor& reactor;
    EventLog& events;
    std::shared_ptr<KernelBlockDriver> driver;
    std::function<NodeState&()> state;                  // loaded before anything is asked of us
    std::function<Volume*(const std::string&)> volume;  // nullptr when it is not served
    std::function<bool(const std::string&)> may_write;  // it is primary here
  };

  explicit Attachments(Parts parts);
  ~Attachments();

  void attach(const AttachWish& wish, Done done);
  // `what` is a volume or a device. Without `force` refused while a program uses the device.
  void detach(const std::string& what, bool force, Done done);
  void volume_grew(const std::string& volume, Done done);  // also done when it is not attached

  // The volumes are open: takes care of what is recorded, from now on.
  void start();
  // No call of the driver is under way when `done` comes, and none will be made. The devices stay; their requests wait.
  void stop(std::function<void()> done);

  // "/dev/nbd0"; "" when the volume is not attached.
  std::string device_of(const std::string& volume) const;
  Json to_json(const std::string& volume) const;  // null when it is not attached
  // Why a volume may not lie on `path`: it is a device that this daemon itself serves.
  Status check_path(const std::string& path) const;

 private:
  struct Entry {
    bool busy = false;       // one act at a time
    bool connected = false;  // the kernel has sockets of this daemon
    std::string trouble{};   // "" when all is well
  };
  using Records = std::map<std::string, AttachmentRecord>;

  const Records& records() const { return parts_.state().record().attachments; }
  Status check_wish(const AttachWish& wish) const;
  void attach_as(const std::string& volume, const AttachmentRecord& record, Done done);
  void give_sockets(const std::string& volume, bool new_device, Done done);
  void forget(const std::string& volume, Done done);
  void released(const std::string& volume, const std::string& device, Done done);
  void tend(const std::string& volume);
  void tend_all();
  bool is_well(const std::string& volume) const;
  void note_trouble(const std::string& volume, const Status& status);
  void protect_from_reclaim();
  void watch_links();
  void links_died();
  KernelDeviceSpec spec_of(const AttachmentRecord& record, uint64_t size) const;
  // Runs `work` on a worker and `done` here, unless this has died.
  template <typename T>
  void on_worker(std::function<T()> work, std::function<void(T)> done);

  Parts parts_;
  std::map<std::string, Entry> entries_;
  std::unique_ptr<KernelBlockDriver::DeadLinkWatch> links_;
  WatchId links_watch_ = 0;
  Timer tend_timer_;
  bool stopped_ = false;
  bool flusher_ = false;
  size_t work_count_ = 0;  // on workers
  std::vector<std::function<void()>> idle_waiters_;
  Alive alive_;
};

}  // namespace vmferry
