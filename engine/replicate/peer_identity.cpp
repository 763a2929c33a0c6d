// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/peer_identity.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "engine/runtime/unique_fd.h"

namespace vmferry {

namespace {

Result<TlsIdentity> read_identity(const UniqueFd& fd, const std::string& path) {
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return fail(ErrorKind::Io, "identity key '{}': {}", path, errno_text(errno));
  if (!S_ISREG(info.st_mode) || (info.st_mode & 077) != 0) {
    return fail(ErrorKind::Denied, "identity key '{}' must be a file that only its owner may read: chmod 600", path);
  }
  std::string pem(16384, '\0');
  size_t size = 0;
  while (size < pem.size()) {
    const ssize_t count = read(fd.get(), pem.data() + size, pem.size() - size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail(ErrorKind::Io, "identity key '{}': {}", path, errno_text(errno));
    if (count == 0) break;
    size += static_cast<size_t>(count);
  }
  pem.resize(size);
  auto identity = TlsIdentity::from_pem(pem);
  if (!identity) return fail_with(identity.error(), fmt::format("file '{}'", path));
  return identity;
}

Status write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = write(fd, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail(ErrorKind::Io, "{}", errno_text(errno));
    text.remove_prefix(static_cast<size_t>(count));
  }
  return {};
}

// Written beside and renamed: a crash leaves either no key or a whole one.
Status store_identity(const TlsIdentity& identity, const std::string& path) {
  const std::string temporary = path + ".new";
  unlink(temporary.c_str());
  const UniqueFd fd(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return fail(ErrorKind::Io, "create '{}': {}", temporary, errno_text(errno));
  if (auto written = write_all(fd.get(), identity.to_pem()); !written) return fail_with(written.error(), temporary);
  if (fsync(fd.get()) != 0 || rename(temporary.c_str(), path.c_str()) != 0) {
    return fail(ErrorKind::Io, "store '{}': {}", path, errno_text(errno));
  }
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const UniqueFd folder_fd(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder_fd.valid() || fsync(folder_fd.get()) != 0) {
    return fail(ErrorKind::Io, "sync '{}': {}", folder, errno_text(errno));
  }
  return {};
}

}  // namespace

Result<TlsIdentity> load_or_create_identity(const std::string& path) {
  const UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (fd.valid()) return read_identity(fd, path);
  if (errno != ENOENT) return fail(ErrorKind::Io, "identity key '{}': {}", path, errno_text(errno));
  auto identity = TlsIdentity::generate();
  if (!identity) return identity;
  if (auto stored = store_identity(*identity, path); !stored) return tl::unexpected(stored.error());
  return identity;
}

Id128 node_id_of(const KeyHash& key_hash) {
  Id128 id;
  std::copy_n(key_hash.begin(), id.bytes.size(), id.bytes.begin());
  return id;
}

}  // namespace vmferry
