// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/workload/disk_writer.h"

#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tests/guest/record/record.h"
#include "tests/guest/workload/pacer.h"

namespace vmferry::guest {

namespace {

class DiskWriter {
 public:
  DiskWriter(const Options& options, unsigned index, const LogChannel& log)
      : options_(options), index_(index), log_(log) {}
  ~DiskWriter() {
    if (fd_ >= 0) ::close(fd_);
  }
  DiskWriter(const DiskWriter&) = delete;
  DiskWriter& operator=(const DiskWriter&) = delete;

  bool open(const std::string& path);
  bool run(const volatile std::sig_atomic_t& stop);

 private:
  bool failed(const char* what, std::uint64_t seq) const {
    log_.line("E disk %u: %s at record %" PRIu64 ": %s", index_, what, seq, std::strerror(errno));
    return false;
  }
  bool preallocate();
  bool log_extents() const;
  bool write_record(std::uint64_t slot, std::uint64_t seq);

  const Options& options_;
  unsigned index_;
  const LogChannel& log_;
  int fd_ = -1;
  std::uint64_t base_ = 0;  // byte offset of slot 0 in fd_
  std::uint64_t run_ = 0;
  SlotPattern pattern_;
  alignas(kRecordSize) std::array<std::byte, kRecordSize> record_{};
};

bool DiskWriter::open(const std::string& path) {
  const bool file = options_.mode == DiskMode::File;
  const int flags = O_RDWR | O_CLOEXEC | (file ? O_CREAT : 0) | (options_.direct ? O_DIRECT : 0);
  fd_ = ::open(path.c_str(), flags, 0600);
  if (fd_ < 0) return failed(("open " + path).c_str(), 0);
  std::uint64_t area = options_.area_bytes;
  if (!file) {
    const off_t size = ::lseek(fd_, 0, SEEK_END);
    const std::uint64_t disk_size = size < 0 ? 0 : static_cast<std::uint64_t>(size);
    base_ = options_.offset;
    area = std::min(area, disk_size - std::min(disk_size, base_));
  }
  pattern_ = {.slot_count = area / kRecordSize,
              .hot_slot_count = std::min(options_.hot_bytes, area) / kRecordSize,
              .random_percent = options_.random_percent,
              .hot_percent = options_.hot_percent,
              .seed = options_.seed};
  if (pattern_.slot_count == 0) {
    errno = ENOSPC;
    return failed("no room for the area", 0);
  }
  run_ = splitmix64(now_ns() ^ (static_cast<std::uint64_t>(::getpid()) << 32) ^ splitmix64(options_.seed + index_));
  if (file && !preallocate()) return false;
  log_.line("S %u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %u %u %u %" PRIu64, index_, run_, pattern_.slot_count,
            base_, pattern_.hot_slot_count, pattern_.random_percent, pattern_.hot_percent, options_.fsync_every,
            pattern_.seed);
  return !file || log_extents();
}

// The blocks must stay where they are, so that the verifier finds them in the image: all are allocated before.
bool DiskWriter::preallocate() {
  struct stat status {};
  const off_t size = static_cast<off_t>(pattern_.slot_count * kRecordSize);
  if (::fstat(fd_, &status) != 0) return failed("fstat", 0);
  if (status.st_size >= size) return true;
  if (::fallocate(fd_, 0, 0, size) != 0) return failed("fallocate", 0);
  if (::fsync(fd_) != 0) return failed("fsync after fallocate", 0);
  return true;
}

bool DiskWriter::log_extents() const {
  static constexpr std::uint32_t kExtentsPerCall = 64;
  const std::uint64_t end = pattern_.slot_count * kRecordSize;
  std::vector<std::uint64_t> memory((sizeof(fiemap) + kExtentsPerCall * sizeof(fiemap_extent)) / 8 + 1);
  auto* map = reinterpret_cast<fiemap*>(memory.data());
  for (std::uint64_t position = 0; position < end;) {
    std::ranges::fill(memory, 0);
    map->fm_start = position;
    map->fm_length = end - position;
    map->fm_flags = FIEMAP_FLAG_SYNC;
    map->fm_extent_count = kExtentsPerCall;
    if (::ioctl(fd_, FS_IOC_FIEMAP, map) != 0) return failed("FIEMAP", 0);
    if (map->fm_mapped_extents == 0) {
      errno = ENODATA;
      return failed("the file is not allocated as a whole", 0);
    }
    for (std::uint32_t i = 0; i < map->fm_mapped_extents; ++i) {
      const fiemap_extent& extent = map->fm_extents[i];
      log_.line("X %u %llu %llu %llu", index_, extent.fe_logical, extent.fe_physical, extent.fe_length);
      position = extent.fe_logical + extent.fe_length;
    }
  }
  return true;
}

bool DiskWriter::write_record(std::uint64_t slot, std::uint64_t seq) {
  make_record(record_, run_, seq, slot, now_ns());
  const ssize_t done = ::pwrite(fd_, record_.data(), record_.size(), static_cast<off_t>(base_ + slot * kRecordSize));
  if (done == static_cast<ssize_t>(record_.size())) return true;
  if (done >= 0) errno = EIO;
  return failed("write", seq);
}

bool DiskWriter::run(const volatile std::sig_atomic_t& stop) {
  // Without fsync the log still goes out in batches: one line per record would be a load of its own.
  const std::uint64_t batch = options_.fsync_every != 0 ? options_.fsync_every : 64;
  SlotSequence slots(pattern_);
  Pacer pacer(options_.disk_rate, kRecordSize);
  std::uint64_t first = 0;
  std::uint64_t wait_max_ns = 0;
  std::uint64_t seq = 0;
  const std::uint64_t end_ns = options_.seconds == 0 ? UINT64_MAX : now_ns() + options_.seconds * 1'000'000'000ULL;
  const auto timed = [&](auto&& action) {
    const std::uint64_t start = now_ns();
    const bool done = action();
    wait_max_ns = std::max(wait_max_ns, now_ns() - start);
    return done;
  };
  const auto acknowledge = [&](bool sync) {
    if (sync && !timed([&] { return ::fsync(fd_) == 0; })) return failed("fsync", seq);
    if (seq > first) {
      log_.line("%c %u %" PRIu64 " %" PRIu64 " %" PRIu64, sync ? 'A' : 'W', index_, first, seq - first,
                wait_max_ns / 1000);
    }
    first = seq;
    wait_max_ns = 0;
    return true;
  };
  while (stop == 0 && now_ns() < end_ns) {
    const std::uint64_t slot = slots.next();
    if (!timed([&] { return write_record(slot, seq); })) return false;
    ++seq;
    if (seq - first == batch && !acknowledge(options_.fsync_every != 0)) return false;
    pacer.wait();
  }
  if (!acknowledge(true)) return false;
  log_.line("D %u %" PRIu64, index_, seq);
  return true;
}

}  // namespace

int run_disk_writer(const Options& options, unsigned index, const std::string& path, const LogChannel& log,
                    const volatile std::sig_atomic_t& stop) {
  DiskWriter writer(options, index, log);
  return writer.open(path) && writer.run(stop) ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace vmferry::guest
