// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/passed_sockets.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <systemd/sd-daemon.h>

#include <cstdlib>

namespace vmferry {

namespace {

// Why the descriptor cannot be an NBD export's; "" when it can.
std::string obstacle(int fd, Endpoint& address) {
  const int listens = sd_is_socket(fd, AF_UNSPEC, SOCK_STREAM, 1);
  if (listens < 0) return fmt::format("it cannot be looked at: {}", errno_text(-listens));
  if (listens == 0) return "it is no listening stream socket: the .socket unit needs ListenStream= and Accept=no";
  auto local = local_address(fd);
  if (!local) return local.error().text + ": ListenStream= takes /PATH or HOST:PORT";
  address = std::move(*local);
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    return fmt::format("it cannot be made non-blocking: {}", errno_text(errno));
  }
  return {};
}

}  // namespace

PassedSockets PassedSockets::take(std::vector<ConfigProblem>& problems) {
  PassedSockets passed;
  char** names = nullptr;
  const int count = sd_listen_fds_with_names(1, &names);
  if (count < 0) {
    problems.push_back({"LISTEN_FDS", fmt::format("the sockets of the service manager cannot be taken: {}; start "
                                                  "vmferryd by its .service unit, or without LISTEN_FDS and "
                                                  "LISTEN_FDNAMES",
                                                  errno_text(-count))});
  }
  for (int i = 0; i < count; ++i) {
    PassedSocket socket{.address = {}, .fd = UniqueFd(SD_LISTEN_FDS_START + i)};
    const std::string name = names[i];
    if (const std::string problem = obstacle(socket.fd.get(), socket.address); !problem.empty()) {
      problems.push_back({fmt::format("LISTEN_FDS: descriptor {} '{}'", socket.fd.get(), printable(name)), problem});
    } else {
      passed.sockets_[name].push_back(std::move(socket));
    }
  }
  for (int i = 0; i < count; ++i) std::free(names[i]);
  std::free(static_cast<void*>(names));
  return passed;
}

const std::vector<PassedSocket>* PassedSockets::of_volume(const std::string& name) const {
  const auto found = sockets_.find(name);
  return found != sockets_.end() ? &found->second : nullptr;
}

PassedAddresses PassedSockets::addresses() const {
  PassedAddresses addresses;
  for (const auto& [name, sockets] : sockets_) {
    for (const PassedSocket& socket : sockets) addresses[name].push_back(socket.address);
  }
  return addresses;
}

}  // namespace vmferry
