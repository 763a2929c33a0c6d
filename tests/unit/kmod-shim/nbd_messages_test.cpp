// SPDX-License-Identifier: Apache-2.0
//
// What nbd.ko is told, read back attribute by attribute; and what it says, also when it is cut.
#include "kmod-shim/nbd_messages.h"

#include <gtest/gtest.h>
#include <linux/nbd-netlink.h>
#include <netlink/attr.h>
#include <netlink/genl/genl.h>

#include <array>
#include <cstring>

#include "engine/base/bytes.h"
#include "kmod-shim/nbd_kernel_driver.h"

namespace vmferry {
namespace {

constexpr int kFamily = 30;

KernelDeviceSpec spec() {
  return {.device = "/dev/nbd5",
          .identifier = "vmferry:42",
          .size = uint64_t{5} << 40,
          .server_flags = 0xffff,
          .request_timeout_s = 30,
          .dead_timeout_s = 300,
          .sockets = {7, 9}};
}

class Attributes {
 public:
  explicit Attributes(nl_msg* message) {
    valid_ = genlmsg_parse(nlmsg_hdr(message), 0, all_.data(), NBD_ATTR_MAX, nullptr) == 0;
    command_ = static_cast<genlmsghdr*>(nlmsg_data(nlmsg_hdr(message)))->cmd;
  }
  bool valid() const { return valid_; }
  int command() const { return command_; }
  bool has(int type) const { return all_.at(static_cast<size_t>(type)) != nullptr; }
  uint64_t u64(int type) const { return nla_get_u64(all_.at(static_cast<size_t>(type))); }
  uint32_t u32(int type) const { return nla_get_u32(all_.at(static_cast<size_t>(type))); }
  std::string text(int type) const { return nla_get_string(all_.at(static_cast<size_t>(type))); }
  // NBD_SOCK_FD of each NBD_SOCK_ITEM.
  std::vector<uint32_t> sockets() const {
    std::vector<uint32_t> found;
    nlattr* const list = all_[NBD_ATTR_SOCKETS];
    int left = nla_len(list);
    for (auto* item = static_cast<nlattr*>(nla_data(list)); nla_ok(item, left) != 0; item = nla_next(item, &left)) {
      std::array<nlattr*, NBD_SOCK_MAX + 1> socket{};
      EXPECT_EQ(nla_type(item), NBD_SOCK_ITEM);
      EXPECT_EQ(nla_parse_nested(socket.data(), NBD_SOCK_MAX, item, nullptr), 0);
      found.push_back(nla_get_u32(socket[NBD_SOCK_FD]));
    }
    return found;
  }

