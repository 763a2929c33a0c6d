// SPDX-License-Identifier: Apache-2.0
#include "kmod-shim/nbd_kernel_driver.h"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <optional>
#include <set>

#include "engine/base/text.h"
#include "kmod-shim/nbd_socket.h"

namespace vmferry {

namespace {

constexpr std::string_view kPrefix = "/dev/nbd";
constexpr const char* kIdentifierFile = "backend";  // since Linux 5.14; before, nothing tells whose a device is

// Of a name that device_of() has made or accepted.
Result<uint32_t> index_of(std::string_view device) {
  if (device.starts_with(kPrefix)) {
    const auto number = parse_uint(device.substr(kPrefix.size()));
    const bool plain = device.size() == kPrefix.size() + 1 || device[kPrefix.size()] != '0';
    if (number && plain && *number < NbdKernelDriver::kDeviceCountMax) return static_cast<uint32_t>(*number);
  }
  return fail(ErrorKind::InvalidArgument, "'{}' is no nbd device: give /dev/nbd0 to /dev/nbd{}, or leave it out",
              printable(device), NbdKernelDriver::kDeviceCountMax - 1);
}

std::string device_name(uint32_t index) {
  return fmt::format("{}{}", kPrefix, index);
}

// One line of a file of sysfs; "" when it is not there.
std::string sysfs_line(uint32_t index, const char* file) {
  std::ifstream in(fmt::format("/sys/block/nbd{}/{}", index, file));
  std::string line;
  std::getline(in, line);
  return line;
}

Status denied() {
  return fail(ErrorKind::Denied,
              "the kernel lets only root (CAP_SYS_ADMIN) attach and detach devices: run vmferryd as root, or with "
              "AmbientCapabilities=CAP_SYS_ADMIN in its unit");
}

Status attach_error(Errno error, const std::string& device) {
  switch (error) {
    case 0:
      return {};
    case EPERM:
      return denied();
    case EBUSY:
      return fail(ErrorKind::Busy, "{} is attached to something else already: leave --device out, or free it first",
                  device);
    case EINVAL:
      return fail(ErrorKind::Io, "the kernel refuses the settings for {}: {}; its log (dmesg) says which", device,
                  errno_text(error));
    default:
      return fail(ErrorKind::Io, "the kernel cannot attach {}: {}; see its log (dmesg)", device, errno_text(error));
  }
}

class NbdDeadLinkWatch final : public KernelBlockDriver::DeadLinkWatch {
 public:
  explicit NbdDeadLinkWatch(NbdSocket socket) : socket_(std::move(socket)) {}

  int fd() const override { return socket_.fd(); }
  std::vector<std::string> take() override {
    std::set<std::string> devices;
    const auto note = [&](nlmsghdr* notice) {
      if (const auto index = nbd_dead_link(notice)) devices.insert(device_name(*index));
    };
    // Bounded, because any process may make links die; the next call goes on.
    for (int rounds = 0; rounds < 64 && socket_.take_notices(note); ++rounds) {
    }
    return {devices.begin(), devices.end()};
  }

