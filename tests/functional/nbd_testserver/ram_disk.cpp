// SPDX-License-Identifier: Apache-2.0
#include "tests/functional/nbd_testserver/ram_disk.h"

#include <sys/mman.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kSlowness = 50 * kMillisecond;

// What a failing disk says, by position.
Errno failure_at(uint64_t offset) {
  constexpr Errno kByMebibyte[] = {EIO, ENOSPC, EPERM, ENOMEM, ENODEV};
  const uint64_t index = offset / 1_MiB;
  return index < std::size(kByMebibyte) ? kByMebibyte[index] : 0;
}

}  // namespace

Result<std::unique_ptr<BlockDevice>> RamDisk::parse(Executor& executor, std::string_view text) {
  uint64_t size = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), size);
  const std::string_view rest(end, static_cast<size_t>(text.data() + text.size() - end));
  Mood mood = Mood::Fine;
  if (rest == ":slow") mood = Mood::Slow;
  if (rest == ":failing") mood = Mood::Failing;
  if (error != std::errc{} || size == 0 || size > 64_GiB || (!rest.empty() && mood == Mood::Fine))
    return fail(ErrorKind::InvalidArgument, "'{}': BYTES, BYTES:slow or BYTES:failing", text);
  return std::unique_ptr<BlockDevice>(std::make_unique<RamDisk>(executor, size, mood));
}

RamDisk::RamDisk(Executor& executor, uint64_t size, Mood mood) : executor_(executor), size_(size), mood_(mood) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  VF_ASSERT(memory != MAP_FAILED);
  content_ = static_cast<uint8_t*>(memory);
}

RamDisk::~RamDisk() {
  munmap(content_, size_);
}

void RamDisk::submit(BlockRequest& request) noexcept {
  VF_ASSERT(request.op == BlockOp::Flush || fits_in(request.range.offset, request.range.length, size_));
  if (mood_ == Mood::Slow) {
    executor_.start_timer(kSlowness, [this, &request] { request.completion->block_done(request, carry_out(request)); });
    return;
  }
  batch_.push_back(&request);
  if (batch_.size() == 1) executor_.post([this] { run_batch(); });
}

void RamDisk::run_batch() {
  running_.swap(batch_);
  for (BlockRequest* request : running_) request->completion->block_done(*request, carry_out(*request));
  running_.clear();
}

Errno RamDisk::carry_out(const BlockRequest& request) {
  if (mood_ == Mood::Failing && request.op != BlockOp::Flush) {
    const Errno error = failure_at(request.range.offset);
    if (error != 0) return error;
  }
  if (request.fast_only) return ENOTSUP;
  uint8_t* at = content_ + request.range.offset;
  switch (request.op) {
    case BlockOp::Read:
      std::memcpy(request.data, at, request.range.length);
      break;
    case BlockOp::Write:
      std::memcpy(at, request.data, request.range.length);
      break;
    case BlockOp::WriteZeroes:
      std::memset(at, 0, request.range.length);
      break;
    case BlockOp::Flush:
      break;
  }
  return 0;
}

void RamDisk::query_extents(ByteRange range, size_t, ExtentsDone done) {
  executor_.post([range, done = std::move(done)] { done(std::vector<Extent>{{range, false, false}}); });
}

}  // namespace vmferry
