// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/program_run.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "engine/base/text.h"

namespace vmferry {

namespace {

constexpr size_t kLineMax = 500;
// Read in one go, so that a program that writes without end takes no round of the loop for itself.
constexpr int kReadsMax = 16;

// The names of posix_spawn's tables, freed with the scope.
struct SpawnTables {
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
  SpawnTables() {
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attributes);
  }
  ~SpawnTables() {
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attributes);
  }
  SpawnTables(const SpawnTables&) = delete;
  SpawnTables& operator=(const SpawnTables&) = delete;
};

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (std::string& text : texts) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

// The child starts as a program of an idle system would: no blocked or ignored signal, nothing open but 0, 1 and 2.
Result<int> spawn(ProgramOptions options, int output) {
  SpawnTables tables;
  sigset_t none;
  sigset_t all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&tables.attributes, &none);
  posix_spawnattr_setsigdefault(&tables.attributes, &all);
  posix_spawnattr_setpgroup(&tables.attributes, 0);
  posix_spawnattr_setflags(&tables.attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  posix_spawn_file_actions_addopen(&tables.files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&tables.files, output, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&tables.files, output, STDERR_FILENO);
  posix_spawn_file_actions_addclosefrom_np(&tables.files, STDERR_FILENO + 1);
  posix_spawn_file_actions_addchdir_np(&tables.files, "/");
  const std::vector<char*> arguments = pointers(options.arguments);
  const std::vector<char*> environment = pointers(options.environment);
  pid_t pid = -1;
  const int error =
      posix_spawn(&pid, arguments[0], &tables.files, &tables.attributes, arguments.data(), environment.data());
  if (error != 0) return fail(ErrorKind::Unavailable, "start '{}': {}", options.arguments[0], errno_text(error));
  return pid;
}

// SIGKILL has been sent or it has ended: this waits for the kernel only.
int reap(int pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

void kill_group(int pid) {
  ::kill(-pid, SIGKILL);
  ::kill(pid, SIGKILL);
}

}  // namespace

// What the worker does, and what it leaves for the reactor. Its last owner ends a program that nobody waits for.
struct ProgramRun::Start {
  ProgramOptions options;
  UniqueFd output;
  Result<int> pid = -1;

  ~Start() {
    if (!pid || *pid < 0) return;
    kill_group(*pid);
    reap(*pid);
  }
};

ProgramRun::ProgramRun(Reactor& reactor, ProgramOptions options, Output output, Done done)
    : reactor_(reactor),
      options_(std::move(options)),
      output_(std::move(output)),
      done_(std::move(done)),
      limit_(reactor),
      output_left_(options_.output_max) {
  auto start = std::make_shared<Start>();
  start->options = options_;
  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) {
    start->pid = fail(ErrorKind::Unavailable, "start '{}': {}", options_.arguments[0], errno_text(errno));
    reactor_.post([this, alive = alive_.token(), start] {
      if (alive()) started(start);
    });
    return;
  }
  pipe_.reset(ends[0]);
  start->output.reset(ends[1]);
  // A program expects to wait when nobody reads.
  ::fcntl(ends[1], F_SETFL, ::fcntl(ends[1], F_GETFL) & ~O_NONBLOCK);
  reactor_.offload(
      [start] {
        start->pid = spawn(start->options, start->output.get());
        start->output.reset();
      },
      [this, alive = alive_.token(), start] {
        if (alive()) started(start);
      });
}

ProgramRun::~ProgramRun() {
  close();
  if (pid_ < 0) return;
  kill_group(pid_);
  reap(pid_);
}

void ProgramRun::close() {
  limit_.cancel();
  reactor_.unwatch(std::exchange(pid_watch_, 0));
  reactor_.unwatch(std::exchange(pipe_watch_, 0));
}

void ProgramRun::started(const std::shared_ptr<Start>& start) {
  if (!start->pid) return done_(tl::unexpected(start->pid.error()));
  pid_ = std::exchange(*start->pid, -1);
  pidfd_.reset(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
  if (!pidfd_.valid()) {
    const Errno error = errno;
    kill_group(pid_);
    reap(std::exchange(pid_, -1));
    return done_(fail(ErrorKind::Unavailable, "watch '{}': {}", options_.arguments[0], errno_text(error)));
  }
  pid_watch_ = reactor_.watch(pidfd_.get(), EPOLLIN, [this](uint32_t) { ended(); });
  pipe_watch_ = reactor_.watch(pipe_.get(), EPOLLIN, [this](uint32_t) { read_output(); });
  limit_.start(options_.time_limit, [this] {
    over_time_ = true;
    kill_group(pid_);
  });
}

void ProgramRun::read_output() {
  char buffer[4096];
  for (int i = 0; i < kReadsMax; ++i) {
    const ssize_t bytes = ::read(pipe_.get(), buffer, sizeof(buffer));
    if (bytes > 0) {
      take({buffer, static_cast<size_t>(bytes)});
      continue;
    }
    if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) return;
    return reactor_.unwatch(std::exchange(pipe_watch_, 0));  // closed by all
  }
}

void ProgramRun::take(std::string_view bytes) {
  const bool cut = bytes.size() > output_left_ && !std::exchange(cut_, true);
  bytes = bytes.substr(0, output_left_);
  output_left_ -= bytes.size();
  for (const char c : bytes) {
    if (c != '\n') line_.push_back(c);
    if ((c == '\n' && !line_.empty()) || line_.size() >= kLineMax) output_(std::exchange(line_, {}));
  }
  if (!cut) return;
  if (!line_.empty()) output_(std::exchange(line_, {}));
  output_("(what it wrote from here on is left out)");
}

// What it started in the background may still have the pipe: that is not waited for.
void ProgramRun::ended() {
  const Alive::Token alive = alive_.token();
  if (pipe_watch_ != 0) read_output();
  if (!alive()) return;
  if (!line_.empty()) output_(std::exchange(line_, {}));
  close();
  pipe_.reset();
  const int status = reap(std::exchange(pid_, -1));
  const std::string& program = options_.arguments[0];
  if (over_time_)
    return done_(fail(ErrorKind::Timeout, "'{}' was killed: it had not ended after {}", program,
                      format_duration(options_.time_limit)));
  if (WIFSIGNALED(status))
    return done_(fail(ErrorKind::Unavailable, "'{}' was ended by signal {}", program, WTERMSIG(status)));
  if (WEXITSTATUS(status) != 0)
    return done_(fail(ErrorKind::Unavailable, "'{}' ended with status {}", program, WEXITSTATUS(status)));
  done_({});
}

}  // namespace vmferry
