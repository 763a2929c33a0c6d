// SPDX-License-Identifier: Apache-2.0
//
// Turns what was read back into the message that travels: classifies blocks, chooses references, hashes, compresses.
//
// Flow: FrameReader fills a FrameJob; Sender hands jobs to encode() on a CPU worker, one at a time and in order,
// because index and compression history depend on the order; the payload goes to the channel. Threads: encode() on a
// worker; everything else only while no encode() runs (Sender sees to it).
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "engine/delta/session_index.h"
#include "engine/delta/stream_codec.h"
#include "netproto/repl/epoch_messages.h"

namespace vmferry {

// A piece of one frame: data at job.data[data_offset ...], or known to be a hole and not read.
struct FramePiece {
  uint16_t volume = 0;
  ByteRange range;
  bool hole = false;
  size_t data_offset = 0;
};

struct FrameJob {
  // What to send
  uint64_t epoch = 0;
  uint64_t frame = 0;
  uint64_t heals = 0;
  bool urgent = false;               // stream
  bool literal_only = false;         // a healing frame
  bool fuzzy = false;                // read after the guest wrote
  uint64_t reference_frame_max = 0;  // blocks sent in frames up to this one are at the copy when this one arrives
  std::vector<FramePiece> pieces;
  Bytes data;

  // Result
  Bytes payload;  // EpochData
  uint32_t body_size = 0;
  uint64_t zero_bytes = 0;
  uint64_t literal_bytes = 0;
  uint64_t reference_bytes = 0;

  // Largest body that the pieces can make; what credit has to allow before the frame is encoded.
  uint64_t body_size_bound() const;
};

// At most this many pieces in a frame: each hole is one run and each 4 KiB of data at most one.
inline constexpr size_t kPiecesPerFrameMax = 2048;

class EpochEncoder {
 public:
  struct Options {
    delta::StreamCodecOptions codec;
    int urgent_window_log = 23;
    uint64_t index_bytes_max = 64U << 20;
    uint64_t group_bytes = 0;
  };
  explicit EpochEncoder(const Options& options);

  void encode(FrameJob& job);

  // A new connection: fresh histories, and the index without what may not have arrived after `frame`.
  void restart(uint64_t frame);
  void drop_after(uint64_t frame) { index_.drop_after(frame); }
  // The copy is replaced as a whole: nothing is known of what it holds.
  void forget_all() { index_.clear(); }
  uint64_t known_bytes(uint16_t volume, ByteRange range) const;  // whole blocks, from the beginning on
  // Blocks from `offset` on that the copy is known to hold. How many of them are known now.
  size_t learn(uint16_t volume, uint64_t offset, const std::vector<delta::Fingerprint>& blocks);
  size_t index_blocks_max() const { return index_.blocks_max(); }
  // The peer did not confirm a reference. Too often: no more references in this session.
  void note_mismatch();
  uint64_t mismatches() const { return mismatches_; }

 private:
  struct Stream {
    uint32_t number;
    delta::StreamCompressor compressor;
  };
  Stream& stream(bool urgent);
  void add_data(FrameJob& job, const FramePiece& piece);
  void add_run(FrameRun run);
  uint64_t reference_blocks(const FrameJob& job, size_t index, size_t count, delta::BlockPlace& source) const;

  const Options options_;
  delta::SessionIndex index_;
  std::optional<Stream> bulk_;
  std::optional<Stream> urgent_;
  uint32_t stream_next_ = 2;  // even: bulk, odd: urgent
  uint64_t mismatches_ = 0;

  // Scratch of one encode(), kept for its capacity.
  std::vector<delta::Fingerprint> prints_;
  FrameBody body_;
  Bytes literals_;
  Bytes body_bytes_;
  Bytes coded_;
  std::optional<Sha256Stream> references_;
};

}  // namespace vmferry
