// SPDX-License-Identifier: Apache-2.0
#include "engine/track/metadata_layout.h"

#include <gtest/gtest.h>

#include "engine/base/hash.h"
#include "engine/base/random.h"

namespace vmferry::track {
namespace {

// What is on disk is a contract with every older version: a change of layout must be noticed here.
TEST(MetadataLayout, SuperblockBytesAreGolden) {
  Superblock s;
  s.active = true;
  s.baseline = Baseline::Dirty;
  s.block_size = 4096;
  s.slot_count = 512;
  s.region_size = 4U << 20;
  s.tracked_size = 1_GiB;
  s.tracked_size_previous = 512_MiB;
  s.bitmap_generation = 3;
  s.log_generation = 9;
  s.stamp = {.identity = {}, .size = 1_GiB, .modified_ns = 77};
  s.stamp.identity.bytes[0] = 0xab;
  EXPECT_EQ(to_hex(encode(s)),
            "01000100"
            "00100000"
            "00020000"
            "00004000"
            "0000004000000000"
            "0000002000000000"
            "0300000000000000"
            "0900000000000000"
            "ab000000000000000000000000000000"
            "0000004000000000"
            "4d00000000000000");
  EXPECT_EQ(decode_superblock(encode(s)).value(), s);
}

TEST(MetadataLayout, SuperblockTruncatedOrImpossibleIsRefused) {
  Superblock s;
  s.block_size = 4096;
  s.slot_count = 4096;
  s.region_size = kRegionSizeMin;
  const Bytes good = encode(s);
  ASSERT_TRUE(decode_superblock(good));
  for (size_t size = 0; size < good.size(); ++size) EXPECT_FALSE(decode_superblock(ByteSpan(good).first(size))) << size;
  Bytes longer = good;
  longer.push_back(0);
  EXPECT_FALSE(decode_superblock(longer));
  for (const size_t at : {2U, 4U, 5U, 10U, 12U}) {
    Bytes bad = good;
    bad[at] ^= 0x11;
    EXPECT_FALSE(decode_superblock(bad)) << at;
  }
}

Transaction sample(uint64_t sequence, uint32_t slots) {
  Transaction t;
  t.generation = 5;
  t.sequence = sequence;
  t.slot_count = slots;
  t.updates = {{1, 100 + sequence}};
  t.context_first = static_cast<uint32_t>((sequence - 1) % context_cycle(slots)) * kContextSlots;
  for (uint32_t slot = t.context_first; slot < std::min(slots, t.context_first + kContextSlots); ++slot) {
    t.context.push_back(slot);
  }
  return t;
}

TEST(MetadataLayout, TransactionBytesAreGolden) {
  Bytes raw(kTransactionSize);
  encode(sample(1, 8), raw);
  EXPECT_EQ(to_hex(ByteSpan(raw).first(76)),
            "564d414c"
            "01000000"
            "0500000000000000"
            "0100000000000000"
            "08000000"
            "01000000"
            "00000000"
            "08000000"
            "000000000000000000000000000000000000000000000000"
            "01000000"
            "6500000000000000");
  EXPECT_EQ(decode_transaction(raw).value(), sample(1, 8));
}

// A torn record that is believed activates nothing or forgets a region; at every byte it must be seen as torn.
TEST(MetadataLayout, TransactionTornAtEveryByteIsNotIntact) {
  Bytes older(kTransactionSize), newer(kTransactionSize);
  Transaction a = sample(1, 512), b = sample(33, 512);
  b.generation = 6;
  for (uint64_t& region : b.context) region += 1000;
  encode(a, older);
  encode(b, newer);
  for (size_t torn = 0; torn <= kTransactionSize; ++torn) {
    Bytes mixed(newer.begin(), newer.begin() + static_cast<std::ptrdiff_t>(torn));
    mixed.insert(mixed.end(), older.begin() + static_cast<std::ptrdiff_t>(torn), older.end());
    const auto decoded = decode_transaction(mixed);
    if (decoded) {
      ASSERT_TRUE(*decoded == a || *decoded == b) << torn;
    }
    if (torn > 8 && torn + 4 < kTransactionSize) {
      ASSERT_FALSE(decoded && *decoded == a && mixed != older) << torn;
    }
  }
}

// Ring with the transactions [first, last] of `slots` slots.
Bytes ring_of(uint64_t first, uint64_t last, uint32_t slots) {
  Bytes ring(kTransactionSize * kTransactionCount);
  for (uint64_t sequence = first; sequence <= last; ++sequence) {
    encode(sample(sequence, slots),
           MutableByteSpan(ring).subspan(sequence % kTransactionCount * kTransactionSize, kTransactionSize));
  }
  return ring;
}

// Recovery has to find every slot from a bounded log, whatever the last write destroyed.
TEST(RecoverLog, NewestStateSurvivesATornWriteOfTheNextTransaction) {
  for (const uint64_t last : {1U, 2U, 15U, 16U, 17U, 31U, 32U, 33U, 100U}) {
    for (const uint32_t slots : {8U, 512U, 4096U}) {
      const uint64_t first = last > kTransactionCount ? last - kTransactionCount + 1 : 1;
      Bytes ring = ring_of(first, last, slots);
      for (const size_t torn : {0U, 1U, 64U, 512U, 2048U, 4095U}) {
        const size_t at = (last + 1) % kTransactionCount * kTransactionSize;
        Bytes damaged = ring;
        for (size_t i = 0; i < torn; ++i) damaged[at + i] = static_cast<uint8_t>(0xa5 + i);
        const auto recovered = recover_log(damaged, 5, slots);
        ASSERT_TRUE(recovered) << last << ' ' << slots << ' ' << torn;
        EXPECT_EQ(recovered->sequence, last);
        EXPECT_EQ(recovered->slots[1], 100 + last);
        if (last >= context_cycle(slots)) {
          EXPECT_EQ(recovered->slots[slots - 1], slots - 1);
        }
      }
    }
  }
}

// Damage anywhere else means that active regions may be missing: that must not look like a clean recovery.
TEST(RecoverLog, DamageWithinTheLastCycleIsCorrupt) {
  const uint32_t slots = 4096;
  const uint64_t last = 40;
  const Bytes ring = ring_of(last - 31, last, slots);
  for (uint64_t sequence = last - context_cycle(slots) + 1; sequence < last; ++sequence) {
    Bytes damaged = ring;
    damaged[sequence % kTransactionCount * kTransactionSize + 100] ^= 1;
    const auto recovered = recover_log(damaged, 5, slots);
    ASSERT_FALSE(recovered) << sequence;
    EXPECT_EQ(recovered.error().kind, ErrorKind::Corrupt);
  }
}

// Regions of an earlier life of the volume are not active in this one.
TEST(RecoverLog, OtherGenerationIsEmpty) {
  const auto recovered = recover_log(ring_of(1, 20, 512), 6, 512);
  ASSERT_TRUE(recovered);
  EXPECT_EQ(recovered->sequence, 0U);
  for (const uint64_t region : recovered->slots) EXPECT_EQ(region, kNoRegion);
}

TEST(BitmapSector, BytesAreGoldenAndEveryFlippedBitIsNoticed) {
  SectorWords words{};
  words[0] = 0x0102030405060708;
  words[kSectorWords - 1] = 1;
  Bytes raw(kSectorSize);
  encode_sector(7, 3, words, raw);
  EXPECT_EQ(to_hex(ByteSpan(raw).first(4)), "564d424d");
  EXPECT_EQ(to_hex(ByteSpan(raw).subspan(8, 24)), "010000000000000007000000000000000300000000000000");
  EXPECT_EQ(to_hex(ByteSpan(raw).subspan(128, 8)), "0807060504030201");
  SectorWords out{};
  EXPECT_EQ(decode_sector(raw, 7, 3, out), SectorState::Current);
  EXPECT_EQ(out, words);
  EXPECT_EQ(decode_sector(raw, 8, 3, out), SectorState::OtherGeneration);
  EXPECT_EQ(decode_sector(raw, 7, 4, out), SectorState::Damaged) << "a page that was written to the wrong place";
  EXPECT_EQ(decode_sector(Bytes(kSectorSize), 7, 3, out), SectorState::OtherGeneration);
  for (size_t bit = 0; bit < kSectorSize * 8; ++bit) {
    raw[bit / 8] ^= static_cast<uint8_t>(1U << (bit % 8));
    EXPECT_NE(decode_sector(raw, 7, 3, out), SectorState::Current) << bit;
    raw[bit / 8] ^= static_cast<uint8_t>(1U << (bit % 8));
  }
}

}  // namespace
}  // namespace vmferry::track
