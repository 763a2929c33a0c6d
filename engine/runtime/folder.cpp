// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/folder.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace vmferry {

namespace {

// linkat() and unlinkat() know no RESOLVE_BENEATH: their names are of this folder and of nothing below or above it.
bool is_plain(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string_view::npos;
}

}  // namespace

Result<Folder> Folder::open(const std::string& path) {
  Folder folder;
  folder.path_ = path;
  folder.fd_.reset(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder.fd_.valid()) return fail(ErrorKind::Io, "open folder '{}': {}", path, errno_text(errno));
  return folder;
}

UniqueFd Folder::open_file(const std::string& name, int flags, mode_t mode) const noexcept {
  struct open_how how {};
  how.flags = static_cast<unsigned>(flags | O_CLOEXEC);
  how.mode = (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE
                 ? mode
                 : 0;  // the kernel refuses a mode that is not used
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
  return UniqueFd(static_cast<int>(::syscall(SYS_openat2, fd_.get(), name.c_str(), &how, sizeof(how))));
}

bool Folder::holds(const std::string& name) const noexcept {
  return open_file(name, O_PATH | O_NOFOLLOW).valid();
}

Status Folder::link(const std::string& from, const std::string& to) const {
  if (!is_plain(from) || !is_plain(to)) {
    return fail(ErrorKind::InvalidArgument, "'{}' or '{}' is no name in folder '{}'", from, to, path_);
  }
  if (::linkat(fd_.get(), from.c_str(), fd_.get(), to.c_str(), 0) == 0) return {};
  return fail(ErrorKind::Io, "'{}' as a second name of '{}': {}", path_of(to), path_of(from), errno_text(errno));
}

Status Folder::remove(const std::string& name) const {
  if (!is_plain(name)) return fail(ErrorKind::InvalidArgument, "'{}' is no name in folder '{}'", name, path_);
  if (::unlinkat(fd_.get(), name.c_str(), 0) == 0 || errno == ENOENT) return {};
  return fail(ErrorKind::Io, "remove '{}': {}", path_of(name), errno_text(errno));
}

Status Folder::sync() const {
  if (::fsync(fd_.get()) == 0) return {};
  return fail(ErrorKind::Io, "sync folder '{}': {}", path_, errno_text(errno));
}

std::string Folder::path_of(std::string_view name) const {
  return path_ + "/" + std::string(name);
}

}  // namespace vmferry
