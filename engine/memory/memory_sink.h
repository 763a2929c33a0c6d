// SPDX-License-Identifier: Apache-2.0
//
// Receives the memory stream and feeds the destination QEMU: in order, decompressed, acknowledged, proved by its hash.
//
// Flow: GroupChannel -> MemoryData -> CPU worker (decompress, hash; one job at a time) -> ByteStream -> QEMU.
// The peer is authenticated but not trusted: frames are bounded, and a source that ignores the acknowledgements is cut
// off at kBacklogMax. Threads: the group's executor; callbacks are posted, never inline.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>

#include "engine/base/hash.h"
#include "engine/delta/stream_codec.h"
#include "engine/replicate/peer_channel.h"
#include "engine/runtime/executor.h"
#include "engine/runtime/stream.h"
#include "netproto/repl/memory_messages.h"

namespace vmferry {

class MemorySink final : private StreamHandler {
 public:
  // Received and not yet given to QEMU. Twice what a source sends ahead (MemoryWindow::kLimitMax).
  static constexpr uint64_t kBacklogMax = 32_MiB;

  struct Events {
    std::function<void(bool hash_equal)> complete;  // QEMU was given every byte
    std::function<void(Error)> failed;              // the sink does nothing more
  };

  MemorySink(Executor& executor, GroupChannel& channel, std::unique_ptr<ByteStream> to_qemu, const Id128& attempt,
             Events events);
  ~MemorySink();  // closes QEMU's stream

  uint64_t received_bytes() const { return received_; }
  uint64_t delivered_bytes() const { return delivered(); }

  // The owner routes these; messages of other attempts are ignored.
  void channel_connected();
  void channel_disconnected() {}
  void handle_data(ByteSpan payload);
  void handle_end(ByteSpan payload);

 private:
  struct Decoding;  // what a worker job owns: decompressor, hash
  struct Frame {
    uint32_t generation = 0;
    uint64_t offset = 0;
    Bytes coded;
  };

  void stream_readable(ByteSpan) override {}  // QEMU says nothing here (return-path is off)
  void stream_writable() override;
  void stream_closed(Errno error) override;
  void start_job();
  void job_done(uint64_t offset, Result<Bytes> raw);
  void finish_if_complete();
  void progress();
  void send_ack();
  uint64_t delivered() const;
  void fail_with_error(Error error);

  Executor& executor_;
  GroupChannel& channel_;
  std::unique_ptr<ByteStream> to_qemu_;
  Id128 attempt_;
  Events events_;
  std::deque<Frame> frames_;  // received, not yet decompressed
  uint64_t frames_bytes_ = 0;
  uint64_t received_ = 0;  // raw bytes decompressed and queued for QEMU
  uint64_t acked_delivered_ = 0;
  bool job_running_ = false;
  bool qemu_closed_ = false;
  bool complete_ = false;
  bool failed_ = false;
  std::optional<MemoryEnd> end_;
  std::shared_ptr<Decoding> decoding_;
  Timer ack_timer_;
  Alive alive_;
};

}  // namespace vmferry
