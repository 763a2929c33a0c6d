// SPDX-License-Identifier: Apache-2.0
#include "kmod-shim/nbd_messages.h"

#include <linux/nbd-netlink.h>
#include <linux/nbd.h>
#include <netlink/attr.h>
#include <netlink/genl/genl.h>

#include <array>

#include "netproto/nbd/wire.h"

namespace vmferry {

namespace {

// What nbd.ko understands of the transmission flags; the others are not its business.
constexpr uint64_t kFlagsKnown = nbd::kHasFlags | nbd::kReadOnly | nbd::kSendFlush | nbd::kSendFua | nbd::kSendTrim |
                                 nbd::kSendWriteZeroes | nbd::kCanMultiConn;

// Remembers the first attribute that did not fit.
class Builder {
 public:
  Builder(int family, uint8_t command) : message_(nlmsg_alloc()) {
    ok_ = message_ != nullptr &&
          genlmsg_put(message_.get(), NL_AUTO_PORT, NL_AUTO_SEQ, family, 0, 0, command, NBD_GENL_VERSION) != nullptr;
  }
  Builder& u32(int type, uint32_t value) { return note(ok_ && nla_put_u32(message_.get(), type, value) == 0); }
  Builder& u64(int type, uint64_t value) { return note(ok_ && nla_put_u64(message_.get(), type, value) == 0); }
  Builder& text(int type, const std::string& value) {
    return note(ok_ && nla_put_string(message_.get(), type, value.c_str()) == 0);
  }
  Builder& sockets(const std::vector<int>& sockets) {
    if (!ok_ || sockets.empty()) return *this;
    nlattr* const list = nla_nest_start(message_.get(), NBD_ATTR_SOCKETS);
    if (list == nullptr) return note(false);
    for (const int fd : sockets) {
      nlattr* const item = nla_nest_start(message_.get(), NBD_SOCK_ITEM);
      if (item == nullptr) return note(false);
      u32(NBD_SOCK_FD, static_cast<uint32_t>(fd));
      nla_nest_end(message_.get(), item);
    }
    nla_nest_end(message_.get(), list);
    return *this;
  }
  Result<NlMsg> take() {
    if (!ok_) return fail(ErrorKind::LimitExceeded, "too many connections for one netlink message");
    return std::move(message_);
  }

 private:
  Builder& note(bool fits) {
    ok_ = ok_ && fits;
    return *this;
  }
  NlMsg message_;
  bool ok_ = false;
};

// Attributes of a message of the family; false when it is cut or its attributes are of other types.
template <size_t N>
bool parse(nlmsghdr* message, std::array<nlattr*, N>& attributes, const std::array<nla_policy, N>& policy) {
  return genlmsg_valid_hdr(message, 0) != 0 &&
         genlmsg_parse(message, 0, attributes.data(), static_cast<int>(N) - 1, policy.data()) == 0;
}

constexpr std::array<nla_policy, NBD_ATTR_MAX + 1> reply_policy() {
  std::array<nla_policy, NBD_ATTR_MAX + 1> policy{};
  policy[NBD_ATTR_INDEX].type = NLA_U32;
  policy[NBD_ATTR_DEVICE_LIST].type = NLA_NESTED;
  return policy;
}

constexpr std::array<nla_policy, NBD_DEVICE_ATTR_MAX + 1> device_policy() {
  std::array<nla_policy, NBD_DEVICE_ATTR_MAX + 1> policy{};
  policy[NBD_DEVICE_INDEX].type = NLA_U32;
  policy[NBD_DEVICE_CONNECTED].type = NLA_U8;
  return policy;
}

constexpr std::array<nla_policy, NBD_ATTR_MAX + 1> kReplyPolicy = reply_policy();
constexpr std::array<nla_policy, NBD_DEVICE_ATTR_MAX + 1> kDevicePolicy = device_policy();

// CONNECT and RECONFIGURE. NBD_CFLAG_DISCONNECT_ON_CLOSE stays unset: unmounting a file system is no wish to detach.
Builder& add_settings(Builder& builder, const KernelDeviceSpec& spec) {
  return builder.u64(NBD_ATTR_SIZE_BYTES, spec.size)
      .u64(NBD_ATTR_BLOCK_SIZE_BYTES, spec.block_size)
      .u64(NBD_ATTR_TIMEOUT, spec.request_timeout_s)
      .u64(NBD_ATTR_DEAD_CONN_TIMEOUT, spec.dead_timeout_s)
      .u64(NBD_ATTR_CLIENT_FLAGS, 0)
      .text(NBD_ATTR_BACKEND_IDENTIFIER, spec.identifier)
      .sockets(spec.sockets);
}

}  // namespace

Result<NlMsg> nbd_connect_message(int family, uint32_t index, const KernelDeviceSpec& spec) {
  Builder builder(family, NBD_CMD_CONNECT);
  builder.u32(NBD_ATTR_INDEX, index).u64(NBD_ATTR_SERVER_FLAGS, spec.server_flags & kFlagsKnown);
  return add_settings(builder, spec).take();
}

Result<NlMsg> nbd_reconfigure_message(int family, uint32_t index, const KernelDeviceSpec& spec) {
  Builder builder(family, NBD_CMD_RECONFIGURE);
  return add_settings(builder.u32(NBD_ATTR_INDEX, index), spec).take();
}

Result<NlMsg> nbd_disconnect_message(int family, uint32_t index) {
  return Builder(family, NBD_CMD_DISCONNECT).u32(NBD_ATTR_INDEX, index).take();
}

Result<NlMsg> nbd_status_message(int family, uint32_t index) {
  return Builder(family, NBD_CMD_STATUS).u32(NBD_ATTR_INDEX, index).take();
}

std::optional<bool> nbd_connected(nlmsghdr* reply, uint32_t index) {
  std::array<nlattr*, NBD_ATTR_MAX + 1> attributes{};
  if (!parse(reply, attributes, kReplyPolicy) || attributes[NBD_ATTR_DEVICE_LIST] == nullptr) return std::nullopt;
  nlattr* const list = attributes[NBD_ATTR_DEVICE_LIST];
  int left = nla_len(list);
  for (nlattr* item = static_cast<nlattr*>(nla_data(list)); nla_ok(item, left) != 0; item = nla_next(item, &left)) {
    std::array<nlattr*, NBD_DEVICE_ATTR_MAX + 1> device{};
    if (nla_type(item) != NBD_DEVICE_ITEM ||
        nla_parse_nested(device.data(), NBD_DEVICE_ATTR_MAX, item, kDevicePolicy.data()) != 0 ||
        device[NBD_DEVICE_INDEX] == nullptr || device[NBD_DEVICE_CONNECTED] == nullptr) {
      continue;
    }
    if (nla_get_u32(device[NBD_DEVICE_INDEX]) == index) return nla_get_u8(device[NBD_DEVICE_CONNECTED]) != 0;
  }
  return std::nullopt;
}

std::optional<uint32_t> nbd_dead_link(nlmsghdr* notice) {
  std::array<nlattr*, NBD_ATTR_MAX + 1> attributes{};
  if (!parse(notice, attributes, kReplyPolicy)) return std::nullopt;
  const auto* const header = static_cast<const genlmsghdr*>(nlmsg_data(notice));
  if (header->cmd != NBD_CMD_LINK_DEAD || attributes[NBD_ATTR_INDEX] == nullptr) return std::nullopt;
  return nla_get_u32(attributes[NBD_ATTR_INDEX]);
}

}  // namespace vmferry
