// SPDX-License-Identifier: Apache-2.0
#include "blockdev/file_store.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "blockdev/file_store_op.h"
#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

std::string_view op_name(BlockOp op) {
  switch (op) {
    case BlockOp::Read:
      return "read";
    case BlockOp::Write:
      return "write";
    case BlockOp::WriteZeroes:
      return "write-zeroes";
    case BlockOp::Flush:
      return "flush";
  }
  return "?";
}

Result<std::vector<Extent>> scan_extents(int fd, ByteRange range, size_t extents_max) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return fail(ErrorKind::Io, "fstat: {}", errno_text(errno));
  // Past the end of a file that shrank SEEK_DATA sees a hole, that is zeroes that the guest never wrote.
  if (S_ISREG(info.st_mode) && static_cast<uint64_t>(info.st_size) < range.end())
    return fail(ErrorKind::Io, "the file shrank to {} bytes", info.st_size);
  std::vector<Extent> extents;
  uint64_t position = range.offset;
  while (position < range.end() && extents.size() < extents_max) {
    const off_t data = ::lseek(fd, static_cast<off_t>(position), SEEK_DATA);
    if (data < 0 && errno != ENXIO) {
      extents.push_back({.range = {position, range.end() - position}});  // a file system that cannot tell
      break;
    }
    const uint64_t data_start = data < 0 ? range.end() : std::min(static_cast<uint64_t>(data), range.end());
    if (data_start > position) {
      extents.push_back({.range = {position, data_start - position}, .hole = true, .zero = true});
      position = data_start;
      continue;
    }
    const off_t hole = ::lseek(fd, static_cast<off_t>(position), SEEK_HOLE);
    const uint64_t end = hole <= data ? range.end() : std::min(static_cast<uint64_t>(hole), range.end());
    extents.push_back({.range = {position, end - position}});
    position = end;
  }
  return extents;
}

}  // namespace

Result<CacheMode> parse_cache(std::string_view text) {
  if (text == "writeback") return CacheMode::Writeback;
  if (text == "none") return CacheMode::None;
  return fail(ErrorKind::InvalidArgument, "cache '{}' is neither writeback nor none", text);
}

FileStore::FileStore(Reactor& reactor, std::string path) : reactor_(reactor), path_(std::move(path)) {}

FileStore::~FileStore() {
  VF_ASSERT(in_flight_ == 0 && queries_ == 0);
}

void FileStore::submit(BlockRequest& request) noexcept {
  ++in_flight_;
  take_op().start(request);
}

FileStore::Op& FileStore::take_op() {
  if (free_ops_.empty()) {
    ops_.push_back(std::make_unique<Op>(*this));
    free_ops_.reserve(ops_.capacity());
    return *ops_.back();
  }
  Op& op = *free_ops_.back();
  free_ops_.pop_back();
  return op;
}

void FileStore::give_back(Op& op) {
  --in_flight_;
  free_ops_.push_back(&op);
  look_idle();
}

void FileStore::when_idle(std::function<void()> done) {
  idle_waiters_.push_back(std::move(done));
  look_idle();
}

void FileStore::look_idle() {
  if (in_flight_ != 0 || queries_ != 0 || idle_waiters_.empty() || idle_posted_) return;
  idle_posted_ = true;
  // The request that ended may have been one step of several: whoever got its result has submitted the next by then.
  reactor_.post([this] {
    idle_posted_ = false;
    if (in_flight_ != 0 || queries_ != 0) return;
    for (const auto& waiter : std::exchange(idle_waiters_, {})) waiter();
  });
}

bool FileStore::lock_range(Op& op) {
  const auto conflicts = [&](const Op* other) { return other->locked_range().overlaps(op.locked_range()); };
  if (std::any_of(locked_.begin(), locked_.end(), conflicts) ||
      std::any_of(lock_waiting_.begin(), lock_waiting_.end(), conflicts)) {
    lock_waiting_.push_back(&op);
    return false;
  }
  locked_.push_back(&op);
  return true;
}

void FileStore::unlock_range(Op& op) {
  std::erase(locked_, &op);
  if (lock_waiting_.empty()) return;
  // In order of arrival; one that still has to wait holds back later ones that overlap it.
  std::deque<Op*> waiting;
  waiting.swap(lock_waiting_);
  std::vector<Op*> granted;
  for (Op* candidate : waiting)
    if (lock_range(*candidate)) granted.push_back(candidate);
  for (Op* next : granted) next->lock_granted();
}

bool FileStore::take_bounce(Op& op) {
  if (free_bounces_.empty()) {
    if (bounces_.size() == kBounceCountMax) {
      bounce_waiting_.push_back(&op);
      return false;
    }
    bounces_.push_back(std::make_unique<Bounce>());
    free_bounces_.push_back(bounces_.back().get());
  }
  op.bounce = free_bounces_.back();
  free_bounces_.pop_back();
  return true;
}

