// SPDX-License-Identifier: Apache-2.0
//
// vmferry-wan: two network namespaces joined by an emulated long-distance link, in one process, without netem.
//
//   run     makes the namespaces and the link, prints one line of JSON when usable, removes them at SIGTERM or SIGINT
//   ctl     sends one command to the control socket of a running one
//   check   says whether this host can run it
//
// Exit status: 0, 1 the host or the running emulator refused, 2 wrong usage or value. See docs/wan-emulator.md.
#include <arpa/inet.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "perf/wan/control.h"
#include "perf/wan/emulator.h"
#include "perf/wan/link.h"
#include "perf/wan/netns.h"

namespace vmferry::wan {
namespace {

constexpr int kExitRefused = 1;
constexpr int kExitUsage = 2;

// Above what the machine does otherwise, below the kernel's own threads: the wire does not wait for its users.
constexpr int kRealtimePriority = 10;

constexpr const char* kLockFolder = "/run/vmferry-wan";

struct RunOptions {
  std::string name;
  std::string rate;
  std::string rtt;
  std::string jitter = "0";
  std::string loss = "0";
  std::string queue = "100ms";
  std::string reorder = "off";
  std::string offload = "on";
  std::string realtime = "on";
  std::string address_a = "10.77.0.1";
  std::string address_b = "10.77.0.2";
  std::string control;
  std::vector<std::string> sysctls;
  uint64_t seed = 1;
  bool die_with_parent = false;
};

int report(const Error& error, int status) {
  fmt::print(stderr, "vmferry-wan: {}\n", error.text);
  return status;
}

Result<std::string> unix_path(std::string_view uri) {
  constexpr std::string_view kScheme = "unix:";
  if (!uri.starts_with(kScheme) || uri.size() == kScheme.size()) {
    return fail(ErrorKind::InvalidArgument, "--control '{}' is not unix:PATH", uri);
  }
  return std::string(uri.substr(kScheme.size()));
}

Status check_name(std::string_view name) {
  constexpr std::string_view kAlphanumeric = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
  const bool valid = !name.empty() && name.size() <= 64 && kAlphanumeric.find(name[0]) != std::string_view::npos &&
                     name.find_first_not_of(std::string(kAlphanumeric) + "._-") == std::string_view::npos;
  if (valid) return {};
  return fail(ErrorKind::InvalidArgument, "--name '{}' is not [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}", name);
}

Status check_addresses(const RunOptions& options) {
  in_addr a{};
  in_addr b{};
  if (inet_pton(AF_INET, options.address_a.c_str(), &a) != 1 ||
      inet_pton(AF_INET, options.address_b.c_str(), &b) != 1 || a.s_addr == b.s_addr) {
    return fail(ErrorKind::InvalidArgument, "addresses '{}' and '{}' are not two different IPv4 addresses",
                options.address_a, options.address_b);
  }
  return {};
}

Result<std::pair<std::string, std::string>> parse_sysctl(const std::string& text) {
  const size_t equals = text.find('=');
  const std::string name = text.substr(0, equals);
  // Only what belongs to a network namespace; anything else would change the host.
  const bool valid = equals != std::string::npos && name.starts_with("net.") && name.find("..") == std::string::npos &&
                     name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_.") == std::string::npos;
  if (!valid) return fail(ErrorKind::InvalidArgument, "--sysctl '{}' is not net.NAME=VALUE", text);
  return std::pair(name, text.substr(equals + 1));
}

Result<Profile> profile_of(const RunOptions& options) {
  Profile profile;
  const std::pair<std::string_view, const std::string&> properties[] = {
      {"rate", options.rate}, {"rtt", options.rtt},     {"jitter", options.jitter},
      {"loss", options.loss}, {"queue", options.queue}, {"reorder", options.reorder},
  };
  for (const auto& [name, value] : properties) {
    if (const Status set = set_property(profile, name, value); !set) {
      return fail(ErrorKind::InvalidArgument, "--{}: {}", name, set.error().text);
    }
  }
  if (const Status checked = profile.check(); !checked) return tl::unexpected(checked.error());
  return profile;
}

// One emulator per name. The lock dies with the process, so what a killed one left is recognised as stale.
class NameLock {
 public:
  static Result<NameLock> acquire(const std::string& name) {
    if (mkdir(kLockFolder, 0700) != 0 && errno != EEXIST) {
      return fail(ErrorKind::Io, "mkdir '{}': {}", kLockFolder, errno_text(errno));
    }
    const std::string path = fmt::format("{}/{}.lock", kLockFolder, name);
    for (;;) {
      Fd file(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
      if (file.get() < 0) return fail(ErrorKind::Io, "open '{}': {}", path, errno_text(errno));
      if (flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
        return fail(ErrorKind::Exists, "another vmferry-wan named '{}' is running", name);
      }
      // The one before may have removed the file between our open() and flock(): then this lock protects nothing.
      struct stat opened {};
      struct stat named {};
      if (fstat(file.get(), &opened) == 0 && stat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino) {
        return NameLock(path, std::move(file));
      }
    }
  }
  NameLock(NameLock&& other) noexcept : path_(std::exchange(other.path_, {})), file_(std::move(other.file_)) {}
  NameLock& operator=(NameLock&&) = delete;
  ~NameLock() {
    if (!path_.empty()) unlink(path_.c_str());
  }

 private:
  NameLock(std::string path, Fd file) : path_(std::move(path)), file_(std::move(file)) {}
  std::string path_;
  Fd file_;
};

bool go_realtime() {
  prctl(PR_SET_TIMERSLACK, 1UL);
  const sched_param parameters{.sched_priority = kRealtimePriority};
  // Reset on fork: the `ip` processes of the clean-up are not part of the wire.
  return sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &parameters) == 0;
}

int run(const RunOptions& options) {
  const Result<Profile> profile = profile_of(options);
  if (!profile) return report(profile.error(), kExitUsage);
  for (const Status& checked : {check_name(options.name), check_addresses(options)}) {
    if (!checked) return report(checked.error(), kExitUsage);
  }
  std::vector<std::pair<std::string, std::string>> sysctls;
  for (const std::string& text : options.sysctls) {
    const auto sysctl = parse_sysctl(text);
    if (!sysctl) return report(sysctl.error(), kExitUsage);
    sysctls.push_back(*sysctl);
  }
  std::string control_path;
  if (!options.control.empty()) {
    const Result<std::string> path = unix_path(options.control);
    if (!path) return report(path.error(), kExitUsage);
    control_path = *path;
  }

  if (const Status host = check_host(); !host) return report(host.error(), kExitRefused);
  // Blocked from here on, so that a signal at any point still removes the namespaces.
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&stop_signals, signal);
  sigprocmask(SIG_BLOCK, &stop_signals, nullptr);
  const Fd signals(signalfd(-1, &stop_signals, SFD_NONBLOCK | SFD_CLOEXEC));
  const pid_t parent = getppid();
  if (options.die_with_parent) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) return kExitRefused;
  }

  const Result<NameLock> lock = NameLock::acquire(options.name);
  if (!lock) return report(lock.error(), kExitRefused);
  const bool offload = options.offload == "on";
  const Result<End> a = End::create({.netns = options.name + "-a",
                                     .address = options.address_a,
                                     .peer_address = options.address_b,
                                     .offload = offload,
                                     .sysctls = sysctls});
  if (!a) return report(a.error(), kExitRefused);
  const Result<End> b = End::create({.netns = options.name + "-b",
                                     .address = options.address_b,
                                     .peer_address = options.address_a,
                                     .offload = offload,
                                     .sysctls = sysctls});
  if (!b) return report(b.error(), kExitRefused);
  std::optional<ControlServer> control;
  if (!control_path.empty()) {
    Result<ControlServer> server = ControlServer::listen(control_path);
    if (!server) return report(server.error(), kExitRefused);
    control.emplace(std::move(*server));
  }
  const bool realtime = options.realtime == "on" && go_realtime();
  if (options.realtime == "on" && !realtime) {
    fmt::print(stderr, "vmferry-wan: no real-time priority ({}): packets may be late on a busy machine\n",
               errno_text(errno));
  }

  Emulator emulator(*a, *b, *profile, options.seed, signals.get());
  const nlohmann::ordered_json ready{
      {"ready", true},
      {"ns_a", options.name + "-a"},
      {"ns_b", options.name + "-b"},
      {"addr_a", options.address_a},
      {"addr_b", options.address_b},
      {"device", kDeviceName},
      {"offload", offload},
      {"realtime", realtime},
  };
  fmt::print("{}\n", ready.dump());
  std::fflush(stdout);
  if (const Status ended = emulator.run(control ? &*control : nullptr); !ended)
    return report(ended.error(), kExitRefused);
  return 0;
}

