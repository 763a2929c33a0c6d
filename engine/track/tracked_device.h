// SPDX-License-Identifier: Apache-2.0
//
// The layer between export and store that knows which blocks changed, in which epoch, and whether the guest may write.
//
// Flow of a mutating request: gate -> range lock (I4) -> activity log (I2) -> first mark (I1) -> store -> second mark
// -> reply. Reads and flushes pass through. The receiver of a secondary writes through store(), below this layer.
// Threads: the volume's home executor; completions are never inline. See docs/write-path.md.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "blockdev/block_device.h"
#include "blockdev/client_eras.h"
#include "engine/base/id.h"
#include "engine/runtime/executor.h"
#include "engine/track/epoch_tracker.h"
#include "engine/track/range_lock.h"
#include "engine/track/write_sample.h"

namespace vmferry {

// Identifies the content of a store between a clean stop and the next start. Size and identity are always compared,
// the time only after a clean stop. A block device has no useful time: 0.
struct StoreStamp {
  Id128 identity{};         // e.g. hash of device and inode number, or a file system's UUID and inode
  uint64_t size = 0;        // bytes
  int64_t modified_ns = 0;  // modification time
  friend bool operator==(const StoreStamp&, const StoreStamp&) = default;
};

// Planted faults: tests/sim must find each of them. All false in the daemon.
struct TrackFaults {
  bool second_mark_removed = false;
  bool activity_log_after_data = false;
  bool readback_unlocked = false;  // sealed blocks are read back while writes to them are in flight
};

struct TrackOptions {
  std::string name;                 // of the volume, for log lines
  uint32_t block_size = 4096;       // of tracking; recorded at activation
  uint32_t region_size = 4U << 20;  // of the activity log; a power of two, 32 KiB..32 MiB
  // With 4 MiB each: writes over 16 GiB wait for no log record. 8..4096
  uint32_t active_regions_max = 4096;
  Nanoseconds save_interval = 5 * kSecond;  // how long acknowledged blocks may stay dirty in the saved bitmap
  Nanoseconds idle_interval = 5 * kSecond;  // a region without a write for one to two of these leaves the log
  std::function<StoreStamp()> stamp;        // asked at open() and, after the last flush, at close(); may be empty
  // The metadata of a volume that is not new had only so many bytes and was filled up with zeroes; 0: it was missing.
  std::optional<uint64_t> metadata_size_found{};
  TrackFaults faults{};
};

// What open() found. Everything but New and Clean means that dirty blocks may have been added.
enum class OpenOutcome : uint8_t {
  New,         // no metadata: tracking is inactive
  Clean,       // after a clean stop of the same store
  Recovered,   // after a crash: saved bitmap or active regions
  WholeDirty,  // another store, changed behind our back, or damaged metadata
};

enum class WriteGate : uint8_t {
  Open,
  ReadOnly,  // a secondary: mutating requests complete with EPERM
  Parked,    // fenced: mutating requests are held; reads and flushes are served
};

// State of all blocks when tracking begins.
enum class Baseline : uint8_t {
  Clean,  // the peer holds what we hold (we were its secondary), or the caller marks what has to be copied
  Dirty,  // nothing is known: a full copy
};

class TrackMetadata;

class TrackedDevice final : public BlockDevice, public ClientEras {
 public:
  using Done = std::function<void(Status)>;

  // `store` and `metadata` must outlive this. The metadata device belongs to this volume alone and has at least
  // metadata_size(store.size()) bytes.
  TrackedDevice(Executor& executor, BlockDevice& store, BlockDevice& metadata, TrackOptions options);
  ~TrackedDevice() override;  // close() first, or a crash: then the metadata says "unclean"
  TrackedDevice(const TrackedDevice&) = delete;
  TrackedDevice& operator=(const TrackedDevice&) = delete;

  static uint64_t metadata_size(uint64_t store_size, uint32_t block_size = 4096);

  // Loads the metadata; no request before it is done. The gate is Open afterwards unless set otherwise before.
  void open(Done done);
  OpenOutcome opened_as() const;
  // Drains, saves everything, writes the clean-shutdown record. Requests submitted afterwards get ESHUTDOWN.
  void close(Done done);

  // BlockDevice, for the export.
  uint64_t size() const noexcept override { return store_.size(); }
  const BlockLimits& limits() const noexcept override { return store_.limits(); }
  void submit(BlockRequest& request) noexcept override;
  void query_extents(ByteRange range, size_t extents_max, ExtentsDone done) override;

  // ClientEras, for the export. Numbers are given from 1.
  uint64_t next_client() noexcept override { return ++clients_; }
  bool may_serve(uint64_t client) const noexcept override { return client > retired_ && client > zeroes_hidden_from_; }

  // Below this layer, for the receiver of a secondary.
  BlockDevice& store() { return store_; }

