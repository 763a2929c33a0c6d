// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/epoch_encoder.h"

#include "engine/base/assert.h"

namespace vmferry {

using delta::BlockPlace;
using delta::kDedupBlockSize;

namespace {

// A repetition within the compressor's history costs about ten bytes there, as a reference 37 and a read at the copy:
// near ones are left to the compressor unless they are long.
constexpr size_t kNearReferenceBlocksMin = 16;
constexpr uint64_t kMismatchesMax = 1000;

}  // namespace

uint64_t FrameJob::body_size_bound() const {
  constexpr uint64_t kRunSizeMax = 29;
  return 4 + 32 + data.size() + kRunSizeMax * (pieces.size() + div_up(data.size(), kDedupBlockSize));
}

EpochEncoder::EpochEncoder(const Options& options)
    : options_(options), index_(options.index_bytes_max, options.group_bytes) {}

void EpochEncoder::restart(uint64_t frame) {
  bulk_.reset();
  urgent_.reset();
  index_.drop_after(frame);
}

uint64_t EpochEncoder::known_bytes(uint16_t volume, ByteRange range) const {
  uint64_t bytes = 0;
  for (BlockPlace place(volume, range.offset); bytes + kDedupBlockSize <= range.length && index_.sent(place);
       place = place.next()) {
    bytes += kDedupBlockSize;
  }
  return bytes;
}

size_t EpochEncoder::learn(uint16_t volume, uint64_t offset, const std::vector<delta::Fingerprint>& blocks) {
  size_t learnt = 0;
  BlockPlace place(volume, offset);
  for (const delta::Fingerprint content : blocks) {
    learnt += index_.learn(place, content) ? 1U : 0U;
    place = place.next();
  }
  return learnt;
}

void EpochEncoder::note_mismatch() {
  ++mismatches_;
}

EpochEncoder::Stream& EpochEncoder::stream(bool urgent) {
  auto& slot = urgent ? urgent_ : bulk_;
  if (!slot) {
    delta::StreamCodecOptions codec = options_.codec;
    if (urgent) codec.window_log = std::min(codec.window_log, options_.urgent_window_log);
    slot.emplace(Stream{stream_next_ + (urgent ? 1U : 0U), delta::StreamCompressor(codec)});
    stream_next_ += 2;
  }
  return *slot;
}

// Appends to the last run where it continues it.
void EpochEncoder::add_run(FrameRun run) {
  if (!body_.runs.empty()) {
    FrameRun& last = body_.runs.back();
    const bool continues = last.kind == run.kind && last.volume == run.volume && last.range.end() == run.range.offset;
    if (continues &&
        (run.kind != RunKind::Reference ||
         (last.source_volume == run.source_volume && last.source_offset + last.range.length == run.source_offset))) {
      last.range.length += run.range.length;
      return;
    }
  }
  body_.runs.push_back(run);
}

// How many blocks from prints_[index] the copy holds contiguously elsewhere; 0 when a reference does not pay.
uint64_t EpochEncoder::reference_blocks(const FrameJob& job, size_t index, size_t count, BlockPlace& source) const {
  if (job.literal_only || mismatches_ > kMismatchesMax) return 0;
  const auto found = index_.find(prints_[index]);
  if (!found || found->frame > job.reference_frame_max) return 0;
  source = found->place;
  uint64_t blocks = 1;
  for (BlockPlace place = source.next(); index + blocks < count; ++blocks, place = place.next()) {
    if (prints_[index + blocks] == delta::kZeroFingerprint) break;
    const auto sent = index_.sent(place);
    if (!sent || sent->content != prints_[index + blocks] || sent->frame > job.reference_frame_max) break;
  }
  const uint64_t near_frames = (uint64_t{1} << options_.codec.window_log) / kFrameLiteralMax / 2;
  const bool near = !job.urgent && found->frame != 0 && found->frame + near_frames > job.frame;
  return blocks >= (near ? kNearReferenceBlocksMin : 1) ? blocks : 0;
}

void EpochEncoder::add_data(FrameJob& job, const FramePiece& piece) {
  const ByteSpan data = ByteSpan(job.data).subspan(piece.data_offset, piece.range.length);
  delta::scan_blocks(data, prints_);
  const size_t whole_blocks = data.size() / kDedupBlockSize;  // a short last block of the device is never referenced
  for (size_t i = 0; i < prints_.size();) {
    const uint64_t at = i * uint64_t{kDedupBlockSize};
    FrameRun run{.kind = RunKind::Literal, .volume = piece.volume, .range = {piece.range.offset + at, 0}};
    uint64_t blocks = 1;
    BlockPlace source;
    if (prints_[i] == delta::kZeroFingerprint) {
      run.kind = RunKind::Zero;
    } else if (const uint64_t found = i < whole_blocks ? reference_blocks(job, i, whole_blocks, source) : 0;
               found > 0) {
      run.kind = RunKind::Reference;
      run.source_volume = source.volume();
      run.source_offset = source.offset();
      blocks = found;
    }
    run.range.length = std::min<uint64_t>(blocks * kDedupBlockSize, data.size() - at);
    const ByteSpan bytes = data.subspan(at, run.range.length);
    switch (run.kind) {
      case RunKind::Zero:
        job.zero_bytes += bytes.size();
        break;
      case RunKind::Literal:
        job.literal_bytes += bytes.size();
        literals_.insert(literals_.end(), bytes.begin(), bytes.end());
        break;
      case RunKind::Reference:
        job.reference_bytes += bytes.size();
        if (!references_) references_.emplace();
        references_->update(bytes);
        break;
    }
    add_run(run);
    // What the copy did not confirm is not offered again: the place does not hold it.
    if (const auto stale = job.literal_only ? index_.find(prints_[i]) : std::nullopt) {
      index_.record(stale->place, delta::kZeroFingerprint, 0);
    }
    for (uint64_t b = 0; b < blocks; ++b) {
      const bool whole = i + b < whole_blocks;
      index_.record({piece.volume, piece.range.offset + (i + b) * kDedupBlockSize},
                    whole ? prints_[i + b] : delta::kZeroFingerprint, job.frame);
    }
    i += blocks;
  }
}

void EpochEncoder::encode(FrameJob& job) {
  VF_ASSERT(!job.pieces.empty() && job.pieces.size() <= kPiecesPerFrameMax && job.data.size() <= kFrameLiteralMax);
  body_ = {};
  literals_.clear();
  body_bytes_.clear();
  coded_.clear();
  references_.reset();
  for (const auto& piece : job.pieces) {
    if (piece.hole) {
      job.zero_bytes += piece.range.length;
      index_.forget(piece.volume, piece.range);
      add_run({.kind = RunKind::Zero, .volume = piece.volume, .range = piece.range});
    } else {
      add_data(job, piece);
    }
  }
  if (references_) body_.references = references_->digest();
  body_.literals = literals_;
  append_frame_body(body_, body_bytes_);
  VF_ASSERT(body_bytes_.size() <= job.body_size_bound());

  Stream& stream_used = stream(job.urgent);
  stream_used.compressor.compress(body_bytes_, coded_);
  job.body_size = static_cast<uint32_t>(body_bytes_.size());
  job.payload = vmferry::encode(EpochData{.epoch = job.epoch,
                                          .frame = job.frame,
                                          .heals = job.heals,
                                          .stream = stream_used.number,
                                          .fuzzy = job.fuzzy,
                                          .body_size = job.body_size,
                                          .body_hash = xxh3_128(body_bytes_),
                                          .coded = coded_});
}

}  // namespace vmferry
