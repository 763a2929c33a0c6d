// SPDX-License-Identifier: Apache-2.0
#include "perf/wan/netns.h"

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <sched.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstring>

extern char** environ;

namespace vmferry::wan {
namespace {

constexpr const char* kTunPath = "/dev/net/tun";
constexpr const char* kNetnsFolder = "/run/netns/";

// Packets the kernel keeps for us while we do not run; the default of 500 is 6 ms at 1 Gbit/s without offload.
constexpr const char* kTunQueuePackets = "8192";

// Runs `ip` with these arguments; its messages go to our stderr.
Status run_ip(const std::vector<std::string>& arguments, bool quiet = false) {
  std::vector<char*> argv{const_cast<char*>("ip")};
  std::string line = "ip";
  for (const std::string& argument : arguments) {
    argv.push_back(const_cast<char*>(argument.c_str()));
    line += " " + argument;
  }
  argv.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  if (quiet) posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  // Its own process group: Ctrl-C at the terminal must not break off the clean-up.
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
  pid_t pid = 0;
  const int spawned = posix_spawnp(&pid, "ip", &actions, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (spawned != 0) {
    return fail(ErrorKind::Unavailable, "cannot start 'ip' (package iproute2): {}", errno_text(spawned));
  }
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return fail(ErrorKind::Io, "'{}' failed", line);
  return {};
}

Status write_sysctl(const std::string& name, const std::string& value) {
  std::string path = "/proc/sys/" + name;
  std::replace(path.begin() + static_cast<std::ptrdiff_t>(std::strlen("/proc/sys/")), path.end(), '.', '/');
  const Fd file(open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (file.get() < 0) return fail(ErrorKind::NotFound, "open '{}': {}", path, errno_text(errno));
  if (write(file.get(), value.data(), value.size()) != static_cast<ssize_t>(value.size())) {
    return fail(ErrorKind::InvalidArgument, "write '{}' to '{}': {}", value, path, errno_text(errno));
  }
  return {};
}

// Goes back to the namespace of the start at the end of the scope.
class NetnsScope {
 public:
  static Result<NetnsScope> enter(const std::string& name) {
    NetnsScope scope(Fd(open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC)));
    const Fd target(open((kNetnsFolder + name).c_str(), O_RDONLY | O_CLOEXEC));
    if (scope.home_.get() < 0 || target.get() < 0 || setns(target.get(), CLONE_NEWNET) != 0) {
      return fail(ErrorKind::Io, "enter network namespace '{}': {}", name, errno_text(errno));
    }
    scope.entered_ = true;
    return scope;
  }
  NetnsScope(NetnsScope&& other) noexcept
      : home_(std::move(other.home_)), entered_(std::exchange(other.entered_, false)) {}
  NetnsScope& operator=(NetnsScope&&) = delete;
  ~NetnsScope() {
    // Left behind in the wrong namespace, the next end would be made inside this one.
    if (entered_ && setns(home_.get(), CLONE_NEWNET) != 0) std::abort();
  }

 private:
  explicit NetnsScope(Fd home) : home_(std::move(home)) {}
  Fd home_;
  bool entered_ = false;
};

}  // namespace

Fd& Fd::operator=(Fd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

Status check_host() {
  if (geteuid() != 0) {
    return fail(ErrorKind::Denied, "must run as root (CAP_NET_ADMIN and CAP_SYS_ADMIN: TUN devices and namespaces)");
  }
  const Fd tun(open(kTunPath, O_RDWR | O_CLOEXEC));
  if (tun.get() < 0) {
    return fail(ErrorKind::Unavailable, "open {}: {}; load the module (modprobe tun) or pass the device through",
                kTunPath, errno_text(errno));
  }
  unsigned features = 0;
  if (ioctl(tun.get(), TUNGETFEATURES, &features) != 0) {
    return fail(ErrorKind::Unavailable, "TUNGETFEATURES on {}: {}", kTunPath, errno_text(errno));
  }
  constexpr unsigned kWanted = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  if ((features & kWanted) != kWanted) {
    return fail(ErrorKind::Unavailable, "TUN features {:#x} lack {:#x} of IFF_TUN, IFF_NO_PI, IFF_VNET_HDR", features,
                kWanted & ~features);
  }
  const Fd netns(open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC));
  if (netns.get() < 0) {
    return fail(ErrorKind::Unavailable, "this kernel has no network namespaces (CONFIG_NET_NS)");
  }
  const Status ip = run_ip({"netns", "list"});
  if (!ip) return fail_with(ip.error(), "named network namespaces");
  return {};
}

Result<End> End::create(const EndOptions& options) {
  if (access((kNetnsFolder + options.netns).c_str(), F_OK) == 0) {
    if (const Status stale = run_ip({"netns", "del", options.netns}); !stale) return tl::unexpected(stale.error());
  }
  if (const Status added = run_ip({"netns", "add", options.netns}); !added) return tl::unexpected(added.error());
  End end(options.netns);
  if (const Status opened = end.open_device(options); !opened) return fail_with(opened.error(), options.netns);
  const std::vector<std::vector<std::string>> steps{
      {"-n", options.netns, "addr", "add", options.address, "peer", options.peer_address, "dev", kDeviceName},
      {"-n", options.netns, "link", "set", "lo", "up"},
      {"-n", options.netns, "link", "set", kDeviceName, "mtu", "1500", "txqueuelen", kTunQueuePackets, "up"},
  };
  for (const std::vector<std::string>& step : steps) {
    if (const Status done = run_ip(step); !done) return tl::unexpected(done.error());
  }
  return end;
}

Status End::open_device(const EndOptions& options) {
  const Result<NetnsScope> scope = NetnsScope::enter(options.netns);
  if (!scope) return tl::unexpected(scope.error());
  // Router solicitations would be counted as traffic of the program under test. Without IPv6 there is nothing to do.
  if (access("/proc/sys/net/ipv6", F_OK) == 0) {
    for (const char* name : {"net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.default.disable_ipv6"}) {
      if (Status written = write_sysctl(name, "1"); !written) return written;
    }
  }
  for (const auto& [name, value] : options.sysctls) {
    if (Status written = write_sysctl(name, value); !written) return written;
  }

  tun_ = Fd(open(kTunPath, O_RDWR | O_NONBLOCK | O_CLOEXEC));
  if (tun_.get() < 0) return fail(ErrorKind::Unavailable, "open {}: {}", kTunPath, errno_text(errno));
  ifreq request{};
  request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  std::strncpy(request.ifr_name, kDeviceName, IFNAMSIZ - 1);
  if (ioctl(tun_.get(), TUNSETIFF, &request) != 0) {
    return fail(ErrorKind::Io, "create TUN device {}: {}", kDeviceName, errno_text(errno));
  }
  const unsigned long offloads = options.offload ? TUN_F_CSUM | TUN_F_TSO4 : 0UL;
  if (ioctl(tun_.get(), TUNSETOFFLOAD, offloads) != 0) {
    return fail(ErrorKind::Unavailable, "TUNSETOFFLOAD {:#x}: {}; try --offload off", offloads, errno_text(errno));
  }
  // Opened here, it shows the devices of this namespace for ever.
  device_statistics_ = Fd(open("/proc/thread-self/net/dev", O_RDONLY | O_CLOEXEC));
  if (device_statistics_.get() < 0) return fail(ErrorKind::Io, "open /proc/net/dev: {}", errno_text(errno));
  return {};
}

Result<uint64_t> End::overruns() const {
  std::array<char, 4096> buffer;
  const ssize_t size = pread(device_statistics_.get(), buffer.data(), buffer.size(), 0);
  if (size < 0) return fail(ErrorKind::Io, "read /proc/net/dev: {}", errno_text(errno));
  std::string_view text(buffer.data(), static_cast<size_t>(size));
  const size_t name = text.find(std::string(kDeviceName) + ":");
  if (name == std::string_view::npos) return fail(ErrorKind::NotFound, "/proc/net/dev has no {}", kDeviceName);
  text.remove_prefix(name + std::strlen(kDeviceName) + 1);
  // Columns: 8 of receive, then transmit bytes, packets, errs, drop.
  constexpr int kTransmitDrop = 11;
  uint64_t value = 0;
  for (int column = 0; column <= kTransmitDrop; ++column) {
    text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{}) return fail(ErrorKind::Corrupt, "/proc/net/dev: column {} is not a number", column);
    text.remove_prefix(static_cast<size_t>(end - text.data()));
  }
  return value;
}

End::End(End&& other) noexcept
    : netns_(std::exchange(other.netns_, {})),
      tun_(std::move(other.tun_)),
      device_statistics_(std::move(other.device_statistics_)) {}

End::~End() {
  if (netns_.empty()) return;
  tun_ = Fd();
  if (!run_ip({"netns", "del", netns_}, true)) {
    fmt::print(stderr, "vmferry-wan: could not remove network namespace '{}'\n", netns_);
  }
}

}  // namespace vmferry::wan