 private:
  std::array<nlattr*, NBD_ATTR_MAX + 1> all_{};
  bool valid_ = false;
  int command_ = 0;
};

void expect_settings(const Attributes& a) {
  EXPECT_EQ(a.u32(NBD_ATTR_INDEX), 5U);
  EXPECT_EQ(a.u64(NBD_ATTR_SIZE_BYTES), uint64_t{5} << 40);
  EXPECT_EQ(a.u64(NBD_ATTR_BLOCK_SIZE_BYTES), 512U);
  EXPECT_EQ(a.u64(NBD_ATTR_TIMEOUT), 30U);
  EXPECT_EQ(a.u64(NBD_ATTR_DEAD_CONN_TIMEOUT), 300U);
  EXPECT_EQ(a.u64(NBD_ATTR_CLIENT_FLAGS), 0U) << "DISCONNECT_ON_CLOSE would detach at every umount";
  EXPECT_EQ(a.text(NBD_ATTR_BACKEND_IDENTIFIER), "vmferry:42");
  EXPECT_EQ(a.sockets(), (std::vector<uint32_t>{7, 9}));
}

// A missing attribute is a default of the kernel: no timeout, or a device that nobody finds again.
TEST(NbdMessages, ConnectCarriesEverySetting) {
  const auto message = nbd_connect_message(kFamily, 5, spec());
  ASSERT_TRUE(message);
  const Attributes a(message->get());
  ASSERT_TRUE(a.valid());
  EXPECT_EQ(nlmsg_hdr(message->get())->nlmsg_type, kFamily);
  EXPECT_EQ(a.command(), NBD_CMD_CONNECT);
  expect_settings(a);
  // HAS_FLAGS, READ_ONLY, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN; not FAST_ZERO and the like.
  EXPECT_EQ(a.u64(NBD_ATTR_SERVER_FLAGS), 0x16fU);
}

TEST(NbdMessages, ReconfigureCarriesEverySettingButTheServersFlags) {
  const auto message = nbd_reconfigure_message(kFamily, 5, spec());
  ASSERT_TRUE(message);
  const Attributes a(message->get());
  EXPECT_EQ(a.command(), NBD_CMD_RECONFIGURE);
  expect_settings(a);
  EXPECT_FALSE(a.has(NBD_ATTR_SERVER_FLAGS));
}

// An empty list would be refused by the kernel: a change of size alone sends none.
TEST(NbdMessages, NoSocketsNoList) {
  KernelDeviceSpec size_only = spec();
  size_only.sockets.clear();
  const auto message = nbd_reconfigure_message(kFamily, 5, size_only);
  ASSERT_TRUE(message);
  EXPECT_FALSE(Attributes(message->get()).has(NBD_ATTR_SOCKETS));
}

TEST(NbdMessages, DisconnectAndStatusNameTheDevice) {
  const auto disconnect = nbd_disconnect_message(kFamily, 5);
  const auto status = nbd_status_message(kFamily, 6);
  ASSERT_TRUE(disconnect && status);
  EXPECT_EQ(Attributes(disconnect->get()).command(), NBD_CMD_DISCONNECT);
  EXPECT_EQ(Attributes(disconnect->get()).u32(NBD_ATTR_INDEX), 5U);
  EXPECT_EQ(Attributes(status->get()).command(), NBD_CMD_STATUS);
  EXPECT_EQ(Attributes(status->get()).u32(NBD_ATTR_INDEX), 6U);
}

// libnl gives a message one page; a cut list of sockets would be a device with too few of them.
TEST(NbdMessages, TooManySocketsAreRefusedNotCut) {
  KernelDeviceSpec many = spec();
  many.sockets.assign(4096, 3);
  const auto message = nbd_connect_message(kFamily, 5, many);
  ASSERT_FALSE(message);
  EXPECT_EQ(message.error().kind, ErrorKind::LimitExceeded);
}

NlMsg kernel_message(uint8_t command) {
  NlMsg message(nlmsg_alloc());
  genlmsg_put(message.get(), 0, 0, kFamily, 0, 0, command, NBD_GENL_VERSION);
  return message;
}

NlMsg status_reply(const std::vector<std::pair<uint32_t, uint8_t>>& devices) {
  NlMsg message = kernel_message(NBD_CMD_STATUS);
  nlattr* const list = nla_nest_start(message.get(), NBD_ATTR_DEVICE_LIST);
  for (const auto& [index, connected] : devices) {
    nlattr* const item = nla_nest_start(message.get(), NBD_DEVICE_ITEM);
    nla_put_u32(message.get(), NBD_DEVICE_INDEX, index);
    nla_put_u8(message.get(), NBD_DEVICE_CONNECTED, connected);
    nla_nest_end(message.get(), item);
  }
  nla_nest_end(message.get(), list);
  return message;
}

// Taking the answer for another device would attach over somebody's disk.
TEST(NbdMessages, StatusIsOfTheDeviceAskedFor) {
  const NlMsg reply = status_reply({{4, 1}, {5, 0}, {6, 1}});
  nlmsghdr* const header = nlmsg_hdr(reply.get());
  EXPECT_EQ(nbd_connected(header, 4), true);
  EXPECT_EQ(nbd_connected(header, 5), false);
  EXPECT_EQ(nbd_connected(header, 7), std::nullopt);
}

TEST(NbdMessages, DeadLinkNamesTheDevice) {
  const NlMsg notice = kernel_message(NBD_CMD_LINK_DEAD);
  EXPECT_EQ(nbd_dead_link(nlmsg_hdr(notice.get())), std::nullopt) << "no index";
  nla_put_u32(notice.get(), NBD_ATTR_INDEX, 9);
  EXPECT_EQ(nbd_dead_link(nlmsg_hdr(notice.get())), 9U);
  const NlMsg other = kernel_message(NBD_CMD_STATUS);
  nla_put_u32(other.get(), NBD_ATTR_INDEX, 9);
  EXPECT_EQ(nbd_dead_link(nlmsg_hdr(other.get())), std::nullopt);
}

// Read past its end, a cut message gives whatever lies behind it in memory (the sanitizer sees that).
TEST(NbdMessages, EveryTruncationOfAReplyIsNoAnswer) {
  const NlMsg reply = status_reply({{5, 1}});
  const nlmsghdr* const whole = nlmsg_hdr(reply.get());
  for (uint32_t size = sizeof(nlmsghdr); size < whole->nlmsg_len; ++size) {
    Bytes cut(size);
    std::memcpy(cut.data(), whole, size);
    std::memcpy(cut.data(), &size, sizeof(size));  // nlmsg_len
    EXPECT_EQ(nbd_connected(reinterpret_cast<nlmsghdr*>(cut.data()), 5), std::nullopt) << size;
    EXPECT_EQ(nbd_dead_link(reinterpret_cast<nlmsghdr*>(cut.data())), std::nullopt) << size;
  }
}

// "/dev/sda" handed to the kernel as number 0 would be somebody else's device.
TEST(NbdKernelDriver, KnowsItsOwnDevicesByName) {
  const NbdKernelDriver driver;
  for (const char* good : {"/dev/nbd0", "/dev/nbd10", "/dev/nbd1023"}) EXPECT_EQ(driver.device_of(good), good);
  for (const char* bad : {"", "/dev/nbd", "/dev/sda", "nbd0", "/dev/nbd1024", "/dev/nbd-1", "/dev/nbd0p1", "/dev/nbd00",
                          "/dev/nbd 1", "/dev/nbd99999999999999999999"}) {
    const auto device = driver.device_of(bad);
    ASSERT_FALSE(device) << bad;
    EXPECT_EQ(device.error().kind, ErrorKind::InvalidArgument);
    EXPECT_NE(device.error().text.find("give /dev/nbd0 to /dev/nbd1023"), std::string::npos);
  }
}

}  // namespace
}  // namespace vmferry