 private:
  NbdSocket socket_;
};

}  // namespace

Result<std::string> NbdKernelDriver::device_of(std::string_view path) const {
  const auto index = index_of(path);
  if (!index) return tl::unexpected(index.error());
  return device_name(*index);
}

Status NbdKernelDriver::available() const {
  const auto socket = NbdSocket::open();
  if (!socket) return tl::unexpected(socket.error());
  return {};
}

Result<KernelDeviceState> NbdKernelDriver::state_of(const std::string& device, std::string_view identifier) const {
  const auto index = index_of(device);
  if (!index) return tl::unexpected(index.error());
  auto socket = NbdSocket::open();
  if (!socket) return tl::unexpected(socket.error());
  auto message = nbd_status_message(socket->family(), *index);
  if (!message) return tl::unexpected(message.error());
  std::optional<bool> connected;
  const Errno error = socket->request(std::move(*message), [&](nlmsghdr* reply) {
    if (const auto answer = nbd_connected(reply, *index)) connected = answer;
  });
  if (error == EPERM) return tl::unexpected(denied().error());
  if (error != 0) return fail(ErrorKind::Io, "the kernel does not tell the state of {}: {}", device, errno_text(error));
  if (!connected.value_or(false)) return KernelDeviceState::Free;
  return sysfs_line(*index, kIdentifierFile) == identifier ? KernelDeviceState::Ours : KernelDeviceState::Taken;
}

Result<std::string> NbdKernelDriver::find_free(const std::vector<std::string>& reserved) const {
  for (uint32_t index = 0; index < kDeviceCountMax; ++index) {
    std::string device = device_name(index);
    if (std::find(reserved.begin(), reserved.end(), device) != reserved.end()) continue;
    const auto state = state_of(device, "");
    if (!state) return tl::unexpected(state.error());
    if (*state == KernelDeviceState::Free) return device;
  }
  return fail(ErrorKind::LimitExceeded, "no free device: {}0 to {}{} are all attached; detach one", kPrefix, kPrefix,
              kDeviceCountMax - 1);
}

Status NbdKernelDriver::attach(const KernelDeviceSpec& spec) {
  const auto index = index_of(spec.device);
  if (!index) return tl::unexpected(index.error());
  auto socket = NbdSocket::open();
  if (!socket) return tl::unexpected(socket.error());
  auto message = nbd_connect_message(socket->family(), *index, spec);
  if (!message) return tl::unexpected(message.error());
  if (Status attached = attach_error(socket->request(std::move(*message)), spec.device); !attached) return attached;
  if (sysfs_line(*index, kIdentifierFile) == spec.identifier) return {};
  if (Status undone = detach(spec.device); !undone) return undone;
  return fail(ErrorKind::Unavailable,
              "this kernel keeps no identifier with {}, so that nobody could know it again: Linux 5.14 is needed",
              spec.device);
}

Status NbdKernelDriver::reconfigure(const KernelDeviceSpec& spec) {
  const auto index = index_of(spec.device);
  if (!index) return tl::unexpected(index.error());
  auto socket = NbdSocket::open();
  if (!socket) return tl::unexpected(socket.error());
  auto message = nbd_reconfigure_message(socket->family(), *index, spec);
  if (!message) return tl::unexpected(message.error());
  switch (const Errno error = socket->request(std::move(*message)); error) {
    case 0:
      return {};
    case EPERM:
      return denied();
    default:
      return fail(ErrorKind::Io, "the kernel does not take new settings for {}: {}; see its log (dmesg)", spec.device,
                  errno_text(error));
  }
}

Status NbdKernelDriver::detach(const std::string& device) {
  const auto index = index_of(device);
  if (!index) return tl::unexpected(index.error());
  auto socket = NbdSocket::open();
  if (!socket) return tl::unexpected(socket.error());
  auto message = nbd_disconnect_message(socket->family(), *index);
  if (!message) return tl::unexpected(message.error());
  switch (const Errno error = socket->request(std::move(*message)); error) {
    case 0:
    case ENOENT:  // the module was unloaded or the device is gone: what was wanted
      return {};
    case EPERM:
      return denied();
    default:
      return fail(ErrorKind::Io, "the kernel does not detach {}: {}; see its log (dmesg)", device, errno_text(error));
  }
}

Result<std::unique_ptr<KernelBlockDriver::DeadLinkWatch>> NbdKernelDriver::watch_dead_links() {
  auto socket = NbdSocket::open();
  if (!socket) return tl::unexpected(socket.error());
  if (Status joined = socket->join_dead_link_group(); !joined) return tl::unexpected(joined.error());
  return std::make_unique<NbdDeadLinkWatch>(std::move(*socket));
}

}  // namespace vmferry
