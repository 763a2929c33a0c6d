// SPDX-License-Identifier: Apache-2.0
//
// Primary side of a group's replication: seals epochs, reads them back, and sends them until the copy has acknowledged.
//
// Flow: DirtyConsumer::seal() of all volumes in one task -> FrameReader (coalesced, several reads in flight) ->
// FrameEncoder (a worker: zero, reference or literal, compression) -> GroupChannel within credit -> EpochAck -> only
// then clear_sealed(). Nothing of an unacknowledged epoch is forgotten, so any cut or restart costs a repetition only.
// Threads: the group's executor. See docs/replication-protocol.md "Epochs" and invariants I1, I6, I7, I8, I9.
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

enum class ReplicationState : uint8_t {
  Initial,     // full copy under way
  CatchingUp,  // epochs flow, but the copy is older than twice the interval
  InSync,
  Degraded,  // connected, but the peer cannot take or apply epochs; see reason
  Paused,
  Disconnected,
  Inconsistent,  // disconnected (or refused) and the copy is not usable
};
std::string_view to_string(ReplicationState state) noexcept;

struct SenderOptions {
  Nanoseconds interval = 5 * kSecond;  // between seals; a caller derives it from --rpo
  bool overwrite_peer = false;
  // Of the bulk stream. 64 MiB of history: 128 MiB save 2.8 % more on a /usr tree (docs/replication-protocol.md 4.5).
  delta::StreamCodecOptions codec{.level = 3, .window_log = 26};
  int urgent_window_log = 23;     // of a final epoch's own stream
  uint32_t frames_ahead_max = 4;  // read or encoded ahead of the channel, 1 MiB each
  uint32_t reads_in_flight_max = 64;
  uint64_t index_bytes_max = 64U << 20;  // of the session index
};

struct SenderStatus {
  ReplicationState state = ReplicationState::Disconnected;
  std::string reason;  // why it is not in sync, for people; may be empty
  CopyQuality peer_quality = CopyQuality::None;
  uint64_t epoch = 0;              // last acknowledged
  double rpo_s = 0;                // age of the oldest write that the copy does not have; 0 when it has all
  uint64_t remaining_bytes = 0;    // dirty, before reduction
  uint64_t raw_bytes = 0;          // block bytes sent, zeroes included, since construction
  uint64_t wire_bytes = 0;         // payload bytes given to the channel since construction
  uint64_t literal_bytes = 0;      // of raw_bytes: sent as data
  uint64_t reference_bytes = 0;    // of raw_bytes: sent as references
  uint64_t resent_references = 0;  // frames whose references did not match
  uint64_t raw_rate = 0;           // bytes per second, over the last seconds
  uint64_t wire_rate = 0;
  uint64_t dirty_rate = 0;      // bytes of distinct blocks that become dirty per second
  double reduction = 1.0;       // wire bytes per raw byte of what was sent lately
  uint64_t verified_bytes = 0;  // of the verification under way
  uint64_t index_blocks = 0;    // learnt by reading what the copy holds, for references to it
  bool index_complete = false;  // nothing more is read for it
  double estimate_s = -1;       // until the present backlog is applied; -1 unknown
  uint64_t epochs_acknowledged = 0;
  uint64_t epochs_abandoned = 0;
};

struct VerifyDifference {
  uint16_t volume = 0;
  ByteRange range;
};

class Sender {
 public:
  using Done = std::function<void(Status)>;

  // Everything referenced must outlive this. `state` is open.
  Sender(Executor& executor, GroupChannel& channel, ReplicaState& state, std::vector<ReplicaVolume> volumes,
         SenderOptions options);
  // At any time; callbacks that are still owed are dropped. Dirty state stays with the devices: sealed blocks are
  // merged back.
  ~Sender();
  Sender(const Sender&) = delete;
  Sender& operator=(const Sender&) = delete;

  // Makes this side the source: tracking is activated where it is not (and then everything is dirty). Before it is
  // done nothing is sent.
  void start(Done done);

  // Copy part and volumes of our hello.
  void fill_hello(GroupHello& hello) const;
  // After both hellos. An error: this peer must be refused (sizes, foreign data without consent), with this reason.
  Status on_peer_hello(const GroupHello& hello);
  void on_disconnected();
  // EpochSegmentAck, EpochAck, EpochResend, Credit, EpochAbandon, VerifyReply. An error: the peer broke the protocol;
  // drop the connection.
  Status on_message(MessageType type, ByteSpan payload);
  void on_writable(TrafficClass traffic);

  void set_interval(Nanoseconds interval);
  void set_overwrite_peer(bool allowed);
  void pause();
  void resume();
  void sync_now();  // the next epoch is sealed as soon as the present one is acknowledged
  // Every write acknowledged before the call is durable and applied in the peer's files. Waits for ever without a
  // connection; several may wait.
  void wait_in_sync(Done done);

  // --- Migration
  // wait_in_sync() with an epoch sealed for it. `traffic`: Urgent overtakes the memory stream. `consistent`: nobody
  // writes meanwhile, and a copy that is only whole is made one point in time, with an empty epoch if need be.
  void run_round_now(Done done, TrafficClass traffic = TrafficClass::Bulk, bool consistent = false);
  uint64_t predicted_round_bytes() const;  // wire bytes that an epoch sealed now would take
  // Every volume is fenced and quiesced. Sends everything the copy lacks as one staged epoch that is called consistent
  // and carries `attempt`; done(epoch) when the copy acknowledged it durably. After a cut it is sent again. Busy when
  // the first full copy is not finished; Internal when a volume was written meanwhile after all.
  void send_final_epoch(const Id128& attempt, TrafficClass traffic, std::function<void(Result<uint64_t>)> done);
  void cancel_final_epoch();  // `done` is dropped; ordinary epochs go on

  // Compares the copy with the source piece by piece; pieces written meanwhile are compared again, at most a few times.
  // Fails with the reason when the copy does not get what it lacks (paused, the peer cannot take it) or does not
  // answer.
  void verify(std::function<void(Result<std::vector<VerifyDifference>>)> done);
  void cancel_verify(const Error& why);  // nothing when none is under way

  SenderStatus status() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vmferry
