// SPDX-License-Identifier: Apache-2.0
//
// Opening a FileStore: creation, exclusive ownership, and what this file and file system can do.
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "blockdev/file_store_op.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

// One byte far behind any data, so that tools which lock single bytes of an image (QEMU: 100..., 200...) do not meet
// it, while two daemons do.
constexpr off_t kLockOffset = 0x564d'4652'0000;
constexpr Nanoseconds kLockPoll = 5 * kMillisecond;

bool device_can_zero(dev_t device) {
  for (const char* folder : {"queue", "../queue"}) {  // a partition's queue is its disk's
    std::ifstream file(
        fmt::format("/sys/dev/block/{}:{}/{}/write_zeroes_max_bytes", major(device), minor(device), folder));
    uint64_t bytes = 0;
    if (file >> bytes) return bytes > 0;
  }
  return false;
}

}  // namespace

// Where the file is: at any path, or in a folder that it cannot leave.
class FileStore::Place {
 public:
  Place(const Folder* folder, const std::string& path) : folder_(folder), path_(path) {}

  std::string text() const { return folder_ != nullptr ? folder_->path_of(path_) : path_; }
  UniqueFd open(int flags, mode_t mode = 0) const {
    return folder_ != nullptr ? folder_->open_file(path_, flags, mode) : UniqueFd(::open(path_.c_str(), flags, mode));
  }
  UniqueFd open_parent(int flags, mode_t mode = 0) const {
    if (folder_ != nullptr) return folder_->open_file(".", flags, mode);
    const std::string parent = std::filesystem::path(path_).parent_path().string();
    return UniqueFd(::open(parent.empty() ? "." : parent.c_str(), flags, mode));
  }
  bool look(struct stat& info) const {  // errno is set when it cannot
    if (folder_ == nullptr) return ::stat(path_.c_str(), &info) == 0;
    const UniqueFd fd = open(O_PATH | O_CLOEXEC);
    return fd.valid() && ::fstat(fd.get(), &info) == 0;
  }
  std::string why_not(Errno error) const {  // for messages
    if (folder_ != nullptr && error == ELOOP)
      return "there is a symbolic link in its place, which is not followed; remove it";
    if (folder_ != nullptr && error == EXDEV) return "it leads out of its folder";
    return errno_text(error);
  }
  void remove() const {
    if (folder_ == nullptr) {
      ::unlink(path_.c_str());
    } else if (const Status removed = folder_->remove(path_); !removed) {
      log::warn("{}", removed.error().text);
    }
  }

 private:
  const Folder* const folder_;
  const std::string& path_;
};

Result<std::unique_ptr<FileStore>> FileStore::open(Reactor& reactor, const std::string& path,
                                                   const FileStoreOptions& options) {
  auto backend = make_io_backend(reactor, options.aio);
  if (!backend) return fail_with(backend.error(), fmt::format("open '{}'", path));
  return open(reactor, path, options, std::move(*backend));
}

Result<std::unique_ptr<FileStore>> FileStore::open(Reactor& reactor, const std::string& path,
                                                   const FileStoreOptions& options,
                                                   std::unique_ptr<IoBackend> backend) {
  const Place place(options.folder, path);
  std::unique_ptr<FileStore> store(new FileStore(reactor, place.text()));
  store->backend_ = std::move(backend);
  if (Status status = store->open_file(place, options); !status) {
    if (store->created_) place.remove();  // empty, and nobody asked for half a volume
    return tl::unexpected(status.error());
  }
  log::info("store={} size_bytes={} aio={} cache={} block_bytes={} punch={} zero_range={}", store->path_, store->size_,
            store->aio_name(), options.cache == CacheMode::None ? "none" : "writeback", store->align_,
            store->can_punch_, store->can_zero_range_);
  return store;
}

Status FileStore::open_file(const Place& place, const FileStoreOptions& options) {
  struct stat info {};
  read_only_ = options.read_only;
  direct_ = options.cache == CacheMode::None;
  if (!place.look(info)) {
    const Errno error = errno;
    if (error != ENOENT || !options.create_size || options.must_exist || read_only_)
      return fail(error == ENOENT ? ErrorKind::NotFound : ErrorKind::Denied, "open '{}': {}", path_,
                  place.why_not(error));
    if (Status status = create_file(place, *options.create_size); !status) return status;
    if (!place.look(info)) return fail(ErrorKind::Io, "'{}': {}", path_, errno_text(errno));
  }
  if (!S_ISREG(info.st_mode) && !S_ISBLK(info.st_mode))
    return fail(ErrorKind::InvalidArgument, "'{}' is neither a regular file nor a block device", path_);
  is_device_ = S_ISBLK(info.st_mode);

  // O_EXCL on a block device: not while it is mounted or part of another device.
  const int flags = O_CLOEXEC | (read_only_ ? O_RDONLY : O_RDWR) | (is_device_ && !read_only_ ? O_EXCL : 0);
  fd_ = place.open(flags | (direct_ ? O_DIRECT : 0));
  if (!fd_.valid()) {
    if (errno == EINVAL && direct_)
      return fail(ErrorKind::InvalidArgument, "'{}': its file system has no O_DIRECT; use cache=writeback", path_);
    if (errno == EBUSY) return fail(ErrorKind::Busy, "'{}' is in use: mounted, or part of another device", path_);
    return fail(ErrorKind::Denied, "open '{}': {}", path_, place.why_not(errno));
  }
  if (Status status = lock_file(options.lock_wait); !status) return status;
  if (is_device_) {
    if (::ioctl(fd_.get(), BLKGETSIZE64, &size_) != 0)
      return fail(ErrorKind::Io, "size of '{}': {}", path_, errno_text(errno));
  } else {
    if (::fstat(fd_.get(), &info) != 0) return fail(ErrorKind::Io, "'{}': {}", path_, errno_text(errno));
    size_ = static_cast<uint64_t>(info.st_size);
  }
  if (options.create_size && !created_ && *options.create_size != size_)
    return fail(ErrorKind::Mismatch, "'{}' has {} bytes, not the {} asked for", path_, size_, *options.create_size);
  if (size_ == 0) return fail(ErrorKind::InvalidArgument, "'{}' is empty: give its size", path_);
  if (direct_) {
    buffered_.reset(::open(fmt::format("/proc/self/fd/{}", fd_.get()).c_str(), flags & ~O_EXCL));
    if (!buffered_.valid()) return fail(ErrorKind::Denied, "open '{}' again: {}", path_, errno_text(errno));
  }
  if (Status status = find_alignment(); !status) return status;
  find_zeroing(place, read_only_);
  limits_.block_size_min = align_;
  limits_.can_punch = can_punch_;
  limits_.can_fast_zero = can_punch_ || (can_zero_range_ && !is_device_);
  return {};
}

