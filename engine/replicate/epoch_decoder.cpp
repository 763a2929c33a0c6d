// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/epoch_decoder.h"

namespace vmferry {

namespace {

void make_image(ArrivedFrame& frame) {
  if (!frame.staged) return;
  const StagedFrame staged{.frame = frame.header.frame,
                           .heals = frame.header.heals,
                           .unresolved = frame.unresolved,
                           .fuzzy = frame.header.fuzzy};
  frame.image = StagingArea::prepare_frame(frame.header.epoch, frame.session, staged, frame.body);
}

}  // namespace

Result<EpochDecoder::Stream*> EpochDecoder::stream(uint32_t number) {
  auto& slot = streams_[number % 2];
  if (slot && number < slot->number) {
    return fail(ErrorKind::Corrupt, "frame of compression stream {} after stream {}", number, slot->number);
  }
  if (!slot || number > slot->number) slot.emplace(Stream{number, delta::StreamDecompressor(limits_)});
  return &*slot;
}

void EpochDecoder::decode(ArrivedFrame& frame) {
  auto found = stream(frame.header.stream);
  if (!found) {
    frame.status = tl::unexpected<Error>(found.error());
    return;
  }
  frame.raw.reserve(frame.header.body_size + 1);
  frame.status = (*found)->decompressor.decompress(frame.header.coded, frame.raw);
  if (!frame.status) return;
  if (frame.raw.size() != frame.header.body_size || xxh3_128(frame.raw) != frame.header.body_hash) {
    frame.status = fail(ErrorKind::Corrupt, "data frame {}: its hash does not match", frame.header.frame);
    return;
  }
  auto body = decode_frame_body(frame.raw);
  if (!body) {
    frame.status = tl::unexpected<Error>(body.error());
    return;
  }
  frame.body = std::move(*body);
  for (const auto& run : frame.body.runs) {
    if (run.kind == RunKind::Reference) frame.references.push_back(run);
  }
  if (frame.references.empty()) make_image(frame);
}

void EpochDecoder::resolve(ArrivedFrame& frame) {
  frame.unresolved = sha256(frame.referenced) != frame.body.references;
  std::vector<FrameRun> runs;
  runs.reserve(frame.body.runs.size());
  Bytes literals;
  literals.reserve(frame.body.literals.size() + frame.referenced.size());
  size_t literal_at = 0;
  size_t reference_at = 0;
  for (FrameRun run : frame.body.runs) {
    const size_t length = static_cast<size_t>(run.range.length);
    if (run.kind == RunKind::Literal) {
      const ByteSpan bytes = frame.body.literals.subspan(literal_at, length);
      literals.insert(literals.end(), bytes.begin(), bytes.end());
      literal_at += length;
    } else if (run.kind == RunKind::Reference) {
      const ByteSpan bytes = ByteSpan(frame.referenced).subspan(reference_at, length);
      reference_at += length;
      if (!frame.unresolved) {
        literals.insert(literals.end(), bytes.begin(), bytes.end());
        run.kind = RunKind::Literal;
        run.source_volume = 0;
        run.source_offset = 0;
      }
    }
    runs.push_back(run);
  }
  frame.raw = std::move(literals);
  frame.body.runs = std::move(runs);
  frame.body.literals = frame.raw;
  make_image(frame);
}

}  // namespace vmferry
