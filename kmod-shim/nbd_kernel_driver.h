// SPDX-License-Identifier: Apache-2.0
//
// nbd.ko as a KernelBlockDriver: /dev/nbdN through generic netlink (nbd_messages.h).
//
// Needs CAP_SYS_ADMIN, the module, and the initial network namespace. A device that does not exist yet is made by the
// kernel, so there are more of them than nbds_max. Threads: as KernelBlockDriver.
#pragma once

#include "kmod-shim/kernel_block_driver.h"

namespace vmferry {

class NbdKernelDriver final : public KernelBlockDriver {
 public:
  static constexpr uint32_t kDeviceCountMax = 1024;  // nbd0..nbd1023: what find_free() looks at

  Result<std::string> device_of(std::string_view path) const override;
  Status available() const override;
  Result<std::string> find_free(const std::vector<std::string>& reserved) const override;
  Result<KernelDeviceState> state_of(const std::string& device, std::string_view identifier) const override;
  Status attach(const KernelDeviceSpec& spec) override;
  Status reconfigure(const KernelDeviceSpec& spec) override;
  Status detach(const std::string& device) override;
  Result<std::unique_ptr<DeadLinkWatch>> watch_dead_links() override;
};

}  // namespace vmferry
