// SPDX-License-Identifier: Apache-2.0
#include "blockdev/file_store_op.h"

#include <fcntl.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr uint64_t kZeroesSize = 256_KiB;
// The partial last block is written through the page cache, in a piece of the cache that also holds whole blocks before
// it. Nothing there may be on its way past the cache meanwhile: the kernel would write back their old bytes, or notice
// and fail the next fdatasync.
constexpr uint64_t kFolioSizeMax = 2_MiB;

// Source of written zeroes; never written to.
uint8_t* zeroes() {
  alignas(kBounceAlign) static uint8_t bytes[kZeroesSize];
  return bytes;
}

bool is_unsupported(int64_t result) {
  return result == -EOPNOTSUPP || result == -ENOSYS;
}

}  // namespace

void FileStore::Op::start(BlockRequest& request) {
  request_ = &request;
  step_ = Step::Start;
  done_ = 0;
  locked_ = {};
  if (request.op == BlockOp::Flush) {
    if (store_.flush_error_ != 0) return finish_later(store_.flush_error_);
    return submit(Step::Sync, IoKind::DataSync, {}, nullptr, false);
  }
  VF_ASSERT(request.range.length > 0 && fits_in(request.range.offset, request.range.length, store_.size_));
  if (!store_.within_file(request.range, is_mutating(request.op))) return finish_later(EIO);
  if (is_read()) return next();
  if (store_.read_only_) return finish_later(EPERM);
  if (!store_.direct_) return next();
  uint64_t start = round_down(request.range.offset, store_.align_);
  const uint64_t whole_blocks_end = round_down(store_.size_, store_.align_);
  if (request.range.end() > whole_blocks_end) start = round_down(std::min(start, whole_blocks_end), kFolioSizeMax);
  locked_ = {start, round_up(request.range.end(), store_.align_) - start};
  if (store_.lock_range(*this)) next();
}

void FileStore::Op::lock_granted() {
  next();
}

void FileStore::Op::next() {
  if (request_->op == BlockOp::WriteZeroes) return next_zeroes();
  transfer(left());
}

int FileStore::Op::allocate_mode() const {
  if (request_->may_unmap && store_.can_punch_) return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  // On a block device ZERO_RANGE may write the zeroes itself, which is not what fast_only asks for.
  if (store_.can_zero_range_ && !(store_.is_device_ && request_->fast_only))
    return FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
  return 0;
}

void FileStore::Op::next_zeroes() {
  const uint64_t align = store_.zero_align_;
  const bool aligned = position() % align == 0;
  const uint64_t allocatable = aligned ? round_down(left(), align) : 0;
  const int mode = allocate_mode();
  if (request_->fast_only && (mode == 0 || allocatable != left())) {
    VF_ASSERT(done_ == 0);  // the content is unchanged
    return finish_later(ENOTSUP);
  }
  if (mode != 0 && allocatable > 0) {
    io_.flags = mode;
    piece_ = allocatable;
    return submit(Step::Allocate, IoKind::Allocate, {position(), allocatable}, nullptr, false);
  }
  uint64_t length = std::min(left(), kZeroesSize);
  if (mode != 0 && !aligned) length = std::min(length, round_up(position(), align) - position());
  transfer(length);
}

// The next `length` bytes of the request, or fewer.
void FileStore::Op::transfer(uint64_t length) {
  uint8_t* data = request_->op == BlockOp::WriteZeroes ? zeroes() : request_->data + done_;
  const IoKind kind = is_read() ? IoKind::Read : IoKind::Write;
  piece_ = length;
  if (!store_.direct_) return submit(Step::Transfer, kind, {position(), length}, data, false);

  const uint64_t whole_blocks_end = round_down(store_.size_, store_.align_);
  if (position() >= whole_blocks_end) return submit(Step::Transfer, kind, {position(), length}, data, true);
  piece_ = length = std::min(length, whole_blocks_end - position());
  const bool aligned = position() % store_.align_ == 0 && length % store_.align_ == 0 &&
                       reinterpret_cast<uintptr_t>(data) % store_.memory_align_ == 0;
  if (aligned) return submit(Step::Transfer, kind, {position(), length}, data, false);
  if (store_.take_bounce(*this)) start_window();
}

void FileStore::Op::bounce_granted() {
  start_window();
}

void FileStore::Op::start_window() {
  window_.offset = round_down(position(), store_.align_);
  window_.length = std::min(round_up(position() + piece_, store_.align_) - window_.offset, kBounceSize);
  piece_ = std::min(piece_, window_.end() - position());
  if (is_read()) return submit(Step::ReadWindow, IoKind::Read, window_, bounce->bytes, false);
  const ByteRange head{window_.offset, store_.align_};
  if (position() > window_.offset || (piece_ < store_.align_ && window_.length == store_.align_))
    return submit(Step::ReadHead, IoKind::Read, head, bounce->bytes, false);
  merge_and_write();
}