  // --- Tracking. Inactive (the state of a volume that never had a peer): no marks, no activity log, no cost.
  bool tracking() const { return tracking_; }
  // Waits until no mutating request is in flight (new ones wait meanwhile), makes the baseline durable, starts marking.
  // On an active device: the same, replacing what was dirty.
  void activate_tracking(Baseline baseline, Done done);
  // Forgets all dirty state durably: the peer was removed, or this side became a secondary.
  void deactivate_tracking(Done done);
  // Adds to the open set, for a full copy or after a divergence. Durable only after save_dirty(). Tracking is active.
  void mark_dirty(ByteRange range);
  void mark_all_dirty() { mark_dirty({0, size()}); }
  // Writes every changed page of the dirty bitmap and flushes: marks of mark_dirty() survive a crash from here on.
  void save_dirty(Done done);
  // The peer's view of what changed. Valid while this lives; sets are empty while tracking is inactive.
  DirtyConsumer& consumer() { return epochs_; }
  uint64_t dirty_bytes() const { return epochs_.open_bytes() + epochs_.sealed_bytes(); }  // blocks in both count twice
  uint32_t block_size() const { return options_.block_size; }
  // As EpochTracker::collect_runs; the range lies within the device, tracking is active.
  void collect_dirty(DirtySet set, ByteRange range, size_t runs_max, std::vector<ByteRange>& runs) const {
    epochs_.collect_runs(set, range, runs_max, runs);
  }

  // Reads sealed blocks: only while no write to them is in flight (I7). `request` is a Read.
  void submit_readback(BlockRequest& request) noexcept;

  // Mutating requests let through the gate since open(). Equal before a seal and after the end of reading back means
  // that nothing was written between.
  uint64_t mutation_counter() const { return mutation_counter_; }
  // From here on every write is noted there; nullptr ends it.
  void sample_writes(std::shared_ptr<WriteSample> sample) noexcept { write_sample_ = std::move(sample); }

  // --- Write gate
  void set_gate(WriteGate gate) noexcept;  // parked requests stay parked until one of the next two
  WriteGate gate() const { return gate_; }
  void release_parked() noexcept;          // resubmits in the order of arrival; call with the gate Open
  void fail_parked(Errno error) noexcept;  // completes all of them with `error`
  size_t parked_requests() const { return parked_.size(); }

  // Reads and writes of the export, for those who want to keep out of the guest's way.
  uint64_t guest_requests() const { return mutation_counter_ + guest_reads_; }
  bool guest_waits() const { return mutations_in_flight_ > 0 || reads_in_flight_ > 0; }

  uint64_t mutations_in_flight() const { return mutations_in_flight_; }  // past the gate, not yet completed
  // `done` (posted) when no mutating request is in flight past the gate. Close the gate first, or it may take for ever.
  void quiesce(std::function<void()> done);

  // --- Read gate of a secondary
  // While an epoch is applied, reads wait, so that they see epoch N or N+1, never a mix (I6). Reads already at the
  // store are waited for by quiesce_reads().
  void hold_reads(bool hold) noexcept;
  void quiesce_reads(std::function<void()> done);  // posted when no guest read is at the store
  // Before the first whole epoch: reads give zeroes instead of a half-copied image.
  void serve_zeroes(bool zeroes) noexcept;
  // The store gets another side's content: clients that could write to what was there are not served any more.
  void retire_writers() noexcept { retired_ = writers_until_; }

  // Grows tracking to `new_size` durably, before the store grows. The metadata device is already large enough.
  void resize(uint64_t new_size, Done done);

 private:
  class Op;
  enum class Phase : uint8_t { New, Opening, Ready, Closing, Closed };

  void admit_mutation(BlockRequest& request) noexcept;
  void complete_later(BlockRequest& request, Errno error);
  Op& take_op() noexcept;
  void give_back(Op& op) noexcept;
  void mutation_finished() noexcept;
  void read_finished() noexcept;
  // Runs `action` when no mutating request is in flight; new ones wait until end_control(). One at a time, in order.
  void begin_control(std::function<void()> action);
  void run_control();
  void end_control();
  ByteRange lock_range(ByteRange range) const noexcept;
  EpochId mark(ByteRange range) noexcept;
  void mark_completed(ByteRange range, EpochId submitted) noexcept;
  void close_when_drained(Done done);

  Executor& executor_;
  BlockDevice& store_;
  const TrackOptions options_;
  Phase phase_ = Phase::New;
  WriteGate gate_ = WriteGate::Open;
  bool tracking_ = false;  // changes only while no mutating request is in flight
  bool hold_reads_ = false;
  bool serve_zeroes_ = false;
  bool writable_ = false;            // since the last ReadOnly
  uint64_t clients_ = 0;             // the last number given
  uint64_t writers_until_ = 0;       // clients up to this one were there when the gate closed for good
  uint64_t retired_ = 0;             // clients up to this one get ESHUTDOWN, always
  uint64_t zeroes_hidden_from_ = 0;  // and up to this one while zeroes are served
  bool control_running_ = false;
  uint64_t lock_unit_;  // requests that share such a unit are serialised
  EpochTracker epochs_;
  RangeLock locks_;
  std::unique_ptr<TrackMetadata> metadata_;
  uint64_t mutation_counter_ = 0;
  std::shared_ptr<WriteSample> write_sample_;
  uint64_t mutations_in_flight_ = 0;
  uint64_t guest_reads_ = 0;
  uint64_t reads_in_flight_ = 0;
  std::deque<std::unique_ptr<Op>> ops_;  // grows to the most that the exports ever had in flight
  std::vector<Op*> free_ops_;
  std::deque<BlockRequest*> parked_;                   // by the gate
  std::deque<BlockRequest*> held_reads_;               // by hold_reads()
  std::deque<BlockRequest*> waiting_for_control_;      // while a control action needs the device quiet
  std::deque<std::function<void()>> control_actions_;  // the front may be running
  std::vector<std::function<void()>> quiesce_waiters_;
  std::vector<std::function<void()>> read_quiesce_waiters_;
  Alive alive_;
};

}  // namespace vmferry
