// SPDX-License-Identifier: Apache-2.0
#include "kmod-shim/nbd_socket.h"

#include <fcntl.h>
#include <linux/nbd-netlink.h>
#include <netlink/errno.h>
#include <netlink/genl/ctrl.h>
#include <netlink/genl/genl.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <cerrno>

namespace vmferry {

namespace {

// DISCONNECT may wait for a full socket until the request timeout is over; this is for a kernel that never answers.
constexpr timeval kAnswerTimeout{.tv_sec = 120, .tv_usec = 0};

struct Exchange {
  const std::function<void(nlmsghdr*)>& handler;
  bool answered = false;
  Errno error = 0;
};

int on_message(nl_msg* message, void* context) {
  const auto& handler = static_cast<Exchange*>(context)->handler;
  if (handler) handler(nlmsg_hdr(message));
  return NL_OK;
}

int on_acknowledged(nl_msg*, void* context) {
  static_cast<Exchange*>(context)->answered = true;
  return NL_STOP;
}

// libnl folds errnos into fewer codes of its own; the message has the kernel's.
int on_error(sockaddr_nl*, nlmsgerr* answer, void* context) {
  auto& exchange = *static_cast<Exchange*>(context);
  exchange.answered = true;
  exchange.error = -answer->error;
  return NL_STOP;
}

Status cannot(const char* what, int nl_error) {
  return fail(ErrorKind::Internal, "{}: {}", what, nl_geterror(nl_error));
}

}  // namespace

Result<NbdSocket> NbdSocket::open() {
  NlSock socket(nl_socket_alloc());
  if (socket == nullptr) return fail(ErrorKind::Internal, "no memory for a netlink socket");
  if (const int error = genl_connect(socket.get()); error < 0) {
    return tl::unexpected(cannot("cannot open a generic netlink socket", error).error());
  }
  const int descriptor = nl_socket_get_fd(socket.get());
  ::fcntl(descriptor, F_SETFD, FD_CLOEXEC);
  const int family = genl_ctrl_resolve(socket.get(), NBD_GENL_FAMILY_NAME);
  if (family == -NLE_OBJ_NOTFOUND || family == -NLE_NODEV) {
    return fail(ErrorKind::Unavailable,
                "the kernel's nbd driver is not there: modprobe nbd nbds_max=16 (and for the next boot: echo nbd > "
                "/etc/modules-load.d/nbd.conf); in a container, vmferryd has to run in the host's network namespace");
  }
  if (family < 0) return tl::unexpected(cannot("cannot ask the kernel for its nbd driver", family).error());
  ::setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &kAnswerTimeout, sizeof(kAnswerTimeout));
  return NbdSocket(std::move(socket), family);
}

Errno NbdSocket::request(NlMsg message, const std::function<void(nlmsghdr*)>& reply) {
  Exchange exchange{.handler = reply};
  nl_socket_modify_cb(socket_.get(), NL_CB_VALID, NL_CB_CUSTOM, on_message, &exchange);
  nl_socket_modify_cb(socket_.get(), NL_CB_ACK, NL_CB_CUSTOM, on_acknowledged, &exchange);
  nl_socket_modify_err_cb(socket_.get(), NL_CB_CUSTOM, on_error, &exchange);
  if (nl_send_auto(socket_.get(), message.get()) < 0) return errno != 0 ? errno : EIO;
  while (!exchange.answered) {
    const int error = nl_recvmsgs_default(socket_.get());
    if (error == -NLE_INTR) continue;
    if (error < 0 && !exchange.answered) return error == -NLE_AGAIN ? ETIMEDOUT : EIO;
  }
  return exchange.error;
}

Status NbdSocket::join_dead_link_group() {
  const int group = genl_ctrl_resolve_grp(socket_.get(), NBD_GENL_FAMILY_NAME, NBD_GENL_MCAST_GROUP_NAME);
  if (group < 0) return cannot("the nbd driver has no group for notices", group);
  nl_socket_disable_seq_check(socket_.get());
  if (const int error = nl_socket_add_membership(socket_.get(), group); error < 0) {
    return cannot("cannot hear the nbd driver's notices", error);
  }
  if (const int error = nl_socket_set_nonblocking(socket_.get()); error < 0) return cannot("netlink socket", error);
  return {};
}

bool NbdSocket::take_notices(const std::function<void(nlmsghdr*)>& notice) {
  Exchange exchange{.handler = notice};
  nl_socket_modify_cb(socket_.get(), NL_CB_VALID, NL_CB_CUSTOM, on_message, &exchange);
  return nl_recvmsgs_default(socket_.get()) >= 0;
}

}  // namespace vmferry
