// SPDX-License-Identifier: Apache-2.0
//
// The file in which an epoch waits, whole and checked, until it may touch the volumes (I6).
//
// Append-only records of one epoch at a time: begin, frames (zero and literal runs), commit. The commit record is
// written when all frames are, then flushed: from that moment the epoch will be applied, by a restarted daemon if need
// be. Stale records are told apart by epoch, session and a chain of header hashes, torn ones by their own hashes.
// docs/on-disk.md, "Staging". Threads: the group's executor; prepare_*() are pure and run on workers.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "blockdev/block_device.h"
#include "engine/base/hash.h"
#include "engine/runtime/executor.h"
#include "netproto/repl/epoch_messages.h"

namespace vmferry {

struct StagedFrame {
  uint64_t frame = 0;
  uint64_t heals = 0;
  bool unresolved = false;  // its references wait for a healing frame
  bool fuzzy = false;
};

struct StagedRecord {
  StagedFrame frame{};
  uint64_t offset = 0;  // on the device
  uint32_t size = 0;    // with header and padding
  uint64_t chain = 0;   // hash of its header, which names the record before it
};

class StagingArea {
 public:
  using Done = std::function<void(Errno)>;

  static constexpr uint32_t kAlignment = 4096;

  // Uses [base, device.size()) of `device`.
  StagingArea(Executor& executor, BlockDevice& device, uint64_t base);

  struct Found {
    EpochBegin begin;
    bool committed = false;
    bool consistent = false;  // of the commit record
    bool fuzzy = false;       // some frame was
    uint64_t contiguous = 0;  // last frame that need not be sent again; begin.first_frame - 1 when there is none
  };
  // What a stopped daemon left; records after the last usable one are forgotten. nullopt: nothing usable.
  void scan(uint64_t epoch_applied, std::function<void(Result<std::optional<Found>>)> done);

  // Forgets everything and writes the begin record.
  void begin(const EpochBegin& begin, Done done);
  // The image of a frame's record, ready to be appended. `body` has zero and literal runs only.
  static Bytes prepare_frame(uint64_t epoch, const Id128& session, const StagedFrame& frame, const FrameBody& body);
  // ENOSPC at the end of the area. Records are found by later calls in the order of append().
  void append(const StagedFrame& frame, Bytes image, Done done);
  void commit(bool consistent, Done done);  // writes the commit record and flushes; all appends are done
  void flush(Done done);
  // Space up to `bytes_ahead` behind the last record, so that what the source sends finds room.
  void reserve(uint64_t bytes_ahead, Done done);
  // Keeps only the records of frames up to `frame`. Nothing may be in flight.
  void truncate_after(uint64_t frame);
  // The epoch is applied or discarded; gives back space beyond `keep_bytes`.
  void forget(uint64_t keep_bytes, Done done);

  const std::vector<StagedRecord>& records() const { return records_; }
  uint64_t used_bytes() const { return position_ - base_; }
  uint64_t capacity() const { return device_.size() > base_ ? device_.size() - base_ : 0; }

  // Body of one frame record of the current epoch; Corrupt when its hash does not match.
  struct Content {
    Bytes image;
    FrameBody body;  // points into image
  };
  void read(const StagedRecord& record, std::function<void(Result<std::shared_ptr<Content>>)> done);

 private:
  struct Scan;
  void scan_next(std::shared_ptr<Scan> scan);
  void scan_frame(const std::shared_ptr<Scan>& scan, const StagedRecord& record, bool intact);
  void finish_scan(const std::shared_ptr<Scan>& scan);
  void write_at(uint64_t offset, Bytes image, Done done);
  uint64_t chain() const { return records_.empty() ? begin_chain_ : records_.back().chain; }

  Executor& executor_;
  BlockDevice& device_;
  const uint64_t base_;
  uint64_t position_;  // end of the last record
  uint64_t reserved_;  // allocated up to here, as far as we know
  uint64_t high_water_;
  EpochBegin begin_;
  uint64_t begin_chain_ = 0;
  std::vector<StagedRecord> records_;
  Alive alive_;
};

}  // namespace vmferry
