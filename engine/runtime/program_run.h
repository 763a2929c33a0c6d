// SPDX-License-Identifier: Apache-2.0
//
// One program, run once, with a limit for its time and its output. No shell, no inherited descriptor or variable.
//
// Flow: Hooks. The program is started by a worker (an exec may wait for a slow file system), watched through a pidfd
// and a pipe in the reactor, and reaped. It leads a process group of its own: at the time limit, and when this object
// goes, the whole group is killed. Needs Linux 5.3. Threads: the reactor's.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/base/result.h"
#include "engine/runtime/reactor.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

struct ProgramOptions {
  std::vector<std::string> arguments;      // [0] is the path of the program
  std::vector<std::string> environment{};  // NAME=VALUE; nothing else is there
  Nanoseconds time_limit = 30 * kSecond;
  size_t output_max =
      16384;  // bytes of standard output and error together that are handed on; more is read and dropped
};

class ProgramRun {
 public:
  // One line (or 500 bytes of one) of what it wrote; unchecked bytes.
  using Output = std::function<void(std::string_view line)>;
  // In success it ended with status 0. An error: not started, another status, a signal, or over its time.
  using Done = std::function<void(Status)>;

  ProgramRun(Reactor& reactor, ProgramOptions options, Output output, Done done);
  ~ProgramRun();  // may be inside `done`
  ProgramRun(const ProgramRun&) = delete;
  ProgramRun& operator=(const ProgramRun&) = delete;

 private:
  struct Start;
  void started(const std::shared_ptr<Start>& start);
  void read_output();
  void take(std::string_view bytes);
  void ended();
  void close();

  Reactor& reactor_;
  const ProgramOptions options_;
  const Output output_;
  const Done done_;
  int pid_ = -1;  // until it is reaped
  UniqueFd pidfd_;
  UniqueFd pipe_;
  WatchId pid_watch_ = 0;
  WatchId pipe_watch_ = 0;
  Timer limit_;
  bool over_time_ = false;
  size_t output_left_;
  bool cut_ = false;
  std::string line_;
  Alive alive_;
};

}  // namespace vmferry