// The head block is in the buffer if it needed to be; reads the tail block if that needs to be.
void FileStore::Op::merge_and_write() {
  const bool tail_partial = position() + piece_ < window_.end();
  const bool tail_read = step_ == Step::ReadTail || (step_ == Step::ReadHead && window_.length == store_.align_);
  if (tail_partial && !tail_read) {
    const ByteRange tail{window_.end() - store_.align_, store_.align_};
    return submit(Step::ReadTail, IoKind::Read, tail, bounce->bytes + (tail.offset - window_.offset), false);
  }
  uint8_t* target = bounce->bytes + (position() - window_.offset);
  if (request_->op == BlockOp::WriteZeroes) {
    std::memset(target, 0, piece_);
  } else {
    std::memcpy(target, request_->data + done_, piece_);
  }
  submit(Step::WriteWindow, IoKind::Write, window_, bounce->bytes, false);
}

void FileStore::Op::submit(Step step, IoKind kind, ByteRange range, uint8_t* data, bool buffered) {
  step_ = step;
  if (kind != IoKind::Allocate) io_.flags = kind == IoKind::Write && request_->fua ? RWF_DSYNC : 0;
  io_.kind = kind;
  io_.fd = buffered ? store_.buffered_.get() : store_.fd_.get();
  io_.direct = store_.direct_ && !buffered;
  io_.offset = range.offset;
  io_.length = range.length;
  io_.data = data;
  io_.completion = this;
  store_.backend_->submit(io_);
}

// A synced write through the page cache waits for all of the file and is told of any write that the kernel lost, once:
// the flush that follows would not be. What can also be an error of this write alone, and is when the guest repeats
// it, does not count.
bool FileStore::Op::tells_of_lost_writes(Errno error) const {
  if (store_.direct_ || io_.kind != IoKind::Write || (io_.flags & RWF_DSYNC) == 0) return false;
  return error != ENOSPC && error != EDQUOT && error != EFBIG && error != EINVAL && error != EFAULT && error != ENOMEM;
}

void FileStore::Op::io_done(IoRequest&, int64_t result) noexcept {
  if (step_ == Step::Allocate) return allocated(result);
  if (result < 0) {
    const auto error = static_cast<Errno>(-result);
    if (step_ == Step::Sync || tells_of_lost_writes(error)) store_.flush_error_ = error;
    return finish(error);
  }
  const auto bytes = static_cast<uint64_t>(result);
  switch (step_) {
    case Step::Transfer:
      if (bytes == 0) return is_read() ? shrunk() : finish(EIO);
      return advance(std::min(bytes, piece_));
    case Step::ReadWindow:
      return window_read(bytes);
    case Step::ReadHead:
    case Step::ReadTail:
      if (bytes < store_.align_) return shrunk();
      return merge_and_write();
    case Step::WriteWindow:
      return window_written(bytes);
    case Step::Sync:
      return finish(0);
    case Step::Start:
    case Step::Allocate:
      break;
  }
  VF_ASSERT(false);
}

void FileStore::Op::window_read(uint64_t bytes) {
  const uint64_t skipped = position() - window_.offset;
  if (bytes <= skipped) return shrunk();
  const uint64_t usable = std::min(bytes - skipped, piece_);
  std::memcpy(request_->data + done_, bounce->bytes + skipped, usable);
  store_.give_back_bounce(*this);
  advance(usable);
}

void FileStore::Op::window_written(uint64_t bytes) {
  const uint64_t skipped = position() - window_.offset;
  if (bytes <= skipped) return finish(EIO);
  const uint64_t written = std::min(bytes - skipped, piece_);
  store_.give_back_bounce(*this);
  advance(written);
}

void FileStore::Op::allocated(int64_t result) {
  if (result == 0) return advance(piece_);
  if (!is_unsupported(result)) return finish(static_cast<Errno>(-result));
  // Known only now: remember, and try the next best way.
  if ((io_.flags & FALLOC_FL_PUNCH_HOLE) != 0) {
    store_.can_punch_ = false;
  } else {
    store_.can_zero_range_ = false;
  }
  next_zeroes();
}

void FileStore::Op::advance(uint64_t bytes) {
  done_ += bytes;
  if (left() > 0) return next();
  after_last();
}

void FileStore::Op::after_last() {
  // Writes were durable by RWF_DSYNC; fallocate has no such flag.
  if (request_->op == BlockOp::WriteZeroes && request_->fua) {
    if (store_.flush_error_ != 0) return finish(store_.flush_error_);
    return submit(Step::Sync, IoKind::DataSync, {}, nullptr, false);
  }
  finish(0);
}

void FileStore::Op::shrunk() {
  store_.note_shrunk(position());
  finish(EIO);
}

void FileStore::Op::finish_later(Errno error) {
  store_.reactor_.post([this, error] { finish(error); });
}

void FileStore::Op::finish(Errno error) {
  BlockRequest& request = *request_;
  if (bounce != nullptr) store_.give_back_bounce(*this);
  if (!locked_.empty()) store_.unlock_range(*this);
  if (error != 0 && error != ENOTSUP && error != EPERM) store_.note_error(request, error);
  store_.give_back(*this);
  request.completion->block_done(request, error);  // may destroy the store: nothing after this
}

}  // namespace vmferry
