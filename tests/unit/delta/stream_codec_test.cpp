// SPDX-License-Identifier: Apache-2.0
#include "engine/delta/stream_codec.h"

#include <gtest/gtest.h>

#include "engine/base/random.h"

namespace vmferry::delta {
namespace {

Bytes noise(size_t size, uint64_t seed) {
  Random random(seed);
  Bytes out(size);
  for (auto& byte : out) byte = static_cast<uint8_t>(random.next());
  return out;
}

Bytes text(size_t size, uint64_t seed) {
  Random random(seed);
  Bytes out(size);
  for (auto& byte : out) byte = static_cast<uint8_t>('a' + random.below(6));
  return out;
}

constexpr StreamCodecOptions kSmall{.level = 3, .window_log = 20, .raw_size_max = 1U << 20};

TEST(StreamCodec, FramesComeBackInOrderAndMixedWithStoredOnes) {
  // Otherwise a stored frame would leave the two histories apart and every later frame would be garbage.
  StreamCompressor compressor(kSmall);
  StreamDecompressor decompressor(kSmall);
  Random random(7);
  for (int i = 0; i < 60; ++i) {
    const size_t size = 1 + random.below(200'000);
    const Bytes raw = random.chance(1, 3) ? noise(size, random.next()) : text(size, random.next());
    Bytes coded;
    compressor.compress(raw, coded);
    Bytes back{0xee};
    ASSERT_TRUE(decompressor.decompress(coded, back)) << i;
    ASSERT_EQ(back.size(), raw.size() + 1);
    ASSERT_TRUE(std::equal(raw.begin(), raw.end(), back.begin() + 1)) << i;
  }
  EXPECT_GT(compressor.totals().stored_frames, 0U);
  EXPECT_LT(compressor.totals().stored_frames, compressor.totals().frames);
  EXPECT_EQ(compressor.totals().coded_bytes, decompressor.totals().coded_bytes);
  EXPECT_EQ(compressor.totals().raw_bytes, decompressor.totals().raw_bytes);
}

TEST(StreamCodec, RepetitionAcrossFramesCostsAlmostNothing) {
  // Otherwise the history would be lost at every frame and a connection would compress no better than single blocks.
  StreamCompressor compressor(kSmall);
  const Bytes raw = text(300'000, 3);
  Bytes first;
  Bytes second;
  compressor.compress(raw, first);
  compressor.compress(raw, second);
  EXPECT_GT(first.size(), 80'000U);
  EXPECT_LT(second.size(), 2'000U);
}

TEST(StreamCodec, IncompressibleFrameIsStoredWithFiveBytesMore) {
  // Otherwise encrypted disks would cost CPU, window and even bytes.
  StreamCompressor compressor(kSmall);
  const Bytes raw = noise(1 << 20, 5);
  Bytes coded;
  compressor.compress(raw, coded);
  EXPECT_EQ(coded.size(), raw.size() + kCodedFrameHeaderSize);
  EXPECT_EQ(compressor.totals().stored_frames, 1U);
}

TEST(StreamCodec, HighEntropyDataThatRepeatsWithinItselfIsStillCompressed) {
  // The byte histogram alone would call it incompressible.
  StreamCompressor compressor(kSmall);
  Bytes raw;
  const Bytes piece = noise(8192, 9);
  for (int i = 0; i < 32; ++i) raw.insert(raw.end(), piece.begin(), piece.end());
  Bytes coded;
  compressor.compress(raw, coded);
  EXPECT_LT(coded.size(), raw.size() / 8);
}

TEST(StreamCodec, TruncationAtEveryLengthIsRefusedAndLosesTheStream) {
  // A shortened frame must neither decode nor leave a decoder that goes on with a wrong history.
  StreamCompressor compressor(kSmall);
  Bytes coded;
  compressor.compress(text(3000, 1), coded);
  for (size_t size = 0; size < coded.size(); ++size) {
    StreamDecompressor decompressor(kSmall);
    Bytes out;
    ASSERT_FALSE(decompressor.decompress(ByteSpan(coded).first(size), out)) << size;
    ASSERT_TRUE(out.empty());
    ASSERT_FALSE(decompressor.decompress(coded, out)) << "after an error the stream is lost";
  }
}

TEST(StreamCodec, DeclaredSizeIsALimitNotAHint) {
  // A bomb: few bytes that unpack to many must stop at what the header said, and the header at the limit.
  StreamCompressor compressor(kSmall);
  Bytes coded;
  compressor.compress(Bytes(900'000, 'x'), coded);
  ASSERT_LT(coded.size(), 1000U);
  for (const uint32_t declared : {0U, 1U, 899'999U, 900'001U, (1U << 20) + 1, 0xffffffffU}) {
    Bytes forged = coded;
    for (size_t i = 0; i < 4; ++i) forged[1 + i] = static_cast<uint8_t>(declared >> (8 * i));
    StreamDecompressor decompressor(kSmall);
    Bytes out;
    EXPECT_FALSE(decompressor.decompress(forged, out)) << declared;
    EXPECT_TRUE(out.empty());
  }
}

TEST(StreamCodec, WindowLargerThanAgreedIsRefused) {
  // Otherwise the peer, not the configuration, would choose how much memory the decoder takes.
  StreamCompressor compressor({.level = 3, .window_log = 22, .raw_size_max = 1U << 20});
  Bytes coded;
  compressor.compress(text(100'000, 1), coded);
  StreamDecompressor decompressor(kSmall);
  Bytes out;
  EXPECT_FALSE(decompressor.decompress(coded, out));
}

TEST(StreamCodec, UnknownMethodAndWrongStoredLengthAreRefused) {
  // A later format must be refused, not guessed at.
  StreamDecompressor decompressor(kSmall);
  Bytes out;
  EXPECT_FALSE(decompressor.decompress(Bytes{2, 1, 0, 0, 0, 'x'}, out));
  EXPECT_FALSE(StreamDecompressor(kSmall).decompress(Bytes{0, 2, 0, 0, 0, 'x'}, out));
  EXPECT_FALSE(StreamDecompressor(kSmall).decompress(Bytes{0, 1, 0, 0, 0, 'x', 'y'}, out));
  EXPECT_TRUE(StreamDecompressor(kSmall).decompress(Bytes{0, 1, 0, 0, 0, 'x'}, out));
  EXPECT_EQ(out, Bytes{'x'});
}

}  // namespace
}  // namespace vmferry::delta
