// SPDX-License-Identifier: Apache-2.0
//
// Real QEMU processes for tests: no operating system inside, which migrates all the same.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "engine/base/assert.h"

namespace vmferry {

struct QemuBinary {
  std::string name;
  std::string path;
};

// Debian's own QEMU, and the newer one that tests/guest/fetch-qemu unpacks into the build folder when it is there.
inline std::vector<QemuBinary> qemu_binaries() {
  std::vector<QemuBinary> found = {{"qemu7", "/usr/bin/qemu-system-x86_64"}};
  const auto build = std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path();
  const auto newer = build / "qemu10/bin/qemu-system-x86_64";
  if (std::filesystem::exists(newer)) found.push_back({"qemu10", newer.string()});
  return found;
}

class QemuProcess {
 public:
  QemuProcess(const std::string& program, const std::string& folder, const std::string& name,
              std::vector<std::string> extra) {
    socket_ = folder + "/" + name + ".qmp";
    std::vector<std::string> words = {
        program,        "-nodefaults", "-display", "none", "-machine",
        "pc,accel=tcg", "-monitor",    "none",     "-qmp", "unix:" + socket_ + ",server=on,wait=off"};
    words.insert(words.end(), extra.begin(), extra.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    VF_ASSERT(posix_spawn(&pid_, program.c_str(), nullptr, nullptr, arguments.data(), environ) == 0);
    for (int i = 0; i < 2000 && !listening(); ++i) usleep(10'000);
  }
  ~QemuProcess() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  const std::string& socket() const { return socket_; }
  pid_t pid() const { return pid_; }

 private:
  // The path appears with bind(), before listen(); a connection tried between the two is refused. Connecting to find
  // out would use up the monitor's one client, so the kernel's table is asked: proc(5), flag __SO_ACCEPTCON.
  bool listening() const {
    std::ifstream table("/proc/net/unix");
    for (std::string line; std::getline(table, line);) {
      if (line.ends_with(" " + socket_) && line.find(" 00010000 ") != std::string::npos) return true;
    }
    return false;
  }

  std::string socket_;
  pid_t pid_ = -1;
};

}  // namespace vmferry