void FileStore::give_back_bounce(Op& op) {
  Bounce* bounce = std::exchange(op.bounce, nullptr);
  if (bounce_waiting_.empty()) return free_bounces_.push_back(bounce);
  Op* next = bounce_waiting_.front();
  bounce_waiting_.pop_front();
  next->bounce = bounce;
  next->bounce_granted();
}

// A write behind the end of a file that shrank would make it grow again, with zeroes in between that nobody wrote:
// mutations look at the size, once in a round of the loop: what comes in one batch would race with a truncation anyway.
bool FileStore::within_file(const ByteRange& range, bool check_now) {
  if (check_now && !is_device_ && size_seen_in_ != reactor_.round_number()) {
    size_seen_in_ = reactor_.round_number();
    struct stat info {};
    if (::fstat(fd_.get(), &info) == 0 && static_cast<uint64_t>(info.st_size) < size_)
      note_shrunk(static_cast<uint64_t>(info.st_size));
  }
  return range.end() <= shrunk_to_;
}

void FileStore::note_shrunk(uint64_t size_seen) {
  shrunk_to_ = std::min(shrunk_to_, size_seen);
  if (const auto suppressed = shrunk_log_.allow(reactor_.now()))
    log::error("store={} size_bytes={} found_bytes={} error=\"the file is shorter than when it was opened\"", path_,
               size_, size_seen);
}

void FileStore::note_error(const BlockRequest& request, Errno error) {
  if (const auto suppressed = error_log_.allow(reactor_.now()))
    log::error("store={} op={} offset={} bytes={} error=\"{}\" suppressed={}", path_, op_name(request.op),
               request.range.offset, request.range.length, errno_text(error), *suppressed);
}

void FileStore::query_extents(ByteRange range, size_t extents_max, ExtentsDone done) {
  VF_ASSERT(extents_max > 0 && !range.empty() && fits_in(range.offset, range.length, size_));
  ++queries_;
  auto answer = std::make_shared<Result<std::vector<Extent>>>();
  const auto seek = [fd = fd_.get(), device = is_device_, range, extents_max, answer] {
    *answer = device ? std::vector<Extent>{{.range = range}} : scan_extents(fd, range, extents_max);
  };
  reactor_.offload(seek, [this, answer, done = std::move(done)] {
    --queries_;
    done(std::move(*answer));
    look_idle();
  });
}

void FileStore::resize(uint64_t size, std::function<void(Status)> done) {
  ++queries_;
  const auto grow = [fd = fd_.get(), device = is_device_, from = size_, size, path = path_]() -> Status {
    if (size < from) return fail(ErrorKind::InvalidArgument, "'{}' only grows: {} is below {} bytes", path, size, from);
    if (device) {
      uint64_t actual = 0;
      if (::ioctl(fd, BLKGETSIZE64, &actual) != 0 || actual < size)
        return fail(ErrorKind::InvalidArgument, "block device '{}' has {} bytes, fewer than {}", path, actual, size);
      return {};
    }
    struct stat info {};
    if (::fstat(fd, &info) != 0) return fail(ErrorKind::Io, "'{}': {}", path, errno_text(errno));
    if (static_cast<uint64_t>(info.st_size) < from) return fail(ErrorKind::Io, "'{}' shrank; open it again", path);
    if (static_cast<uint64_t>(info.st_size) < size && ::ftruncate(fd, static_cast<off_t>(size)) != 0)
      return fail(ErrorKind::Io, "grow '{}' to {} bytes: {}", path, size, errno_text(errno));
    if (::fsync(fd) != 0) return fail(ErrorKind::Io, "grow '{}': {}", path, errno_text(errno));
    return {};
  };
  auto answer = std::make_shared<Status>();
  reactor_.offload([grow, answer] { *answer = grow(); },
                   [this, size, answer, done = std::move(done)] {
                     --queries_;
                     if (*answer) size_ = std::max(size_, size);
                     done(std::move(*answer));
                     look_idle();
                   });
}

Result<StoreIdentity> FileStore::identity() const {
  struct stat info {};
  if (::fstat(fd_.get(), &info) != 0) return fail(ErrorKind::Io, "'{}': {}", path_, errno_text(errno));
  return StoreIdentity{.device = is_device_ ? info.st_rdev : info.st_dev,
                       .inode = is_device_ ? 0 : info.st_ino,
                       .size = is_device_ ? size_ : static_cast<uint64_t>(info.st_size),
                       .modified_ns = info.st_mtim.tv_sec * kSecond + info.st_mtim.tv_nsec};
}

}  // namespace vmferry
