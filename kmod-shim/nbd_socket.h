// SPDX-License-Identifier: Apache-2.0
//
// A generic netlink socket bound to nbd.ko's family: one request, one answer. Threads: one owner.
#pragma once

#include <netlink/socket.h>

#include <functional>
#include <memory>

#include "kmod-shim/nbd_messages.h"

namespace vmferry {

struct NlSockFree {
  void operator()(nl_sock* socket) const { nl_socket_free(socket); }
};
using NlSock = std::unique_ptr<nl_sock, NlSockFree>;

class NbdSocket {
 public:
  // Unavailable, with what to do, while the module is not loaded.
  static Result<NbdSocket> open();

  int family() const { return family_; }
  // Sends and waits for the acknowledgement: 0, or the errno that the kernel answers with. `reply` sees what comes
  // before it.
  Errno request(NlMsg message, const std::function<void(nlmsghdr*)>& reply = {});

  // For notices instead of requests; the socket does not block any more.
  Status join_dead_link_group();
  int fd() const { return nl_socket_get_fd(socket_.get()); }
  // Hands over what has come; false when there was nothing, or some was lost.
  bool take_notices(const std::function<void(nlmsghdr*)>& notice);

 private:
  NbdSocket(NlSock socket, int family) : socket_(std::move(socket)), family_(family) {}

  NlSock socket_;
  int family_;
};

}  // namespace vmferry
