// SPDX-License-Identifier: Apache-2.0
//
// Inside of the Sender. One epoch at a time (`current_`), walked by a cursor over the sealed sets of all volumes:
//
//   sender.cpp         life cycle, hello, what a new connection goes on with, messages
//   sender_epoch.cpp   when to seal, begin, end, acknowledgements, abandoning, the final epoch
//   sender_frames.cpp  pipeline: walk -> read back -> encode on a worker -> channel
//   sender_status.cpp  rates and status
//   sender_verify.cpp  comparison with the copy
//
// Because the walk only goes forward, a position in it says everything about what was sent before: an acknowledged
// frame stands for all blocks up to its mark, and a resumed epoch goes on at the mark of the last frame that arrived.
#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "engine/base/log.h"
#include "engine/replicate/epoch_reader.h"
#include "engine/replicate/index_learner.h"
#include "engine/replicate/progress.h"
#include "engine/replicate/sender.h"
#include "netproto/repl/hello.h"

namespace vmferry {

struct WalkPosition {
  size_t volume = 0;
  uint64_t offset = 0;
};

struct WalkMark {
  uint64_t frame = 0;
  WalkPosition after;
  uint64_t walked_bytes = 0;
};

struct FrameToHeal {
  uint64_t frame = 0;
  std::vector<EpochResend::Range> ranges;
};

// The epoch that is being sent or waits for its acknowledgement.
struct SentEpoch {
  EpochBegin begin;
  TrafficClass traffic = TrafficClass::Bulk;
  Nanoseconds sealed_at = 0;
  std::vector<uint64_t> mutations;  // counter of each volume at the seal
  bool mutated = false;             // a write was in flight at the seal, or came before the last frame was read

  WalkPosition walked;  // next to be put into a frame
  WalkPosition acked;   // everything before is durable at the copy
  uint64_t acked_frame = 0;
  uint64_t acked_bytes = 0;
  std::deque<WalkMark> marks;  // of frames behind acked_frame
  bool walk_done = false;
  bool end_sent = false;
  bool acknowledged = false;  // its record is being saved
  std::deque<FrameToHeal> heals;

  uint64_t sealed_bytes = 0;  // at the seal
  uint64_t walked_bytes = 0;
};

struct VerifyRun;

struct Sender::Impl {
  Impl(Executor& executor, GroupChannel& channel, ReplicaState& state, std::vector<ReplicaVolume> volumes,
       SenderOptions options);
  ~Impl();

  struct Waiter {
    uint64_t epoch = 0;  // 0: not sealed yet
    Done done;
  };
  struct Final {
    Id128 attempt{};
    TrafficClass traffic = TrafficClass::Urgent;
    std::function<void(Result<uint64_t>)> done;
    bool acknowledged = false;
  };

  // --- sender.cpp
  void start(Done done);
  void activate_volumes(size_t index, Done done);
  void save_source(Done done);
  void fill_hello(GroupHello& hello) const;
  Status on_peer_hello(const GroupHello& hello);
  Status plan(const GroupHello& hello);
  void continue_current(const GroupHello& hello);
  bool resume_current(uint64_t frame);
  void on_disconnected();
  Status on_message(MessageType type, ByteSpan payload);
  void set_paused(bool paused);
  void say_paused();
  void restart_pipeline(uint64_t frame);
  template <typename Message>
  void send(TrafficClass traffic, MessageType type, const Message& message) {
    Bytes payload = encode(message);
    wire_bytes_ += payload.size();
    channel_.send(traffic, type, std::move(payload));
  }

  // --- sender_epoch.cpp
  void pump();       // anything that may be done now
  void pump_soon();  // posted
  bool wants_epoch() const;
  void prepare_full();
  void begin_epoch();
  void announce(const EpochBegin& begin);
  void maybe_end();
  void segment_acknowledged(const EpochSegmentAck& ack);
  void clear_walked(WalkPosition from, WalkPosition to);
  void epoch_acknowledged(const EpochAck& ack);
  void record_acknowledged(uint64_t acknowledged);
  void finish_epoch();
  void epoch_finished();
  void refused(const EpochAbandon& abandon);
  void abandon_current(bool tell);
  void resolve_waiters(uint64_t epoch);
  void check_waiters();
  void send_final_epoch(Final final);
  bool refuse_early_final();
  void answer_final(Result<uint64_t> result);
  bool all_acknowledged() const;
  uint64_t open_bytes() const;
  uint64_t sealed_bytes() const;
  bool mutated_since_seal() const;