int ctl(const std::string& control, const std::vector<std::string>& words) {
  const Result<std::string> path = unix_path(control);
  if (!path) return report(path.error(), kExitUsage);
  const Result<std::string> answer = call_control(*path, fmt::format("{}", fmt::join(words, " ")));
  if (!answer) return report(answer.error(), kExitRefused);
  fmt::print("{}\n", *answer);
  const auto parsed = nlohmann::json::parse(*answer, nullptr, false);
  return parsed.is_object() && !parsed.contains("error") ? 0 : kExitRefused;
}

int check() {
  const Status host = check_host();
  if (!host) return report(host.error(), kExitRefused);
  fmt::print("{{\"ok\":true}}\n");
  return 0;
}

}  // namespace
}  // namespace vmferry::wan

int main(int argc, char** argv) {
  using vmferry::wan::kExitUsage;
  CLI::App app{"Two network namespaces joined by an emulated long-distance link"};
  app.require_subcommand(1);

  vmferry::wan::RunOptions options;
  CLI::App* const run = app.add_subcommand("run", "make the namespaces and the link until SIGTERM or SIGINT");
  run->add_option("--name", options.name, "namespaces are NAME-a and NAME-b")->required();
  run->add_option("--rate", options.rate, "of each direction, IP bytes counted: 20Mbit, 1Gbit")->required();
  run->add_option("--rtt", options.rtt, "round trip on an idle link: 40ms")->required();
  run->add_option("--jitter", options.jitter, "largest deviation of the one-way delay")->capture_default_str();
  run->add_option("--loss", options.loss, "share of packets lost on the way, each direction: 0.5%")
      ->capture_default_str();
  run->add_option("--queue", options.queue, "room before the wire, drop tail: 100ms, 256KiB")->capture_default_str();
  run->add_option("--reorder", options.reorder, "let jitter reorder packets: on, off")->capture_default_str();
  run->add_option("--seed", options.seed, "of loss and jitter")->capture_default_str();
  run->add_option("--address-a", options.address_a, "IPv4 address in NAME-a")->capture_default_str();
  run->add_option("--address-b", options.address_b, "IPv4 address in NAME-b")->capture_default_str();
  run->add_option("--control", options.control, "control socket, unix:PATH");
  run->add_option("--sysctl", options.sysctls, "net.NAME=VALUE to set in both namespaces; repeatable");
  run->add_option("--offload", options.offload, "take TCP super-packets from the kernel: on, off")
      ->capture_default_str()
      ->check(CLI::IsMember({"on", "off"}));
  run->add_option("--realtime", options.realtime, "real-time priority: on, off")
      ->capture_default_str()
      ->check(CLI::IsMember({"on", "off"}));
  run->add_flag("--die-with-parent", options.die_with_parent, "end when the process that started it ends");

  std::string control;
  std::vector<std::string> words;
  CLI::App* const ctl = app.add_subcommand("ctl", "send a command: cut TIME, counters, set NAME=VALUE..., reset");
  ctl->add_option("--control", control, "control socket, unix:PATH")->required();
  ctl->add_option("command", words, "command and its arguments")->required();

  app.add_subcommand("check", "say whether this host can run it");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  if (run->parsed()) return vmferry::wan::run(options);
  if (ctl->parsed()) return vmferry::wan::ctl(control, words);
  return vmferry::wan::check();
}
