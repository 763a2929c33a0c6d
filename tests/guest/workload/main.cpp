// SPDX-License-Identifier: Apache-2.0
//
// The load of the test guest. Started by init (build-image) as process 1, or on a host with the options as arguments.
//
// One process per job, so that a disk that does not answer stops neither the memory load nor the heartbeat: a writer
// per disk, the memory load, the heartbeat (real-time priority) and this one, which obeys the host: each line on the
// log port is `verify` (all pages now), `stop` (writers and memory load end, with a last fsync) or `poweroff`.
// See workload/log_channel.h for what is reported, options.h for what can be set.

#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "tests/guest/record/record.h"
#include "tests/guest/workload/disk_writer.h"
#include "tests/guest/workload/log_channel.h"
#include "tests/guest/workload/memory_load.h"
#include "tests/guest/workload/options.h"
#include "tests/guest/workload/pacer.h"

namespace vmferry::guest {

namespace {

constexpr const char* kLogPort = "vf.log";
constexpr const char* kHeartbeatPort = "vf.heartbeat";

volatile std::sig_atomic_t g_stop = 0;
volatile std::sig_atomic_t g_verify = 0;

std::uint64_t g_warm_left = 0;  // nftw() has no argument for its callback

bool warm_one(const char* path) {
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const off_t end = ::lseek(fd, 0, SEEK_END);
  const std::uint64_t size = std::min(g_warm_left, end < 0 ? 0 : static_cast<std::uint64_t>(end));
  // Into the page cache only: copying to us as well would double the time of an emulated guest.
  if (size > 0 && ::readahead(fd, 0, static_cast<std::size_t>(size)) == 0) g_warm_left -= size;
  ::close(fd);
  return true;
}

int warm_entry(const char* path, const struct stat*, int type, FTW*) {
  if (type == FTW_F) warm_one(path);
  return g_warm_left == 0 ? 1 : 0;
}

// Reads files (or the disk itself) so that the page cache holds what the disk does, as in a guest that has worked.
void warm_page_cache(const Options& options, const std::string& root, const LogChannel& log) {
  if (options.warm_bytes == 0) return;
  g_warm_left = options.warm_bytes;
  if (options.mode == DiskMode::File) {
    ::nftw(root.c_str(), warm_entry, 16, FTW_PHYS);
  } else {
    warm_one(options.disks.front().c_str());
  }
  log.line("R warm %llu", static_cast<unsigned long long>(options.warm_bytes - g_warm_left));
}

int run_heartbeat(unsigned interval_ms, int fd) {
  const sched_param priority{.sched_priority = 50};
  ::sched_setscheduler(0, SCHED_FIFO, &priority);  // on a host without the right: an ordinary process does as well
  Pacer pacer(1000 / std::max(interval_ms, 1U), 1);
  std::uint32_t counter = 0;
  while (g_stop == 0) {
    std::array<char, 16> text{};
    const int size = std::snprintf(text.data(), text.size(), "%08x\n", counter++);
    // Not blocking: a heartbeat nobody reads is dropped. The host sees the gap, which is what it looks for.
    if (::write(fd, text.data(), static_cast<std::size_t>(size)) < 0 && errno != EAGAIN) return EXIT_FAILURE;
    pacer.wait();
  }
  return EXIT_SUCCESS;
}

pid_t start(const std::function<int()>& job) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    std::_Exit(job());
  }
  return pid;
}

int open_channel(const std::string& path, const char* port, int flags) {
  if (!path.empty()) return ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  const auto found = find_port(port);
  return found ? ::open(found->c_str(), O_RDWR | O_CLOEXEC | flags) : -1;
}

class Load {
 public:
  explicit Load(const Options& options, const LogChannel& log) : options_(options), log_(log) {}

  bool start_all();
  // Obeys the host until all jobs have ended. Returns the exit status.
  int run();

 private:
  bool mount_disks();
  void obey(const std::string& command);
  void reap();
  void signal_all(int signal) const {
    for (const pid_t pid : jobs_) ::kill(pid, signal);
  }

  const Options& options_;
  const LogChannel& log_;
  std::vector<std::string> paths_;
  std::vector<pid_t> jobs_;  // writers and memory load
  pid_t memory_ = -1;
  pid_t heartbeat_ = -1;
  bool failed_ = false;
  bool power_off_ = false;
};

bool Load::mount_disks() {
  for (std::size_t i = 0; i < options_.disks.size(); ++i) {
    const std::string root = "/mnt" + std::to_string(i);
    ::mkdir(root.c_str(), 0755);
    if (::mount(options_.disks[i].c_str(), root.c_str(), options_.mount_type.c_str(), MS_NOATIME, nullptr) != 0) {
      log_.line("E mount %s: %s", options_.disks[i].c_str(), std::strerror(errno));
      return false;
    }
    paths_.push_back(root + "/" + options_.file_name);
  }
  return true;
}

