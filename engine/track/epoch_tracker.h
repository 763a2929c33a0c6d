// SPDX-License-Identifier: Apache-2.0
//
// Splits the guest's writes into epochs and remembers which blocks each one touched (I1).
//
// Flow: TrackedDevice marks here around every write; replicate::Sender seals through DirtyConsumer, walks the sealed
// set, and clears it as the peer acknowledges durably.
// Threads: one; the device's home executor. See docs/write-path.md.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "engine/track/dirty_map.h"

namespace vmferry {

// Counts seals of one device, from 1; local to the run of the daemon and not the epoch number on the wire.
using EpochId = uint64_t;

struct EpochTrackerOptions {
  uint64_t device_size = 0;
  uint32_t block_size = 4096;
  bool second_mark_removed = false;  // planted fault for the tests of the tests
};

// Which blocks a question is about.
enum class DirtySet : uint8_t {
  OpenEpoch,       // written in the open epoch
  Unacknowledged,  // the same, or in a sealed epoch that the peer does not hold durably yet
};

// What one peer sees of a device's changes. One sealed, unacknowledged set at a time; further peers become further
// consumers.
class DirtyConsumer {
 public:
  virtual ~DirtyConsumer() = default;

  // The open set becomes the sealed one and a new open set begins. Only when can_seal(): nothing sealed is left
  // unacknowledged. All volumes of a group are sealed in one task of their common executor, so that no completion can
  // fall between (I7). Constant time.
  virtual bool can_seal() const = 0;
  virtual EpochId seal() = 0;

  // Walk over the sealed set: next run of dirty blocks at or after byte `from`, at most `length_max` bytes (at least
  // one block), whole blocks except at the end of the device. Cleared blocks are no longer found.
  virtual std::optional<ByteRange> next_run(uint64_t from, uint64_t length_max) const = 0;
  // The peer holds these bytes durably. Only blocks wholly inside `range` are forgotten.
  virtual void clear_sealed(ByteRange range) = 0;
  virtual void clear_all_sealed() = 0;
  // The sealed set will not be acknowledged (link lost, epoch abandoned): its rest returns to the open set.
  virtual void merge_sealed_back() = 0;

  virtual uint64_t open_bytes() const = 0;    // dirty bytes of the open set
  virtual uint64_t sealed_bytes() const = 0;  // not yet acknowledged bytes of the sealed set
};

class EpochTracker final : public DirtyConsumer {
 public:
  explicit EpochTracker(const EpochTrackerOptions& options);

  // Before the write is submitted to the store. The result goes to complete().
  EpochId mark(ByteRange range) noexcept;
  // After the store completed it, with or without an error, before the reply. Marks again when the epoch moved: the
  // sealed set may have been read back before this write landed.
  void complete(ByteRange range, EpochId submitted) noexcept;

  bool can_seal() const override { return sealed_.empty(); }
  EpochId seal() override;
  std::optional<ByteRange> next_run(uint64_t from, uint64_t length_max) const override;
  void clear_sealed(ByteRange range) override;
  void clear_all_sealed() override;
  void merge_sealed_back() override;
  uint64_t open_bytes() const override { return open_.dirty_bytes(); }
  uint64_t sealed_bytes() const override { return sealed_.dirty_bytes(); }

  // Appends the runs of blocks that the set holds in `range`, clipped to it, in order, not touching each other, at most
  // `runs_max`. One pass over the maps, clean stretches by their summary.
  void collect_runs(DirtySet set, ByteRange range, size_t runs_max, std::vector<ByteRange>& runs) const;

  EpochId open_epoch() const { return epoch_; }
  const DirtyMap& open_map() const { return open_; }
  const DirtyMap& sealed_map() const { return sealed_; }
  uint64_t union_word(uint64_t word_index) const noexcept { return open_.word(word_index) | sealed_.word(word_index); }
  void mark_open_word(uint64_t word_index, uint64_t bits) noexcept { open_.mark_word(word_index, bits); }
  void reset() noexcept;  // both sets empty; the epoch moves, so that writes in flight mark again
  void grow(uint64_t device_size);

  // Called for each range whose bits were cleared, so that the saved bitmap follows lazily. May be empty.
  void set_on_cleared(std::function<void(ByteRange)> on_cleared) { on_cleared_ = std::move(on_cleared); }

 private:
  DirtyMap open_;
  DirtyMap sealed_;
  EpochId epoch_ = 1;
  const bool second_mark_removed_;
  std::function<void(ByteRange)> on_cleared_;
};

}  // namespace vmferry
