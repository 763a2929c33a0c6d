// SPDX-License-Identifier: Apache-2.0
#include "kmod-shim/device_use.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "engine/base/text.h"

namespace vmferry {

namespace {

namespace fs = std::filesystem;

// udev opens a device for a moment whenever something about it changes.
constexpr int kLooks = 5;
constexpr timespec kLookPause{.tv_sec = 0, .tv_nsec = 200'000'000};

// A disk or a partition of it.
struct Part {
  std::string name;    // "nbd0p1"
  std::string number;  // "43:1", as in mountinfo
};

std::string line_of(const fs::path& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// Entries come and go while they are listed; what is gone is left out. Ends when `visit` returns true.
template <typename Visit>
void for_each_entry(const fs::path& folder, Visit visit) {
  std::error_code error;
  for (fs::directory_iterator at(folder, error); !error && at != fs::directory_iterator(); at.increment(error)) {
    if (visit(at->path())) return;
  }
}

std::vector<Part> parts_of(const std::string& disk) {
  const fs::path folder = "/sys/block/" + disk;
  std::vector<Part> parts{{disk, line_of(folder / "dev")}};
  for_each_entry(folder, [&](const fs::path& entry) {
    const std::string name = entry.filename();
    if (name.starts_with(disk)) parts.push_back({name, line_of(entry / "dev")});
    return false;
  });
  return parts;
}

// "/dev/nbd0 is part of /dev/dm-3"; "" when nothing is stacked on it.
std::string holder_of(const std::string& disk, const std::vector<Part>& parts) {
  std::string found;
  for (const Part& part : parts) {
    const fs::path folder = fs::path("/sys/block") / disk / (part.name == disk ? "" : part.name) / "holders";
    for_each_entry(folder, [&](const fs::path& entry) {
      found = fmt::format("/dev/{} is part of /dev/{}", part.name, printable(entry.filename().string()));
      return true;
    });
  }
  return found;
}

// Mounts of other namespaces are not seen here, but keep the exclusive open from succeeding all the same.
std::string mount_of(const std::vector<Part>& parts) {
  std::ifstream in("/proc/self/mountinfo");
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string id;
    std::string parent;
    std::string number;
    std::string root;
    std::string place;
    words >> id >> parent >> number >> root >> place;
    for (const Part& part : parts) {
      if (part.number == number) return fmt::format("/dev/{} is mounted at {}", part.name, printable(place));
    }
  }
  return {};
}

bool is_one_of(const std::vector<Part>& parts, dev_t device) {
  const std::string number = fmt::format("{}:{}", major(device), minor(device));
  return std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part.number == number; });
}

std::string opener_of(const std::vector<Part>& parts) {
  std::string found;
  for_each_entry("/proc", [&](const fs::path& process) {
    const std::string pid = process.filename();
    if (pid.find_first_not_of("0123456789") != std::string::npos || pid == std::to_string(::getpid())) return false;
    for_each_entry(process / "fd", [&](const fs::path& descriptor) {
      // Only what looks like a device: stat() of anything else may wait for a network.
      std::error_code gone;
      const fs::path target = fs::read_symlink(descriptor, gone);
      struct stat info {};
      if (gone || !target.native().starts_with("/dev/") || ::stat(descriptor.c_str(), &info) != 0) return false;
      if (!S_ISBLK(info.st_mode) || !is_one_of(parts, info.st_rdev)) return false;
      found = fmt::format("process {} ({}) has {} open", pid, printable(line_of(process / "comm")),
                          printable(target.native()));
      return true;
    });
    return !found.empty();
  });
  return found;
}

Result<UniqueFd> claim(const std::string& device) {
  const std::string disk = fs::path(device).filename();
  const std::vector<Part> parts = parts_of(disk);
  if (std::string holder = holder_of(disk, parts); !holder.empty()) return fail(ErrorKind::Busy, "{}", holder);
  UniqueFd fd(::open(device.c_str(), O_RDWR | O_EXCL | O_CLOEXEC));
  if (!fd.valid() && errno == EBUSY) {
    const std::string mount = mount_of(parts);
    return fail(ErrorKind::Busy, "{}",
                mount.empty() ? fmt::format("{} is mounted, swap or claimed by another program", device) : mount);
  }
  if (!fd.valid()) return fail(ErrorKind::Io, "cannot open {}: {}", device, errno_text(errno));
  if (std::string opener = opener_of(parts); !opener.empty()) return fail(ErrorKind::Busy, "{}", opener);
  if (::fsync(fd.get()) != 0) {
    return fail(ErrorKind::Io, "what programs wrote to {} does not reach the volume: {}", device, errno_text(errno));
  }
  return fd;
}

}  // namespace

Result<UniqueFd> claim_unused_device(const std::string& device) {
  for (int look = 1;; ++look) {
    auto claimed = claim(device);
    if (claimed || claimed.error().kind != ErrorKind::Busy || look == kLooks) return claimed;
    ::nanosleep(&kLookPause, nullptr);
  }
}

}  // namespace vmferry
