// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/workload/log_channel.h"

#include <dirent.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <fstream>

namespace vmferry::guest {

std::optional<std::string> find_port(const std::string& name) {
  static constexpr int kTries = 500;
  const std::string folder = "/sys/class/virtio-ports";
  for (int i = 0; i < kTries; ++i) {
    if (DIR* ports = ::opendir(folder.c_str()); ports != nullptr) {
      std::optional<std::string> found;
      while (const dirent* entry = ::readdir(ports)) {
        const std::string port = static_cast<const char*>(entry->d_name);
        std::string content;
        std::ifstream file(folder + "/" + port + "/name");
        if (std::getline(file, content) && content == name) found = "/dev/" + port;
      }
      ::closedir(ports);
      if (found && ::access(found->c_str(), R_OK | W_OK) == 0) return found;
    }
    ::usleep(10'000);
  }
  return std::nullopt;
}

void LogChannel::line(const char* format, ...) const {
  std::array<char, 512> text{};
  va_list arguments;
  va_start(arguments, format);
  const int written = std::vsnprintf(text.data(), text.size() - 1, format, arguments);
  va_end(arguments);
  if (written < 0) return;
  std::size_t size = std::min(static_cast<std::size_t>(written), text.size() - 2);
  text[size++] = '\n';
  const char* data = text.data();
  while (size > 0) {
    const ssize_t done = ::write(fd_, data, size);
    if (done < 0 && errno != EINTR) return;
    if (done > 0) {
      data += done;
      size -= static_cast<std::size_t>(done);
    }
  }
}

}  // namespace vmferry::guest
