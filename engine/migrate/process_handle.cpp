// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/process_handle.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <sstream>

namespace vmferry {

namespace {

struct StatLine {
  char state = 0;
  uint64_t start_time = 0;
};

// proc(5): the second field is the program's name in parentheses and may hold anything, even parentheses.
Result<StatLine> read_stat(int64_t pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  if (!file) return fail(ErrorKind::NotFound, "no process {}", pid);
  std::stringstream text;
  text << file.rdbuf();
  const std::string line = text.str();
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return fail(ErrorKind::NotFound, "no process {}", pid);
  std::istringstream fields(line.substr(name_end + 1));
  StatLine stat;
  fields >> stat.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  fields >> stat.start_time;
  if (!fields) return fail(ErrorKind::NotFound, "no process {}", pid);
  return stat;
}

std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  file >> id;
  return id;
}

}  // namespace

Result<ProcessIdentity> identify_process(int64_t pid) {
  const auto stat = read_stat(pid);
  if (!stat) return tl::unexpected(stat.error());
  return ProcessIdentity{.pid = pid, .start_time = stat->start_time, .boot_id = boot_id()};
}

ProcessFate process_fate(const ProcessIdentity& identity) {
  if (identity.is_none()) return ProcessFate::Unknown;
  const std::string boot = boot_id();
  if (boot.empty() || identity.boot_id.empty()) return ProcessFate::Unknown;
  if (boot != identity.boot_id) return ProcessFate::Dead;
  const auto stat = read_stat(identity.pid);
  if (!stat) {
    // A process that /proc hides (hidepid) is no dead one: kill(2) says which.
    if (::kill(static_cast<pid_t>(identity.pid), 0) != 0 && errno == ESRCH) return ProcessFate::Dead;
    return ProcessFate::Unknown;
  }
  if (stat->start_time != identity.start_time) return ProcessFate::Dead;
  return stat->state == 'Z' || stat->state == 'X' ? ProcessFate::Dead : ProcessFate::Alive;
}

std::optional<bool> command_line_has(int64_t pid, std::string_view word) {
  constexpr size_t kSizeMax = 1U << 20;
  std::ifstream file(fmt::format("/proc/{}/cmdline", pid), std::ios::binary);
  std::string text(kSizeMax, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.empty()) return std::nullopt;
  return text.find(word) != std::string::npos;
}

Result<std::unique_ptr<ProcessHandle>> ProcessHandle::open(Reactor& reactor, int64_t pid, std::function<void()> dead) {
  if (pid <= 0) return fail(ErrorKind::NotFound, "the process behind the socket is not visible here");
  UniqueFd fd(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0)));
  if (!fd.valid()) return fail(ErrorKind::NotFound, "pidfd_open {}: {}", pid, errno_text(errno));
  // After the pidfd: if the number was reused before, both name the same (wrong) process, never two different ones.
  auto identity = identify_process(pid);
  if (!identity) return tl::unexpected(identity.error());
  return std::unique_ptr<ProcessHandle>(
      new ProcessHandle(reactor, std::move(fd), std::move(*identity), std::move(dead)));
}

ProcessHandle::ProcessHandle(Reactor& reactor, UniqueFd fd, ProcessIdentity identity, std::function<void()> dead)
    : reactor_(reactor), fd_(std::move(fd)), identity_(std::move(identity)), dead_(std::move(dead)) {
  watch_ = reactor_.watch(fd_.get(), EPOLLIN, [this](uint32_t) {
    reactor_.unwatch(watch_);
    watch_ = 0;
    dead_seen_ = true;
    const auto callback = std::exchange(dead_, nullptr);
    callback();  // may destroy this object
  });
}

ProcessHandle::~ProcessHandle() {
  reactor_.unwatch(watch_);
}

Status ProcessHandle::kill() {
  if (syscall(SYS_pidfd_send_signal, fd_.get(), SIGKILL, nullptr, 0) == 0 || errno == ESRCH) return {};
  return fail(ErrorKind::Denied, "kill process {}: {}", identity_.pid, errno_text(errno));
}

}  // namespace vmferry
