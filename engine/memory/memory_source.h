// SPDX-License-Identifier: Apache-2.0
//
// Takes QEMU's migration stream and carries it to the peer: hashed, compressed, repeated after a cut, never altered.
//
// Flow: QEMU -> ByteStream -> chunks (<= 256 KiB) -> CPU worker (hash, compress; one job at a time, so the order
// holds) -> GroupChannel, class Memory -> MemorySink. Chunks stay here until the sink has them in memory.
// The brake: QEMU is not read while more than MemoryWindow::limit() is under way, or while held. Nothing else stops it.
// Threads: the group's executor; callbacks are posted, never inline.
#pragma once

#include <deque>
#include <functional>
#include <memory>

#include "engine/base/hash.h"
#include "engine/delta/stream_codec.h"
#include "engine/memory/memory_window.h"
#include "engine/replicate/peer_channel.h"
#include "engine/runtime/executor.h"
#include "engine/runtime/stream.h"
#include "netproto/qemu/migration_stream.h"
#include "netproto/repl/memory_messages.h"

namespace vmferry {

struct MemorySourceOptions {
  Id128 attempt{};
  Nanoseconds downtime_limit = 300 * kMillisecond;
  bool held = false;  // begin with the brake on
  int compression_level = 3;
  int window_log = 24;  // both ends must agree: kMemoryWindowLogMax is what a sink accepts
};
inline constexpr int kMemoryWindowLogMax = 24;  // 16 MiB of history at each end

struct MemorySourceFigures {
  uint64_t raw_bytes = 0;        // read from QEMU
  uint64_t wire_bytes = 0;       // payload given to the link, repetitions included
  uint64_t delivered_bytes = 0;  // raw, acknowledged as given to the destination QEMU
  uint64_t queued_bytes = 0;     // raw_bytes - delivered_bytes
  uint64_t rate = 0;             // raw bytes per second recently delivered
  uint64_t limit_bytes = 0;      // of queued_bytes at present
  MigrationStreamFigures stream;
};

class MemorySource final : private StreamHandler {
 public:
  struct Events {
    std::function<void()> ended;        // QEMU closed its end; the whole stream and its hash were sent once
    std::function<void(Error)> failed;  // can never be completed; the source does nothing more
  };

  MemorySource(Executor& executor, GroupChannel& channel, std::unique_ptr<ByteStream> from_qemu,
               const MemorySourceOptions& options, Events events);
  ~MemorySource();  // closes QEMU's stream

  void hold(bool held);
  bool held() const { return held_; }
  MemorySourceFigures figures() const;

  // The owner routes these; messages of other attempts are ignored.
  void channel_connected();
  void channel_disconnected();
  void channel_writable() { start_job(); }
  void handle_ack(ByteSpan payload);

 private:
  struct Chunk {
    uint64_t offset = 0;
    std::shared_ptr<const Bytes> raw;
    uint64_t end() const { return offset + raw->size(); }
  };
  struct Coding;  // what a worker job owns: compressor, hash

  void stream_readable(ByteSpan bytes) override;
  void stream_writable() override {}
  void stream_closed(Errno error) override;
  void apply_brake();
  void start_job();
  void job_done(const Chunk& chunk, uint32_t generation, Bytes coded);
  void send_end();
  void ask();
  void fail_with_error(Error error);

  Executor& executor_;
  GroupChannel& channel_;
  std::unique_ptr<ByteStream> from_qemu_;
  MemorySourceOptions options_;
  Events events_;
  MemoryWindow window_;
  MigrationStreamParser parser_;

  Bytes filling_;             // accepted, not yet a chunk
  std::deque<Chunk> chunks_;  // from received_ on
  size_t next_ = 0;           // index in chunks_ of the next to send
  uint64_t accepted_ = 0;     // raw bytes read from QEMU
  uint64_t received_ = 0;     // the sink has these
  uint64_t delivered_ = 0;
  uint64_t wire_bytes_ = 0;
  uint32_t generation_ = 0;
  bool resumed_ = false;  // the sink said where to go on in this connection
  bool job_running_ = false;
  bool held_ = false;
  bool qemu_ended_ = false;
  bool end_sent_ = false;  // in this connection
  bool end_reported_ = false;
  bool failed_ = false;
  std::shared_ptr<Coding> coding_;
  Sha256Digest digest_{};
  bool digest_made_ = false;
  Alive alive_;
};

}  // namespace vmferry
