// SPDX-License-Identifier: Apache-2.0
//
// Secondary side of a group's replication: checks and stages epochs, commits, applies and acknowledges them.
//
// Flow: data frames in order -> a worker (decompress, hash, parse) -> references resolved -> staging area or, in a
// direct epoch, the stores -> EpochEnd -> commit record, fdatasync -> EpochApply to all volumes -> flush -> durable
// ReplicaRecord -> EpochAck. A committed epoch is applied again after a crash; an uncommitted one is resumed by its
// session or discarded.
// Threads: the group's executor. See docs/replication-protocol.md "Epochs", docs/on-disk.md "Staging" and I6, I8, I9.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/delta/stream_codec.h"
#include "engine/replicate/peer_channel.h"
#include "engine/replicate/replica_state.h"
#include "engine/runtime/executor.h"
#include "netproto/repl/epoch_messages.h"

namespace vmferry {

// Planted faults: tests/sim must find each of them. All false in the daemon.
struct ReplicateFaults {
  bool ack_before_flush = false;
  bool apply_without_staging = false;
  bool fuzzy_called_consistent = false;
};

struct ReceiverOptions {
  uint64_t credit_window_min = 32U << 20;   // body bytes in flight
  uint64_t credit_window_max = 128U << 20;  // at most, for links with a large bandwidth-delay product
  uint64_t segment_bytes = 64U << 20;       // between two segment acknowledgements
  Nanoseconds segment_interval = 1 * kSecond;
  uint64_t staging_keep_bytes = 64U << 20;  // of the staging area's space kept allocated between epochs
  delta::StreamCodecOptions codec{};        // what the source may use: window and frame size are limits
  ReplicateFaults faults{};
};

struct ReceiverStatus {
  CopyQuality quality = CopyQuality::None;
  uint64_t epoch = 0;
  uint64_t quality_epoch = 0;
  uint64_t staged_epoch = 0;  // in progress, 0 none
  uint64_t staged_bytes = 0;
  bool applying = false;
  bool half_applied = false;  // the files hold a part of a committed epoch, and the rest cannot be written now
  bool foreign_data = false;
  std::string reason;  // why an epoch could not be taken or applied, until one is; empty when all is well
  Nanoseconds reason_since = 0;
  bool source_paused = false;  // the source has said so on this connection
  Nanoseconds source_paused_since = 0;
  uint64_t received_body_bytes = 0;
  uint64_t received_wire_bytes = 0;   // of the same messages, as they came
  uint64_t reference_mismatches = 0;  // frames
  uint64_t epochs_applied = 0;
  uint64_t epochs_discarded = 0;
};

struct ReceiverEvents {
  std::function<void(uint64_t epoch, CopyQuality quality)> epoch_applied;  // durably; before EpochAck is sent
  std::function<void(const Id128& attempt, uint64_t epoch)> final_epoch_applied;
  // The peer sent something that cannot be (a bad hash, a range outside its volume): drop the connection.
  std::function<void(const Error&)> protocol_error;
};

class Receiver {
 public:
  using Done = std::function<void(Status)>;

  // Everything referenced must outlive this. `state` is open and uses the first bytes of `staging`, whose size is the
  // limit of one staged epoch.
  Receiver(Executor& executor, GroupChannel& channel, ReplicaState& state, BlockDevice& staging,
           std::vector<ReplicaVolume> volumes, ReceiverOptions options, ReceiverEvents events);
  ~Receiver();  // at any time
  Receiver(const Receiver&) = delete;
  Receiver& operator=(const Receiver&) = delete;

  // Applies an epoch that was committed before a crash, finds one to resume, and looks whether the files hold foreign
  // data. No hello and no guest read before it is done.
  void open(Done done);
  // A former source whose last epoch `epoch` is what its peer took over: from here on its files are a consistent copy.
  // Every parked write was failed. Before the ownership record says Secondary. Then open().
  void adopt_as_copy(uint64_t epoch, Done done);
  // Stops taking frames; done when nothing is in flight and a commit under way is finished. An error: the files hold a
  // part of a committed epoch, whose rest cannot be written; another Receiver finds it in the staging area.
  void close(Done done);

  void fill_hello(GroupHello& hello) const;
  Status on_peer_hello(const GroupHello& hello);  // an error: refuse this peer with this reason
  void on_disconnected();
  // SourceState, EpochBegin, EpochData, EpochEnd, EpochAbandon, VerifyRequest. An error: the peer broke the protocol;
  // drop the connection.
  Status on_message(MessageType type, ByteSpan payload);

  // Attempt and epoch of the last handover whose final epoch is applied here and is still the newest; none otherwise.
  Id128 final_attempt() const;
  ReceiverStatus status() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vmferry
