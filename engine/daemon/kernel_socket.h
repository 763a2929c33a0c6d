// SPDX-License-Identifier: Apache-2.0
//
// Connections for the kernel's NBD client: socketpairs, one end of each given to an NbdServer of this process, the
// other taken through the handshake and handed out.
//
// No listener and no path is involved, so it works for volumes without nbd=, and nobody else can get in between.
// Threads: the reactor's.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "blockdev/nbd/nbd_server.h"
#include "engine/runtime/reactor.h"
#include "netproto/nbd/client_handshake.h"

namespace vmferry {

struct KernelSockets {
  nbd::ExportFacts facts;
  std::vector<UniqueFd> fds;  // in the transmission phase
};

// Makes `count` of them to `export_name` of `server`, which may stop meanwhile. `done` comes once, never inline.
void make_kernel_sockets(Reactor& reactor, NbdServer& server, const std::string& export_name, const std::string& user,
                         uint32_t count, std::function<void(Result<KernelSockets>)> done);

}  // namespace vmferry
