// SPDX-License-Identifier: Apache-2.0
//
// A kernel module that turns a server in this process into a local block device.
//
// Flow: engine/daemon/attachments decides what is attached where and makes the connections; a driver tells the kernel.
// Implementations: NbdKernelDriver (nbd.ko). One that needs no sockets (ublk) will ignore them.
// Threads: every call blocks, some for seconds, and may wait for I/O on the device: never call from the thread that
// serves it. Calls may come from several threads; a driver has no state of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/base/result.h"

namespace vmferry {

struct KernelDeviceSpec {
  std::string device;      // "/dev/nbd3"
  std::string identifier;  // the kernel keeps it with the device: a restarted daemon knows its own by it
  uint64_t size = 0;       // bytes, a multiple of block_size
  uint32_t block_size = 512;
  uint16_t server_flags = 0;       // transmission flags of the export
  uint32_t request_timeout_s = 0;  // a request without a reply for so long goes over another connection
  uint32_t dead_timeout_s = 0;     // without any connection for so long, requests fail
  std::vector<int> sockets{};      // connected, past the handshake; the kernel takes references of its own
};

enum class KernelDeviceState : uint8_t {
  Free,   // also: would be made
  Ours,   // attached with this identifier
  Taken,  // by anybody else
};

class KernelBlockDriver {
 public:
  virtual ~KernelBlockDriver() = default;

  // "/dev/nbd3" for a path that names a device of this driver; InvalidArgument says what would.
  virtual Result<std::string> device_of(std::string_view path) const = 0;
  // Unavailable, with what to do, while the module is not there.
  virtual Status available() const = 0;
  // The first device that is free and not among `reserved`. LimitExceeded when there is none.
  virtual Result<std::string> find_free(const std::vector<std::string>& reserved) const = 0;
  virtual Result<KernelDeviceState> state_of(const std::string& device, std::string_view identifier) const = 0;

  // Busy when the device is attached already, Denied without the right to.
  virtual Status attach(const KernelDeviceSpec& spec) = 0;
  // For an attached device: new sockets in the place of dead ones (more than are dead are ignored), size and timeouts
  // as in `spec`. Identifier and block size have to be those of the attachment.
  virtual Status reconfigure(const KernelDeviceSpec& spec) = 0;
  // Requests that are under way fail.
  virtual Status detach(const std::string& device) = 0;

  // Keeps a descriptor readable while there is news of dead connections.
  class DeadLinkWatch {
   public:
    virtual ~DeadLinkWatch() = default;
    virtual int fd() const = 0;
    // Devices whose connections died since the last call; does not block.
    virtual std::vector<std::string> take() = 0;
  };
  virtual Result<std::unique_ptr<DeadLinkWatch>> watch_dead_links() = 0;
};

}  // namespace vmferry
