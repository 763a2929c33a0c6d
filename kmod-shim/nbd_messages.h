// SPDX-License-Identifier: Apache-2.0
//
// Messages of nbd.ko's generic netlink family, built and taken apart; no socket here.
//
// Source of truth: include/uapi/linux/nbd-netlink.h and drivers/block/nbd.c (nbd_genl_connect, nbd_genl_reconfigure)
// of Linux 6.1. Threads: pure functions.
#pragma once

#include <netlink/msg.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "kmod-shim/kernel_block_driver.h"

namespace vmferry {

struct NlMsgFree {
  void operator()(nl_msg* message) const { nlmsg_free(message); }
};
using NlMsg = std::unique_ptr<nl_msg, NlMsgFree>;

// `family` is the number that the kernel gave to "nbd". LimitExceeded when the attributes do not fit into a message.
Result<NlMsg> nbd_connect_message(int family, uint32_t index, const KernelDeviceSpec& spec);
Result<NlMsg> nbd_reconfigure_message(int family, uint32_t index, const KernelDeviceSpec& spec);
Result<NlMsg> nbd_disconnect_message(int family, uint32_t index);
Result<NlMsg> nbd_status_message(int family, uint32_t index);

// Whether the device of that number has a configuration, from the reply to STATUS; nullopt when it says nothing of it.
std::optional<bool> nbd_connected(nlmsghdr* reply, uint32_t index);
// The device of a LINK_DEAD notice; nullopt for anything else.
std::optional<uint32_t> nbd_dead_link(nlmsghdr* notice);

}  // namespace vmferry
