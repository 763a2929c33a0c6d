// SPDX-License-Identifier: Apache-2.0
//
// Whether a program that the daemon runs can have been written by root and the daemon's user only.
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>

#include "engine/control/config.h"

namespace vmferry {

namespace {

Status check_owner(const std::string& path, const struct stat& info) {
  if (info.st_uid != 0 && info.st_uid != ::geteuid()) {
    return fail(ErrorKind::Denied, "'{}' belongs to user {}: it has to be of root or of this daemon's user", path,
                info.st_uid);
  }
  // Names in a sticky folder are changed by their owners only.
  const bool sticky = S_ISDIR(info.st_mode) && (info.st_mode & S_ISVTX) != 0;
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0 && !sticky) {
    return fail(ErrorKind::Denied, "'{}' may be written by others (mode {:o}): chmod go-w {}", path,
                info.st_mode & 07777U, path);
  }
  return {};
}

// Who may write a folder above may put another file there.
Status check_folders(const std::filesystem::path& file) {
  for (auto folder = file.parent_path(); !folder.empty(); folder = folder.parent_path()) {
    struct stat info {};
    if (::stat(folder.c_str(), &info) != 0)
      return fail(ErrorKind::NotFound, "folder '{}': {}", folder.string(), errno_text(errno));
    if (const Status safe = check_owner(folder.string(), info); !safe) return safe;
    if (folder == folder.parent_path()) break;
  }
  return {};
}

}  // namespace

Status check_hook(const std::string& path) {
  if (path.empty()) return {};
  std::error_code error;
  const auto target = std::filesystem::canonical(path, error);
  if (error) return fail(ErrorKind::NotFound, "'{}': {}", path, error.message());
  struct stat info {};
  if (::stat(target.c_str(), &info) != 0) return fail(ErrorKind::NotFound, "'{}': {}", path, errno_text(errno));
  if (!S_ISREG(info.st_mode)) return fail(ErrorKind::InvalidArgument, "'{}' is no file", path);
  if (const Status safe = check_owner(target.string(), info); !safe) return safe;
  if (const Status safe = check_folders(target); !safe) return safe;
  if (const Status safe = check_folders(path); !safe) return safe;  // of the link that was given
  if (::access(path.c_str(), X_OK) != 0) return fail(ErrorKind::Denied, "'{}' cannot be run: chmod +x {}", path, path);
  return {};
}

}  // namespace vmferry
