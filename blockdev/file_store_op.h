// SPDX-License-Identifier: Apache-2.0
//
// One request of a FileStore on its way: which transfers, in which order (private to file_store*.cpp).
//
// An aligned request is one transfer. An unaligned one goes window by window through a bounce buffer; WriteZeroes goes
// by fallocate where possible, else by writing zeroes. Short transfers continue where they ended.
#pragma once

#include "blockdev/file_store.h"

namespace vmferry {

inline constexpr uint64_t kBounceSize = 512_KiB;
inline constexpr size_t kBounceCountMax = 16;
inline constexpr uint64_t kBounceAlign = 4096;

struct FileStore::Bounce {
  alignas(kBounceAlign) uint8_t bytes[kBounceSize];
};

class FileStore::Op final : public IoCompletion {
 public:
  explicit Op(FileStore& store) : store_(store) {}
  void start(BlockRequest& request);
  void lock_granted();
  void bounce_granted();
  void io_done(IoRequest& io, int64_t result) noexcept override;

  ByteRange locked_range() const { return locked_; }
  Bounce* bounce = nullptr;

 private:
  enum class Step : uint8_t { Start, Transfer, ReadWindow, ReadHead, ReadTail, WriteWindow, Allocate, Sync };

  bool is_read() const { return request_->op == BlockOp::Read; }
  uint64_t position() const { return request_->range.offset + done_; }
  uint64_t left() const { return request_->range.length - done_; }

  void next();         // whatever comes after done_ bytes
  void next_zeroes();  // WriteZeroes: fallocate or a piece of zeroes
  void transfer(uint64_t length);
  void start_window();
  void merge_and_write();
  void advance(uint64_t bytes);
  void after_last();
  void transferred(int64_t result);
  void window_read(uint64_t bytes);
  void window_written(uint64_t bytes);
  void allocated(int64_t result);
  int allocate_mode() const;
  void submit(Step step, IoKind kind, ByteRange range, uint8_t* data, bool buffered);
  bool tells_of_lost_writes(Errno error) const;
  void finish_later(Errno error);
  void finish(Errno error);
  void shrunk();

  FileStore& store_;
  BlockRequest* request_ = nullptr;
  Step step_ = Step::Start;
  uint64_t done_ = 0;   // bytes of the request that are finished
  uint64_t piece_ = 0;  // bytes of the request that the current transfer or window handles
  ByteRange window_{};  // aligned, at most kBounceSize
  ByteRange locked_{};  // empty: holds no lock
  IoRequest io_;
};

}  // namespace vmferry