  // --- sender_frames.cpp
  void fill_pipeline();
  bool build_walk_job(SendJob& job);  // false: extents have to be asked for first, or nothing is left
  void build_heal_job(SendJob& job);
  void job_read(const std::shared_ptr<SendJob>& job);
  void drop_jobs(size_t keep);
  void pump_encoder();
  void job_encoded(const std::shared_ptr<SendJob>& job);
  bool may_learn() const;  // nothing to send, and the copy holds every clean block

  // --- sender_status.cpp
  void tick();
  SenderStatus status() const;
  uint64_t remaining_bytes() const;
  uint64_t verified_bytes() const;  // sender_verify.cpp
  Status verify_can_go_on() const;
  void look_after_verify();
  uint64_t predicted_round_bytes() const;

  Executor& executor_;
  GroupChannel& channel_;
  ReplicaState& state_;
  const std::vector<ReplicaVolume> volumes_;
  SenderOptions options_;
  const Id128 session_;
  std::shared_ptr<EpochEncoder> encoder_;  // shared with the job on the worker
  FrameReader reader_;
  ExtentCache extents_;

  bool started_ = false;
  bool connected_ = false;  // and both hellos agree
  bool paused_ = false;
  Nanoseconds paused_at_ = 0;  // when that changed last
  std::string refusal_;        // of the last hello or epoch
  bool degraded_ = false;
  GroupHello peer_;
  CopyQuality peer_quality_ = CopyQuality::None;
  bool full_needed_ = false;
  bool preparing_ = false;  // a full copy: marking and recording
  EpochKind kind_next_ = EpochKind::Staged;

  std::optional<SentEpoch> current_;
  std::optional<Final> final_;
  std::vector<Waiter> waiters_;
  bool sync_wanted_ = false;
  bool consistent_wanted_ = false;                  // a fuzzy copy does not count as in sync
  TrafficClass traffic_next_ = TrafficClass::Bulk;  // of the next epoch
  uint64_t epoch_last_ = 0;                         // highest number used or seen
  Nanoseconds sealed_last_ = 0;
  uint64_t frame_next_ = 1;
  uint64_t frame_applied_ = 0;  // frames up to this one belong to acknowledged epochs

  std::deque<std::shared_ptr<SendJob>> jobs_;  // in the order of their frames; the front one may be on the worker
  bool encoding_ = false;
  bool querying_extents_ = false;
  std::optional<uint64_t> encoder_restart_;  // at the next moment without a job on the worker
  std::optional<uint64_t> index_drop_;
  bool index_clear_ = false;
  uint64_t mismatches_new_ = 0;  // not yet told to the encoder

  uint64_t granted_ = 0;                  // body bytes since the connection came up
  std::optional<EpochBegin> begin_held_;  // until the copy's first credit
  uint64_t sent_ = 0;
  uint32_t backoff_count_ = 0;

  uint64_t wire_bytes_ = 0;
  SenderStatus totals_;
  Nanoseconds clean_at_ = 0;  // when the copy was last known to lack nothing
  Nanoseconds tick_at_ = 0;
  uint64_t tick_raw_ = 0;
  uint64_t tick_wire_ = 0;
  uint64_t tick_open_ = 0;
  SampledRate raw_rate_;
  SampledRate wire_rate_;
  SampledRate dirty_rate_;
  double reduction_ = 0.5;  // wire per raw of what was sent lately; a guess until something was

  Timer seal_timer_;
  Timer backoff_timer_;
  Timer tick_timer_;
  std::shared_ptr<VerifyRun> verify_;
  IndexLearner learner_;
  Alive alive_;
};

}  // namespace vmferry
