// SPDX-License-Identifier: Apache-2.0
#include "engine/delta/stream_codec.h"

#include <zstd.h>

#include <array>
#include <cmath>

#include "engine/base/assert.h"

namespace vmferry::delta {

namespace {

enum class Method : uint8_t { Stored = 0, Zstd = 1 };

constexpr size_t kProbeSize = 16 * 1024;
constexpr int kWindowLogMin = 10;
constexpr int kWindowLogMax = 27;

void append_header(Method method, size_t raw_size, Bytes& out) {
  ByteWriter(out).u8(static_cast<uint8_t>(method)).le32(static_cast<uint32_t>(raw_size));
}

// Bits per byte of the byte histogram of a sample of `raw`: every 64th run of 64 bytes, at least 16 KiB of it. Code and
// text are below 7; compressed and encrypted data above 7.95.
double sampled_entropy(ByteSpan raw) {
  std::array<uint32_t, 256> counts{};
  constexpr size_t kRun = 64;
  const size_t stride = raw.size() <= kProbeSize * 4 ? kRun : raw.size() / (kProbeSize * 4 / kRun);
  size_t total = 0;
  for (size_t at = 0; at < raw.size(); at += stride) {
    const size_t end = std::min(raw.size(), at + kRun);
    for (size_t i = at; i < end; ++i) ++counts[raw[i]];
    total += end - at;
  }
  double bits = 0;
  for (const uint32_t count : counts) {
    if (count != 0) bits -= count * std::log2(static_cast<double>(count) / static_cast<double>(total));
  }
  return bits / static_cast<double>(total);
}

}  // namespace

struct StreamCompressor::Impl {
  StreamCodecOptions options;
  ZSTD_CCtx* stream = nullptr;
  ZSTD_CCtx* probe = nullptr;
  Bytes probe_out;
  bool broken = false;  // no memory: stored frames only, from now on

  explicit Impl(const StreamCodecOptions& o) : options(o) {
    VF_ASSERT(o.window_log >= kWindowLogMin && o.window_log <= kWindowLogMax);
    probe = ZSTD_createCCtx();
    stream = ZSTD_createCCtx();
    broken = probe == nullptr || stream == nullptr;
    if (broken) return;
    set(ZSTD_c_compressionLevel, o.level);
    set(ZSTD_c_windowLog, o.window_log);
    set(ZSTD_c_enableLongDistanceMatching, 1);
    set(ZSTD_c_checksumFlag, 0);  // every frame is hashed by its user, and the stream never ends
    set(ZSTD_c_contentSizeFlag, 0);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    ZSTD_freeCCtx(stream);
    ZSTD_freeCCtx(probe);
  }

  void set(ZSTD_cParameter parameter, int value) {
    if (ZSTD_isError(ZSTD_CCtx_setParameter(stream, parameter, value)) != 0) broken = true;
  }

  // High entropy alone would also drop data that repeats over long distances within itself, so a fast trial on the
  // middle of the frame has the last word. Repetitions of whole blocks were already turned into references.
  bool looks_incompressible(ByteSpan raw) {
    constexpr double kEntropyHigh = 7.9;
    if (raw.size() < 1024 || sampled_entropy(raw) < kEntropyHigh) return false;
    const size_t size = std::min(raw.size(), kProbeSize * 4);
    const ByteSpan sample = raw.subspan((raw.size() - size) / 2, size);
    probe_out.resize(ZSTD_compressBound(size));
    const size_t coded = ZSTD_compressCCtx(probe, probe_out.data(), probe_out.size(), sample.data(), size, 1);
    return ZSTD_isError(coded) != 0 || coded >= size - size / 32;
  }

  // Appends one flushed piece of the stream; false when zstd failed (out of memory).
  bool append_flushed(ByteSpan raw, Bytes& out) {
    ZSTD_inBuffer in{raw.data(), raw.size(), 0};
    const size_t begin = out.size();
    size_t used = begin;
    size_t room = ZSTD_compressBound(raw.size()) + 64;
    while (true) {
      out.resize(used + room);
      ZSTD_outBuffer target{out.data() + used, room, 0};
      const size_t left = ZSTD_compressStream2(stream, &target, &in, ZSTD_e_flush);
      used += target.pos;
      if (ZSTD_isError(left) != 0) {
        out.resize(begin);
        return false;
      }
      if (left == 0 && in.pos == in.size) break;
      room = ZSTD_CStreamOutSize();
    }
    out.resize(used);
    return true;
  }
};

StreamCompressor::StreamCompressor(const StreamCodecOptions& options) : impl_(std::make_unique<Impl>(options)) {}
StreamCompressor::~StreamCompressor() = default;
StreamCompressor::StreamCompressor(StreamCompressor&&) noexcept = default;
StreamCompressor& StreamCompressor::operator=(StreamCompressor&&) noexcept = default;

void StreamCompressor::compress(ByteSpan raw, Bytes& out) {
  VF_ASSERT(!raw.empty() && raw.size() <= impl_->options.raw_size_max);
  const size_t begin = out.size();
  bool coded = false;
  if (!impl_->broken && !impl_->looks_incompressible(raw)) {
    append_header(Method::Zstd, raw.size(), out);
    coded = impl_->append_flushed(raw, out);
    if (!coded) {
      // What zstd already took is lost to the decoder: the history cannot be used again.
      impl_->broken = true;
      out.resize(begin);
    }
  }
  if (!coded) {
    append_header(Method::Stored, raw.size(), out);
    ByteWriter(out).raw(raw);
    ++totals_.stored_frames;
  }
  ++totals_.frames;
  totals_.raw_bytes += raw.size();
  totals_.coded_bytes += out.size() - begin;
}

struct StreamDecompressor::Impl {
  StreamCodecOptions options;
  ZSTD_DCtx* stream = ZSTD_createDCtx();
  bool lost = false;

