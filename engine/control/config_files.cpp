// SPDX-License-Identifier: Apache-2.0
//
// What the configuration names on disk, as far as it can be seen without changing anything: --check-config.
//
// Flow: tools/vmferryd after load_config(). Source of truth is what the daemon does with each of them: FileStore opens
// images, Listener binds sockets, Daemon makes the state folder; a check here names what would fail there. What a check
// finds may have changed by the time of the start.
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <map>

#include "engine/control/config.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

namespace {

constexpr uint64_t kSectorSize = 512;

bool may(const std::string& path, int access) {
  return ::faccessat(AT_FDCWD, path.c_str(), access, AT_EACCESS) == 0;
}

std::string folder_of(const std::string& path) {
  return std::filesystem::path(path).parent_path().string();
}

// Why a file or socket cannot be made in `folder`; "" when it can.
std::string obstacle_in(const std::string& folder) {
  struct stat info {};
  if (::stat(folder.c_str(), &info) != 0) {
    return errno == ENOENT ? fmt::format("the folder '{}' does not exist; make it first", folder)
                           : fmt::format("folder '{}': {}", folder, errno_text(errno));
  }
  if (!S_ISDIR(info.st_mode)) return fmt::format("'{}' is not a folder", folder);
  if (!may(folder, W_OK | X_OK)) return fmt::format("folder '{}' is not writable: {}", folder, errno_text(errno));
  return {};
}

class FileCheck {
 public:
  FileCheck(const DaemonConfig& config, std::vector<ConfigProblem>& problems) : config_(config), problems_(problems) {}

  void run() {
    check_state_dir();
    check_socket(config_.control_path, "control", place_of(config_.places, {"control", "state-dir"}));
    if (const Status safe = check_hook(config_.on_running); !safe) {
      problem(place_of(config_.places, {"on-running"}), fmt::format("on-running: {}", safe.error().text));
    }
    for (const VolumeConfig& volume : config_.volumes) {
      if (volume.nbd && volume.nbd->is_unix) check_socket(volume.nbd->path, "nbd", place_of(volume.places, {"nbd"}));
      check_socket(volume.vhost_user_blk, "vhost-user-blk", place_of(volume.places, {"vhost-user-blk"}));
      // The folder of qmp= is its QEMU's, and may be made with it.
      if (!volume.path.empty()) check_image(volume);
    }
  }

 private:
  void problem(const std::string& where, std::string text) { problems_.push_back({where, std::move(text)}); }

  void check_state_dir() {
    if (config_.state_dir.empty()) return;
    const std::string where = place_of(config_.places, {"state-dir"});
    std::filesystem::path folder(config_.state_dir);
    struct stat info {};
    while (::stat(folder.c_str(), &info) != 0) {
      if (errno != ENOENT || folder == folder.parent_path()) {
        return problem(where, fmt::format("state-dir '{}': {}", folder.string(), errno_text(errno)));
      }
      folder = folder.has_filename() ? folder.parent_path() : folder.parent_path().parent_path();
    }
    if (const std::string obstacle = obstacle_in(folder.string()); !obstacle.empty()) {
      problem(where, fmt::format("state-dir '{}' cannot be {}: {}", config_.state_dir,
                                 folder == config_.state_dir ? "used" : "made", obstacle));
    }
  }

  void check_socket(const std::string& path, std::string_view key, const std::string& where) {
    if (path.empty()) return;
    const std::string folder = folder_of(path);
    const auto plain = [](const std::string& name) { return std::filesystem::path(name).lexically_normal(); };
    if (plain(folder) != plain(config_.state_dir)) {  // that one is made at the start
      if (const std::string obstacle = obstacle_in(folder); !obstacle.empty()) {
        return problem(where, fmt::format("{} '{}': {}", key, path, obstacle));
      }
    }
    struct stat info {};
    if (::lstat(path.c_str(), &info) == 0 && !S_ISSOCK(info.st_mode)) {
      problem(where, fmt::format("{} '{}': a file of that name exists, and it is no socket", key, path));
    }
  }

