// SPDX-License-Identifier: Apache-2.0
//
// Which content the peer holds where, as far as this session sent it or learnt it: the source of references.
//
// Two bounded tables: content -> a block that had it, and block -> what was last sent for it. An answer needs both to
// agree, so that a block that was overwritten since is never offered. Both forget at their limit; a wrong answer is
// impossible to rule out (fingerprints are 64 bits) and harmless: the peer proves every reference.
// Threads: one at a time; the worker that encodes frames, in order.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/base/units.h"
#include "engine/delta/block_scan.h"

namespace vmferry::delta {

// A block of the group: volume in the upper 16 bits, block number (offset / kDedupBlockSize) below: 2^48 blocks.
class BlockPlace {
 public:
  BlockPlace() = default;
  BlockPlace(uint16_t volume, uint64_t offset) : value_(uint64_t{volume} << 48 | offset / kDedupBlockSize) {}
  uint16_t volume() const { return static_cast<uint16_t>(value_ >> 48); }
  uint64_t offset() const { return (value_ & ((uint64_t{1} << 48) - 1)) * kDedupBlockSize; }
  BlockPlace next() const {
    BlockPlace result = *this;
    ++result.value_;
    return result;
  }
  uint64_t value() const { return value_; }
  friend bool operator==(const BlockPlace&, const BlockPlace&) = default;

 private:
  uint64_t value_ = 0;
};

class SessionIndex {
 public:
  struct Sent {
    Fingerprint content = kZeroFingerprint;
    uint64_t frame = 0;  // that carried it; 0: learnt
  };
  struct Found {
    BlockPlace place;
    uint64_t frame = 0;
  };

  // bytes_max     of both tables together; entries are 40 bytes.
  // group_bytes   size of all volumes: a small group needs no large tables.
  SessionIndex(uint64_t bytes_max, uint64_t group_bytes);

  // `content` was sent for `place` in `frame`; zero content only forgets what was there.
  void record(BlockPlace place, Fingerprint content, uint64_t frame) noexcept;
  // The peer held `content` at `place` before this session sent anything (frame 0). Takes free room only: what was
  // sent is newer, and what is known is worth as much. Whether it is known now.
  bool learn(BlockPlace place, Fingerprint content) noexcept;
  void forget(uint16_t volume, ByteRange range) noexcept;
  std::optional<Found> find(Fingerprint content) const noexcept;
  std::optional<Sent> sent(BlockPlace place) const noexcept;
  // Frames after `frame` did not arrive, or their epoch was given up.
  void drop_after(uint64_t frame) noexcept;
  void clear() noexcept;
  size_t memory_bytes() const;
  size_t blocks_max() const { return places_.size(); }

 private:
  struct ContentSlot {
    Fingerprint content = kZeroFingerprint;
    BlockPlace place;
  };
  struct PlaceSlot {
    BlockPlace place;
    Fingerprint content = kZeroFingerprint;  // zero: free
    uint64_t frame = 0;
  };
  static constexpr size_t kWays = 4;

  size_t place_set(BlockPlace place) const noexcept;
  size_t content_set(Fingerprint content) const noexcept { return (content & set_mask_) * kWays; }
  PlaceSlot* place_slot(BlockPlace place) noexcept;
  const PlaceSlot* place_slot(BlockPlace place) const noexcept;

  size_t set_mask_;  // sets - 1, a power of two less one
  uint32_t turn_ = 0;
  std::vector<ContentSlot> contents_;
  std::vector<PlaceSlot> places_;
};

}  // namespace vmferry::delta
