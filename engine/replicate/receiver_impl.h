// SPDX-License-Identifier: Apache-2.0
//
// Inside of the Receiver: one queue of messages, handled strictly in order, one at a time (`busy_`), while the writes
// that they cause run in parallel behind them.
//
//   receiver.cpp         life cycle, hello, queue, credit
//   receiver_frames.cpp  begin, data, end, segment acknowledgements
//   receiver_commit.cpp  commit, apply, durable record, acknowledgement
#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "engine/base/log.h"
#include "engine/replicate/epoch_apply.h"
#include "engine/replicate/epoch_decoder.h"
#include "engine/replicate/receiver.h"

namespace vmferry {

// One frame between its arrival and the point where everything before it is written.
struct ReceivedFrame {
  uint64_t frame = 0;
  uint64_t heals = 0;
  uint32_t body_size = 0;
  uint32_t connection = 0;
  bool written = false;
  bool resolved = true;
};
// The epoch being received.
struct ReceivedEpoch {
  EpochBegin begin;
  uint64_t frame_next = 0;
  uint64_t contiguous = 0;  // every frame up to here is written (not yet flushed)
  uint64_t segment_acked = 0;
  uint64_t segment_bytes = 0;  // since the last segment acknowledgement
  bool fuzzy = false;
  std::deque<ReceivedFrame> frames;  // behind `contiguous`
  std::optional<EpochEnd> end;
};

struct Receiver::Impl {
  Impl(Executor& executor, GroupChannel& channel, ReplicaState& state, BlockDevice& staging,
       std::vector<ReplicaVolume> volumes, ReceiverOptions options, ReceiverEvents events);

  // --- receiver.cpp
  void open(Done done);
  void open_staged(const std::optional<StagingArea::Found>& found, Done done);
  void open_volumes(size_t index, Done done);
  void finish_open(Done done);
  void close(Done done);
  void fill_hello(GroupHello& hello) const;
  Status on_peer_hello(const GroupHello& hello);
  void on_disconnected();
  Status on_message(MessageType type, ByteSpan payload);
  void note_source_state(const SourceState& state);
  void pump();
  void drop_queue();
  void next();                   // the message being handled is done
  void when_written(Task task);  // runs when no frame is being written; only from the message being handled
  void broke_protocol(const Error& error);
  void consume(uint64_t body_size, uint32_t connection);
  uint64_t credit_window() const;
  template <typename Message>
  void send(MessageType type, const Message& message) {
    channel_.send(TrafficClass::Control, type, encode(message));
  }

  // --- receiver_frames.cpp
  void handle_begin(const EpochBegin& begin);
  Status may_begin(const EpochBegin& begin) const;
  void begin_direct(const EpochBegin& begin);
  void begin_staged(const EpochBegin& begin);
  void start_current(const EpochBegin& begin);
  void resume_current(const EpochBegin& begin);
  void handle_data(Bytes message);
  void frame_decoded(const std::shared_ptr<ArrivedFrame>& frame);
  void drop_frame(const ArrivedFrame& frame);
  void read_references(const std::shared_ptr<ArrivedFrame>& frame);
  void references_resolved(const std::shared_ptr<ArrivedFrame>& frame);
  void store_frame(const std::shared_ptr<ArrivedFrame>& frame);
  void frame_written(const ReceivedFrame& written, uint64_t epoch, Errno error);
  void advance();
  void maybe_segment();
  void handle_end(const EpochEnd& end);
  void handle_abandon(const EpochAbandon& abandon);
  void give_up(uint64_t epoch, ErrorKind kind, const std::string& reason);
  void note_trouble(const std::string& reason);
  bool goes_direct(const EpochBegin& begin) const;

  // --- receiver_commit.cpp
  bool all_arrived() const;
  bool commit_ready() const;
  void commit();
  void apply_staged(bool consistent, Done done);
  void apply_pass(bool consistent, Done done);
  void apply_failed(const Error& error, bool consistent, const Done& done);
  void finish_epoch(bool consistent, Done done);
  void clean_tracking(size_t index, Done done);
  void save_applied(bool consistent, Done done);
  void hold_guest_reads(std::function<void()> done);
  void release_guest_reads();
  void mark_inconsistent(Done done);
  void acknowledge(uint64_t epoch, CopyQuality quality);
  void handle_verify(const VerifyRequest& request);

  Executor& executor_;
  GroupChannel& channel_;
  ReplicaState& state_;
  StagingArea staging_;
  const std::vector<ReplicaVolume> volumes_;
  const ReceiverOptions options_;
  const ReceiverEvents events_;
  std::shared_ptr<EpochDecoder> decoder_;  // a new one per connection; a job of the old one keeps it alive

  std::deque<std::pair<MessageType, Bytes>> queue_;
  uint64_t queued_bytes_ = 0;
  bool busy_ = false;
  bool opened_ = false;
  bool closing_ = false;
  bool broken_ = false;  // until the connection is dropped
  bool connected_ = false;
  uint32_t connection_ = 0;
  Done close_done_;

  std::optional<ReceivedEpoch> current_;
  size_t writing_ = 0;  // frames
  Task written_task_;   // of when_written()
  bool flushing_ = false;
  bool foreign_data_ = false;
  bool diverged_ = false;
  bool replaced_ = false;  // a copy by the record, but a file is not the one that we left; then also diverged_
  bool applying_ = false;
  bool half_applied_ = false;  // a committed epoch is in the files in part, or not recorded
  std::string reason_;
  Nanoseconds reason_since_ = 0;
  std::optional<Nanoseconds> source_paused_since_;  // not paused, as far as is known

  uint64_t received_ = 0;  // body bytes since the connection came up, as are the next two
  uint64_t consumed_ = 0;
  uint64_t granted_ = 0;
  Nanoseconds rate_since_ = 0;
  uint64_t rate_bytes_ = 0;
  uint64_t rate_ = 0;  // body bytes per second
  ReceiverStatus totals_;

  Timer segment_timer_;
  Timer retry_timer_;
  Alive alive_;
};

}  // namespace vmferry
