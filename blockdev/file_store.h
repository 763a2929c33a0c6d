// SPDX-License-Identifier: Apache-2.0
//
// A raw file or block device as BlockDevice: the bottom of a volume's chain.
//
// Flow: TrackedDevice -> FileStore -> IoBackend. With cache=none (O_DIRECT) unaligned requests go through bounce
// buffers with read-modify-write of the edges, serialised against overlapping ones; the last, partial block of a file
// whose size is no multiple of the block goes through the page cache, so that the file never grows by padding.
// A file that shrinks underneath gives EIO, never zeroes, until it is opened again. After a failed fdatasync every
// later flush fails too: the kernel reports a lost write only once, and then forgets it.
// Threads: the reactor's.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "blockdev/block_device.h"
#include "blockdev/log_limit.h"
#include "engine/runtime/folder.h"
#include "engine/runtime/io_backend.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

enum class CacheMode : uint8_t { Writeback, None };
Result<CacheMode> parse_cache(std::string_view text);

struct FileStoreOptions {
  std::optional<uint64_t>
      create_size{};  // bytes: make the file, sparse, when it is missing; else it must have this size
  CacheMode cache = CacheMode::Writeback;
  AioKind aio = AioKind::IoUring;
  bool read_only = false;
  bool must_exist = false;  // create_size only checks
  // How long to wait, blocking, for the lock of the file. The kernel ends the requests of a killed process after the
  // process itself: while one can still write, it holds the lock. For the start of a daemon only.
  Nanoseconds lock_wait{};
  // The path is a name in this folder, and no link is followed; nullptr: a path as any other. For open() only.
  const Folder* folder = nullptr;
};

constexpr Nanoseconds kLockWaitAtStart = 3 * kSecond;

// Whether the file is still the one of the clean-shutdown record (I2).
struct StoreIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t size = 0;
  int64_t modified_ns = 0;
  friend bool operator==(const StoreIdentity&, const StoreIdentity&) = default;
};

class FileStore final : public BlockDevice {
 public:
  // Takes an exclusive lock (shared when read_only), so that no second daemon serves the same bytes: Busy. Blocks:
  // for start and control paths.
  static Result<std::unique_ptr<FileStore>> open(Reactor& reactor, const std::string& path,
                                                 const FileStoreOptions& options);
  // The same on a given backend.
  static Result<std::unique_ptr<FileStore>> open(Reactor& reactor, const std::string& path,
                                                 const FileStoreOptions& options, std::unique_ptr<IoBackend> backend);
  ~FileStore() override;  // no request may be in flight

  uint64_t size() const noexcept override { return size_; }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override;
  void query_extents(ByteRange range, size_t extents_max, ExtentsDone done) override;

  // Grows the file; a block device must have grown already. `done` after the new size is durable; size() then has it.
  void resize(uint64_t size, std::function<void(Status)> done);
  Result<StoreIdentity> identity() const;
  bool created() const noexcept { return created_; }  // this open() made the file
  const std::string& path() const noexcept { return path_; }
  std::string_view aio_name() const noexcept { return backend_->name(); }
  size_t in_flight() const noexcept { return in_flight_; }
  // `done` (posted) when nothing is in flight; whoever still submits has to be stopped before.
  void when_idle(std::function<void()> done);

 private:
  class Op;
  class Place;
  struct Bounce;
  friend class Op;

  FileStore(Reactor& reactor, std::string path);
  Status open_file(const Place& place, const FileStoreOptions& options);
  Status create_file(const Place& place, uint64_t size);
  Status lock_file(Nanoseconds wait);
  Status find_alignment();
  void find_zeroing(const Place& place, bool read_only);

  Op& take_op();
  void give_back(Op& op);
  void look_idle();
  bool lock_range(Op& op);
  void unlock_range(Op& op);
  bool take_bounce(Op& op);
  void give_back_bounce(Op& op);
  bool within_file(const ByteRange& range, bool check_now);
  void note_shrunk(uint64_t size_seen);
  void note_error(const BlockRequest& request, Errno error);

  Reactor& reactor_;
  std::string path_;
  UniqueFd fd_;        // requests; O_DIRECT when direct_
  UniqueFd buffered_;  // direct_ only: the partial last block and remainders of short transfers
  std::unique_ptr<IoBackend> backend_;
  uint64_t size_ = 0;
  uint64_t size_seen_in_ = UINT64_MAX;  // round of the loop in which the file's size was looked at last
  uint64_t shrunk_to_ = UINT64_MAX;     // smallest size seen below size_
  BlockLimits limits_;
  bool is_device_ = false;
  bool direct_ = false;
  bool read_only_ = false;
  bool created_ = false;
  uint32_t align_ = 1;         // of offsets and lengths on fd_; 1 without O_DIRECT
  uint32_t memory_align_ = 1;  // of buffers
  uint32_t zero_align_ = 1;    // of ranges given to fallocate
  bool can_punch_ = false;
  bool can_zero_range_ = false;
  Errno flush_error_ = 0;  // latched

  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<Op*> free_ops_;
  std::vector<Op*> locked_;         // mutating ops of direct_ in flight
  std::deque<Op*> lock_waiting_;    // first come, first served
  std::deque<Op*> bounce_waiting_;  // likewise
  std::vector<std::unique_ptr<Bounce>> bounces_;
  std::vector<Bounce*> free_bounces_;
  size_t in_flight_ = 0;
  size_t queries_ = 0;
  std::vector<std::function<void()>> idle_waiters_;
  bool idle_posted_ = false;
  LogLimit error_log_;
  LogLimit shrunk_log_;
};

}  // namespace vmferry
