// SPDX-License-Identifier: Apache-2.0
//
// The one interface of every layer of a volume: export -> TrackedDevice -> store (design section 4).
//
// Contract, after SPDK's bdev but stricter: submit() returns nothing, completes exactly once, and never inline. Ranges
// were validated by the export (or by the codec that produced them); layers assert. The request and its buffer belong
// to the submitter and stay untouched by it until completion.
// Threads: submit() and completion both on the device's home executor.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/base/result.h"
#include "engine/base/units.h"

namespace vmferry {

enum class BlockOp : uint8_t {
  Read,         // fills data[0, length)
  Write,        // stores data[0, length)
  WriteZeroes,  // the range reads as zeroes afterwards; see may_unmap, fast_only. A discard is this with may_unmap
  Flush,        // every write completed before this was submitted is durable, data and metadata; no range
};

constexpr bool is_mutating(BlockOp op) {
  return op == BlockOp::Write || op == BlockOp::WriteZeroes;
}

struct BlockRequest;

class BlockCompletion {
 public:
  // `error` is 0 or an errno: EIO, ENOSPC, EINVAL, EPERM (read-only, secondary), ENOTSUP (fast_only), ESHUTDOWN.
  // After an error the content of a written range is undefined: old, new or mixed per sector.
  virtual void block_done(BlockRequest& request, Errno error) noexcept = 0;

 protected:
  ~BlockCompletion() = default;
};

struct BlockRequest {
  BlockOp op = BlockOp::Read;
  bool fua = false;         // durable before completion (Write, WriteZeroes)
  bool may_unmap = false;   // WriteZeroes: may (and, where the store can, does) punch a hole
  bool fast_only = false;   // WriteZeroes: fail at once with ENOTSUP, content unchanged, when not faster than writing
  ByteRange range{};        // within device size; length >= 1 except for Flush
  uint8_t* data = nullptr;  // Read, Write: range.length bytes. Never written by a layer for Write
  BlockCompletion* completion = nullptr;
};

// One run of equal allocation. `zero` without `hole` is an allocated range known to read as zeroes.
struct Extent {
  ByteRange range;
  bool hole = false;
  bool zero = false;
};

struct BlockLimits {
  uint32_t block_size_min = 1;  // smallest unit that needs no read-modify-write below; a power of two
  uint32_t block_size_preferred = 4096;
  uint32_t transfer_size_max = 32U << 20;  // of one Read or Write
  bool can_punch = false;                  // WriteZeroes with may_unmap frees space
  bool can_fast_zero = false;              // WriteZeroes with fast_only may succeed
};

class BlockDevice {
 public:
  virtual ~BlockDevice() = default;

  virtual uint64_t size() const noexcept = 0;  // bytes
  virtual const BlockLimits& limits() const noexcept = 0;
  virtual void submit(BlockRequest& request) noexcept = 0;

  // Allocation of `range`, in order, gap-free, starting at range.offset; at most `extents_max`, so it may end early,
  // but covers at least one byte. A store that cannot tell says "data". Completes like submit().
  using ExtentsDone = std::function<void(Result<std::vector<Extent>>)>;
  virtual void query_extents(ByteRange range, size_t extents_max, ExtentsDone done) = 0;
};

// For control paths that prefer a closure: one allocation per call. The request lives until `done` returns.
using BlockDone = std::function<void(Errno)>;
void read_block(BlockDevice& device, uint64_t offset, uint8_t* data, uint64_t length, BlockDone done);
void write_block(BlockDevice& device, uint64_t offset, const uint8_t* data, uint64_t length, bool fua, BlockDone done);
void zero_block(BlockDevice& device, ByteRange range, bool may_unmap, BlockDone done);
void flush_block(BlockDevice& device, BlockDone done);

}  // namespace vmferry
