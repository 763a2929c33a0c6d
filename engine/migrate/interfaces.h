// SPDX-License-Identifier: Apache-2.0
//
// What the handover needs of a group's volumes, their replication and the memory stream, and nothing more.
//
// Real: engine/daemon/group, over TrackedDevice, Sender/Receiver and engine/memory. Fakes: tests/unit/migrate,
// tests/sim.
// Threads: the group's executor; callbacks are posted, never inline.
#pragma once

#include <functional>
#include <memory>

#include "engine/base/id.h"
#include "engine/base/result.h"
#include "engine/base/units.h"
#include "engine/runtime/stream.h"

namespace vmferry {

// All volumes of the group at once.
class GroupDevices {
 public:
  virtual ~GroupDevices() = default;

  // Writes wait from here on; reads and flushes are served. Repeating it changes nothing.
  virtual void park_writes() = 0;
  // `done` when no write is in flight past the gate and what was written is flushed. Only while parked.
  virtual void quiesce(std::function<void(Status)> done) = 0;
  // Opens the gate and carries out what was parked, in order.
  virtual void accept_writes() = 0;
  // Fails what was parked and refuses writes from here on.
  virtual void refuse_writes() = 0;
  // `noticed` runs once, when the next guest write is accepted. The write is not held: after a crash in between, its
  // block is in the activity log (I2), so divergence is still seen.
  virtual void notice_first_write(std::function<void()> noticed) = 0;
  // Whether a write was accepted since then, noticed or not.
  virtual bool wrote() const = 0;
};

struct RoundProgress {
  bool connected = false;
  bool initial_done = false;     // the peer has a first full copy
  uint64_t remaining_bytes = 0;  // dirty now, before reduction
  uint64_t predicted_bytes = 0;  // on the wire, if sealed now
  uint64_t dirty_rate = 0;       // bytes of distinct blocks per second
  uint64_t send_rate = 0;        // bytes per second that the link gives us
  uint64_t raw_bytes = 0;        // sent since the group was opened
  uint64_t wire_bytes = 0;
};

struct RoundOptions {
  bool urgent = false;      // ahead of the memory stream on the link
  bool consistent = false;  // writes are parked: the peer's copy has to end as one point in time, not just as whole
};

struct OwnOptions {
  bool accept_inconsistent = false;  // the operator takes a mix of two epochs
};

class GroupReplication {
 public:
  virtual ~GroupReplication() = default;

  // --- source
  // Makes sure that this group replicates to its peer; done when that is accepted, not when it has caught up.
  virtual void ensure_started(std::function<void(Status)> done) = 0;
  virtual RoundProgress progress() const = 0;
  // One epoch sealed now; done when the peer has it durably. A cut delays it, nothing else.
  virtual void run_round_now(const RoundOptions& options, std::function<void(Status)> done) = 0;
  // Writes are parked and quiesced: everything that the peer lacks, as the last epoch of `attempt`. Sent again after a
  // cut by itself. done(epoch) when the peer has it durably.
  virtual void send_final_epoch(const Id128& attempt, std::function<void(Result<uint64_t>)> done) = 0;
  // The attempt failed: `done` of send_final_epoch is dropped and ordinary epochs go on.
  virtual void cancel_final_epoch() = 0;
  // This side is about to become the copy of the peer, which took over at `epoch` (0: not known, or nothing was handed
  // over). Writes are parked or refused. Runs before Secondary is durable, and again after a restart in between.
  virtual void prepare_to_follow(uint64_t epoch, std::function<void(Status)> done) = 0;
  // This side is about to own the volumes without a handover: an epoch that is being applied ends first, and no other
  // is taken. Runs before the record is durable. An error: the epoch cannot be ended, so that the volumes hold a mix of
  // two; this side stays a copy.
  virtual void prepare_to_own(const OwnOptions& options, std::function<void(Status)> done) = 0;

  // --- peer
  // `durable` runs each time that a last epoch of a handover is durable here, also for one that was already.
  virtual void set_final_epoch_listener(std::function<void(const Id128& attempt, uint64_t epoch)> durable) = 0;
  // Attempt of the newest durable last epoch, none otherwise; `epoch` gets its number.
  virtual Id128 durable_final_attempt(uint64_t& epoch) const = 0;
  // Whether the copy here is one point in time (I6).
  virtual bool copy_is_consistent() const = 0;
  // Whether it is at least whole: a round with `consistent` makes it one point in time.
  virtual bool copy_is_whole() const { return copy_is_consistent(); }

  // --- either: as a former primary, writes that the peer never acknowledged
  virtual bool holds_unsent_writes() const { return false; }
};

// Of the present or latest attempt.
struct MemoryFigures {
  uint64_t raw_bytes = 0;     // read from QEMU
  uint64_t wire_bytes = 0;    // payload given to the link
  uint64_t queued_bytes = 0;  // between QEMU and the peer's acknowledgement
};

// Carries QEMU's stream of one attempt. A cut link delays it: what the peer has not acknowledged is sent again after
// the reconnect, without the coordinator.
class MemoryCarrier {
 public:
  struct SourceEvents {
    std::function<void()> ended;        // QEMU closed its end after the tail; all of it is on its way
    std::function<void(Error)> failed;  // the stream can never be completed
  };
  struct SinkEvents {
    std::function<void(bool hash_equal)> complete;  // QEMU was given every byte, and the hash was compared
    std::function<void(Error)> failed;
  };
  virtual ~MemoryCarrier() = default;

  virtual void start_source(std::unique_ptr<ByteStream> from_qemu, const Id128& attempt, SourceEvents events) = 0;
  // The brake: while held, QEMU's socket is not read, so it cannot decide to stop the guest.
  virtual void hold(bool held) = 0;
  virtual void start_sink(std::unique_ptr<ByteStream> to_qemu, const Id128& attempt, SinkEvents events) = 0;
  // Closes either end; no callback of the attempt runs afterwards.
  virtual void stop() = 0;
  virtual MemoryFigures figures() const = 0;
};

}  // namespace vmferry
