// SPDX-License-Identifier: Apache-2.0
//
// Compresses the frames of one connection with one shared history: each frame can be decoded as soon as it arrives,
// and yet finds its repetitions in everything sent within the window before it.
//
// One zstd stream with long-distance matching that is flushed, never ended, at each frame. Frames that do not compress
// are stored and left out of the history, so that a film costs neither CPU nor window. Both ends start anew together
// (a new connection, a new pair of objects): a frame decodes only after exactly the frames that were coded before it.
//
// Coded frame: u8 method (0 stored, 1 zstd), le32 raw size, then the bytes. docs/replication-protocol.md, "Epochs".
// Threads: an object is used by one thread at a time (a CPU worker; frames in order).
#pragma once

#include <cstdint>
#include <memory>

#include "engine/base/bytes.h"
#include "engine/base/result.h"

namespace vmferry::delta {

// Both ends have the same window; the decoder refuses a stream that asks for more. Memory: the compressor takes
// 2^window_log + about 20 MiB, the decompressor 2^window_log, both touched only as the history fills.
struct StreamCodecOptions {
  int level = 3;                     // zstd level, compressor only
  int window_log = 27;               // 10..27: history of 2^window_log bytes
  uint32_t raw_size_max = 4U << 20;  // of one frame; asserted when coding, checked when decoding
};

struct StreamCodecTotals {
  uint64_t raw_bytes = 0;
  uint64_t coded_bytes = 0;
  uint64_t frames = 0;
  uint64_t stored_frames = 0;  // did not compress
};

inline constexpr size_t kCodedFrameHeaderSize = 5;

class StreamCompressor {
 public:
  explicit StreamCompressor(const StreamCodecOptions& options);
  ~StreamCompressor();
  StreamCompressor(StreamCompressor&&) noexcept;
  StreamCompressor& operator=(StreamCompressor&&) noexcept;

  // Appends the coded frame of `raw` (1 byte at least) to `out`. Cannot fail: without memory for the history frames
  // are stored.
  void compress(ByteSpan raw, Bytes& out);
  const StreamCodecTotals& totals() const { return totals_; }

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  StreamCodecTotals totals_;
};

class StreamDecompressor {
 public:
  explicit StreamDecompressor(const StreamCodecOptions& options);
  ~StreamDecompressor();
  StreamDecompressor(StreamDecompressor&&) noexcept;
  StreamDecompressor& operator=(StreamDecompressor&&) noexcept;

  // Appends the raw bytes of one coded frame, exactly as many as its header says, to `out`. `frame` is the whole
  // frame. After an error (Corrupt, LimitExceeded) the stream is lost: reconnect.
  Status decompress(ByteSpan frame, Bytes& out);
  const StreamCodecTotals& totals() const { return totals_; }

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  StreamCodecTotals totals_;
};

}  // namespace vmferry::delta