  explicit Impl(const StreamCodecOptions& o) : options(o) {
    VF_ASSERT(o.window_log >= kWindowLogMin && o.window_log <= kWindowLogMax);
    lost = stream == nullptr || ZSTD_isError(ZSTD_DCtx_setParameter(stream, ZSTD_d_windowLogMax, o.window_log)) != 0;
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() { ZSTD_freeDCtx(stream); }

  Status decode(ByteSpan coded, size_t raw_size, Bytes& out) {
    const size_t begin = out.size();
    out.resize(begin + raw_size + 1);  // one more byte: a stream that holds more than its header says is seen at once
    ZSTD_inBuffer in{coded.data(), coded.size(), 0};
    ZSTD_outBuffer target{out.data() + begin, raw_size + 1, 0};
    while (in.pos < in.size || target.pos < raw_size) {
      const size_t in_before = in.pos;
      const size_t out_before = target.pos;
      const size_t hint = ZSTD_decompressStream(stream, &target, &in);
      if (ZSTD_isError(hint) != 0) {
        return fail(ErrorKind::Corrupt, "compressed frame: {}", ZSTD_getErrorName(hint));
      }
      if (hint == 0) return fail(ErrorKind::Corrupt, "compressed frame ends the stream");
      if (target.pos > raw_size) return fail(ErrorKind::Corrupt, "compressed frame holds more than {} bytes", raw_size);
      if (in.pos == in_before && target.pos == out_before) break;
    }
    if (in.pos != in.size || target.pos != raw_size) {
      return fail(ErrorKind::Corrupt, "compressed frame holds {} bytes, its header says {}", target.pos, raw_size);
    }
    out.resize(begin + raw_size);
    return {};
  }
};

StreamDecompressor::StreamDecompressor(const StreamCodecOptions& options) : impl_(std::make_unique<Impl>(options)) {}
StreamDecompressor::~StreamDecompressor() = default;
StreamDecompressor::StreamDecompressor(StreamDecompressor&&) noexcept = default;
StreamDecompressor& StreamDecompressor::operator=(StreamDecompressor&&) noexcept = default;

Status StreamDecompressor::decompress(ByteSpan frame, Bytes& out) {
  ByteReader reader(frame);
  const uint8_t method = reader.u8();
  const uint32_t raw_size = reader.le32();
  const size_t begin = out.size();
  if (impl_->lost) return fail(ErrorKind::Corrupt, "compressed stream was lost earlier");
  Status status{};
  if (!reader.ok()) {
    status = fail(ErrorKind::Corrupt, "compressed frame of {} bytes has no header", frame.size());
  } else if (raw_size == 0 || raw_size > impl_->options.raw_size_max) {
    status = fail(ErrorKind::LimitExceeded, "compressed frame of {} bytes, the limit is {}", raw_size,
                  impl_->options.raw_size_max);
  } else if (method == static_cast<uint8_t>(Method::Stored)) {
    if (reader.remaining() != raw_size) {
      status = fail(ErrorKind::Corrupt, "stored frame of {} bytes, its header says {}", reader.remaining(), raw_size);
    } else {
      ByteWriter(out).raw(reader.rest());
      ++totals_.stored_frames;
    }
  } else if (method == static_cast<uint8_t>(Method::Zstd)) {
    status = impl_->decode(reader.rest(), raw_size, out);
  } else {
    status = fail(ErrorKind::Corrupt, "compressed frame with unknown method {}", method);
  }
  if (!status) {
    impl_->lost = true;
    out.resize(begin);
    return status;
  }
  ++totals_.frames;
  totals_.raw_bytes += raw_size;
  totals_.coded_bytes += frame.size();
  return {};
}

}  // namespace vmferry::delta