Status FileStore::create_file(const Place& place, uint64_t size) {
  const UniqueFd fd = place.open(O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (!fd.valid()) return fail(ErrorKind::Denied, "create '{}': {}", path_, errno_text(errno));
  // The name must be durable too: a clean record of a volume whose file is gone after a crash helps nobody.
  const UniqueFd folder_fd = place.open_parent(O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0 || ::fsync(fd.get()) != 0 || !folder_fd.valid() ||
      ::fsync(folder_fd.get()) != 0) {
    const Errno error = errno;
    place.remove();
    return fail(ErrorKind::Io, "create '{}' of {} bytes: {}", path_, size, errno_text(error));
  }
  created_ = true;
  return {};
}

// Open-file-description locks: unlike POSIX locks they also hold between two opens of one process, and closing some
// other descriptor of the file does not drop them.
Status FileStore::lock_file(Nanoseconds wait) {
  struct flock lock {};
  lock.l_type = static_cast<short>(read_only_ ? F_RDLCK : F_WRLCK);
  lock.l_whence = SEEK_SET;
  lock.l_start = kLockOffset;
  lock.l_len = 1;
  int locked = ::fcntl(fd_.get(), F_OFD_SETLK, &lock);
  for (Nanoseconds waited = 0; locked != 0 && (errno == EAGAIN || errno == EACCES) && waited < wait;
       waited += kLockPoll) {
    std::this_thread::sleep_for(std::chrono::nanoseconds(kLockPoll));
    locked = ::fcntl(fd_.get(), F_OFD_SETLK, &lock);
  }
  if (locked == 0) return {};
  if (errno == EAGAIN || errno == EACCES)
    return fail(ErrorKind::Busy, "'{}' is already served by a vmferryd (this one or another)", path_);
  return fail(ErrorKind::Io, "lock '{}': {}", path_, errno_text(errno));
}

Status FileStore::find_alignment() {
  int sector = 512;
  if (is_device_) ::ioctl(fd_.get(), BLKSSZGET, &sector);
  if (is_device_) zero_align_ = static_cast<uint32_t>(sector);
  if (!direct_) return {};
  struct statx info {};
  if (::statx(fd_.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0) {
    if (info.stx_dio_offset_align == 0)
      return fail(ErrorKind::InvalidArgument, "'{}' takes no O_DIRECT; use cache=writeback", path_);
    align_ = info.stx_dio_offset_align;
    memory_align_ = info.stx_dio_mem_align;
  } else if (is_device_) {
    align_ = memory_align_ = static_cast<uint32_t>(sector);
  } else {
    // Linux before 6.1: the smallest size that a read accepts.
    const auto probe = std::make_unique<Bounce>();
    for (align_ = 512; align_ <= kBounceAlign; align_ *= 2)
      if (::pread(fd_.get(), probe->bytes, align_, 0) >= 0) break;
    memory_align_ = align_;
  }
  if (align_ > kBounceAlign || memory_align_ > kBounceAlign)
    return fail(ErrorKind::InvalidArgument, "'{}' wants O_DIRECT aligned to {} bytes, more than the {} supported",
                path_, std::max(align_, memory_align_), kBounceAlign);
  return {};
}

void FileStore::find_zeroing(const Place& place, bool read_only) {
  if (read_only) return;
  if (is_device_) {
    struct stat info {};
    can_punch_ = ::fstat(fd_.get(), &info) == 0 && device_can_zero(info.st_rdev);
    can_zero_range_ = true;
    return;
  }
  // Tried on a nameless file beside it: on the file itself even a call without effect would change its modification
  // stamp, and with it the proof that nobody wrote since the clean stop. Without a verdict the first use decides.
  const UniqueFd probe = place.open_parent(O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  const auto works = [&](int mode) {
    return !probe.valid() || ::fallocate(probe.get(), mode | FALLOC_FL_KEEP_SIZE, 0, 4096) == 0 ||
           (errno != EOPNOTSUPP && errno != ENOSYS);
  };
  can_zero_range_ = works(FALLOC_FL_ZERO_RANGE);
  can_punch_ = works(FALLOC_FL_PUNCH_HOLE);
}

}  // namespace vmferry
