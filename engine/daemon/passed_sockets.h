// SPDX-License-Identifier: Apache-2.0
//
// Listening sockets that the service manager passed to this process (LISTEN_FDS, sd_listen_fds(3)), by the name of the
// volume whose NBD export they are of: FileDescriptorName= in the .socket unit.
//
// Flow: tools/vmferryd takes them before it opens anything else, the configuration is checked against their addresses,
// Daemon keeps them and lends them to its volumes. They outlive each export and this process: clients that come while
// nothing accepts wait in their queue. Threads: take() once, from main(); then a value that does not change.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine/control/config.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

struct PassedSocket {
  Endpoint address;
  UniqueFd fd;  // non-blocking, close-on-exec
};

class PassedSockets {
 public:
  // Empty when nothing was passed to this process. What cannot be used is a problem each, with what to do. The
  // variables are removed from the environment, so that no child takes them for its own.
  static PassedSockets take(std::vector<ConfigProblem>& problems);

  // nullptr when none was passed for the volume.
  const std::vector<PassedSocket>* of_volume(const std::string& name) const;
  PassedAddresses addresses() const;

 private:
  std::map<std::string, std::vector<PassedSocket>> sockets_;
};

}  // namespace vmferry