  void check_image(const VolumeConfig& volume) {
    const auto found = [&](std::string text) {
      problem(place_of(volume.places, {"path"}), fmt::format("volume '{}': {}", volume.name, text));
    };
    struct stat info {};
    if (::stat(volume.path.c_str(), &info) != 0) {
      if (errno != ENOENT) return found(fmt::format("'{}': {}", volume.path, errno_text(errno)));
      return check_missing(volume, found);
    }
    if (!S_ISREG(info.st_mode) && !S_ISBLK(info.st_mode)) {
      return found(fmt::format("'{}' is neither a regular file nor a block device", volume.path));
    }
    const bool device = S_ISBLK(info.st_mode);
    note_use(volume, device ? Key{true, info.st_rdev, 0, {}} : Key{false, info.st_dev, info.st_ino, {}});
    if (!may(volume.path, R_OK | W_OK)) {
      return found(fmt::format("'{}' cannot be read and written by this user: {}", volume.path, errno_text(errno)));
    }
    auto size = static_cast<uint64_t>(info.st_size);
    if (device) {
      const UniqueFd fd(::open(volume.path.c_str(), O_RDONLY | O_CLOEXEC));
      if (!fd.valid() || ::ioctl(fd.get(), BLKGETSIZE64, &size) != 0) {
        return found(fmt::format("size of '{}': {}", volume.path, errno_text(errno)));
      }
    }
    check_size(volume, size, found);
  }

  template <typename Found>
  void check_size(const VolumeConfig& volume, uint64_t size, const Found& found) {
    if (size == 0) return found(fmt::format("'{}' is empty: remove it and give size=, which makes it", volume.path));
    if (size % kSectorSize != 0) {
      return found(fmt::format("'{0}' has {1} bytes, no multiple of {2}: truncate -s %{2} makes it one", volume.path,
                               size, kSectorSize));
    }
    // size= is that of the first day: a volume that is known already may have grown since.
    if (!volume.size || size == *volume.size || (is_recorded(volume) && size > *volume.size)) return;
    problem(place_of(volume.places, {"size"}), fmt::format("volume '{}': size= is {} bytes, but '{}' has {}",
                                                           volume.name, *volume.size, volume.path, size));
  }

  template <typename Found>
  void check_missing(const VolumeConfig& volume, const Found& found) {
    struct stat info {};
    if (::lstat(volume.path.c_str(), &info) == 0) {
      return found(fmt::format("'{}' is a symbolic link to a file that does not exist", volume.path));
    }
    const std::string folder = folder_of(volume.path);
    if (is_recorded(volume)) {
      return found(fmt::format("its file '{}' is missing, and that of a known volume is never made anew: bring it back",
                               volume.path));
    }
    if (const std::string obstacle = obstacle_in(folder); !obstacle.empty()) {
      return found(fmt::format("'{}': {}", volume.path, obstacle));
    }
    if (!volume.size) return found(fmt::format("'{}' does not exist; size= would make it", volume.path));
    if (::stat(folder.c_str(), &info) != 0) return;
    note_use(volume, {false, info.st_dev, info.st_ino, std::filesystem::path(volume.path).filename().string()});
  }

  // Its metadata is made when it is recorded.
  bool is_recorded(const VolumeConfig& volume) const {
    return !config_.state_dir.empty() && may(config_.state_dir + "/volumes/" + volume.name + ".meta", F_OK);
  }

  // A file by its inode, a device by its number, and a file that is not there yet by its folder and name: whatever
  // links lead there.
  struct Key {
    bool device = false;
    dev_t number = 0;
    ino_t inode = 0;
    std::string name{};
    friend auto operator<=>(const Key&, const Key&) = default;
  };

  void note_use(const VolumeConfig& volume, const Key& key) {
    const auto [first, is_new] = used_.emplace(key, &volume);
    // Two equal paths are a problem of the configuration itself, which is reported with or without files.
    if (is_new || first->second->path == volume.path) return;
    problem(place_of(volume.places, {"path"}),
            fmt::format("volume '{}': '{}' is the same file as '{}' of volume '{}'", volume.name, volume.path,
                        first->second->path, first->second->name));
  }

  const DaemonConfig& config_;
  std::vector<ConfigProblem>& problems_;
  std::map<Key, const VolumeConfig*> used_;
};

}  // namespace

void check_files(const DaemonConfig& config, std::vector<ConfigProblem>& problems) {
  FileCheck(config, problems).run();
}

}  // namespace vmferry