bool Load::start_all() {
  if (options_.mode == DiskMode::File) {
    if (!mount_disks()) return false;
    warm_page_cache(options_, "/mnt0", log_);
  } else if (options_.mode == DiskMode::Raw) {
    paths_ = options_.disks;
    warm_page_cache(options_, "", log_);
  }
  if (options_.heartbeat_ms != 0 && (options_.log_path.empty() || !options_.heartbeat_path.empty())) {
    const int fd = open_channel(options_.heartbeat_path, kHeartbeatPort, O_NONBLOCK);
    if (fd < 0) {
      log_.line("E no port %s: %s", kHeartbeatPort, std::strerror(errno));
      return false;
    }
    heartbeat_ = start([&] { return run_heartbeat(options_.heartbeat_ms, fd); });
  }
  for (unsigned i = 0; i < paths_.size(); ++i) {
    jobs_.push_back(start([&, i] { return run_disk_writer(options_, i, paths_[i], log_, g_stop); }));
  }
  if (options_.memory_bytes != 0) {
    memory_ = start([&] { return run_memory_load(options_, log_, g_stop, g_verify); });
    jobs_.push_back(memory_);
  }
  log_.line("R started");
  return true;
}

void Load::obey(const std::string& command) {
  if (command == "verify" && memory_ > 0) {
    ::kill(memory_, SIGUSR1);
  } else if (command == "stop") {
    signal_all(SIGTERM);
  } else if (command == "poweroff") {
    power_off_ = true;
    signal_all(SIGTERM);
  } else {
    log_.line("E unknown command '%s'", command.substr(0, 64).c_str());
  }
}

void Load::reap() {
  int status = 0;
  for (pid_t pid = 0; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;) {
    if (std::erase(jobs_, pid) == 0 && pid != heartbeat_) continue;
    if (pid == memory_) memory_ = -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != EXIT_SUCCESS) {
      failed_ = true;
      log_.line("E process %d of the load ended with status %d", static_cast<int>(pid), status);
    }
  }
}

int Load::run() {
  std::string input;
  bool told = false;
  const bool on_host = !options_.log_path.empty();
  for (;;) {
    reap();
    if (jobs_.empty() && !told) {
      log_.line("Q");
      told = true;
    }
    // The heartbeat goes on after the load has stopped, until the guest is switched off or killed.
    if (jobs_.empty() && (on_host || power_off_)) break;
    pollfd wait{.fd = on_host ? -1 : log_.fd(), .events = POLLIN, .revents = 0};
    if (::poll(&wait, 1, 100) <= 0 || (wait.revents & POLLIN) == 0) {
      if (wait.revents != 0) ::usleep(100'000);  // no reader on the host: the port reports a hang-up all the time
      continue;
    }
    std::array<char, 256> chunk{};
    const ssize_t size = ::read(log_.fd(), chunk.data(), chunk.size());
    if (size <= 0) continue;
    input.append(chunk.data(), static_cast<std::size_t>(size));
    for (std::size_t end = 0; (end = input.find('\n')) != std::string::npos; input.erase(0, end + 1)) {
      obey(input.substr(0, end));
    }
  }
  if (heartbeat_ > 0) ::kill(heartbeat_, SIGKILL);
  return failed_ ? EXIT_FAILURE : EXIT_SUCCESS;
}

std::vector<std::string> command_line(int argc, char** argv) {
  if (argc > 1) return {argv + 1, argv + argc};
  std::ifstream file("/proc/cmdline");
  return {std::istream_iterator<std::string>(file), {}};
}

int run(int argc, char** argv) {
  Options options;
  std::string error;
  const bool parsed = parse_options(command_line(argc, argv), options, error);
  const int fd = open_channel(options.log_path, kLogPort, 0);
  if (fd < 0 || !parsed) {
    std::fprintf(stderr, "guest-workload: %s\n", parsed ? "no log port" : error.c_str());
    if (fd < 0) return EXIT_FAILURE;
  }
  const LogChannel log(fd);
  if (!parsed) {
    log.line("E %s", error.c_str());
    return EXIT_FAILURE;
  }
  if (options.seed == 0) options.seed = splitmix64(now_ns());

  struct sigaction action {};
  action.sa_handler = [](int) { g_stop = 1; };
  ::sigaction(SIGTERM, &action, nullptr);
  action.sa_handler = [](int) { g_verify = 1; };
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGUSR1, &action, nullptr);

  Load load(options, log);
  const int status = load.start_all() ? load.run() : EXIT_FAILURE;
  ::close(fd);
  return status;
}

}  // namespace

}  // namespace vmferry::guest

int main(int argc, char** argv) {
  const int status = vmferry::guest::run(argc, argv);
  if (::getpid() != 1) return status;
  ::sync();
  ::reboot(RB_POWER_OFF);
  return status;
}
