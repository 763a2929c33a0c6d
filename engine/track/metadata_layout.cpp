// SPDX-License-Identifier: Apache-2.0
#include "engine/track/metadata_layout.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "engine/base/assert.h"
#include "engine/base/hash.h"

namespace vmferry::track {

namespace {

constexpr uint32_t kTransactionMagic = 0x4c414d56;  // "VMAL"
constexpr uint16_t kTransactionFormat = 1;
constexpr size_t kTransactionHeader = 64;
constexpr size_t kUpdateSize = 12;
constexpr size_t kContextAt = kTransactionHeader + kUpdatesMax * kUpdateSize;
constexpr size_t kTransactionCrcAt = kTransactionSize - 4;
static_assert(kContextAt + kContextSlots * 8 <= kTransactionCrcAt);

constexpr uint32_t kSectorMagic = 0x4d424d56;  // "VMBM"
constexpr uint16_t kSectorFormat = 1;
constexpr size_t kSectorCrcAt = 4;
constexpr size_t kSectorCrcFrom = 8;
constexpr size_t kSectorBitsAt = kSectorSize - kSectorWords * 8;

void put_crc(MutableByteSpan at, uint32_t crc) {
  for (size_t i = 0; i < 4; ++i) at[i] = static_cast<uint8_t>(crc >> (8 * i));
}

uint32_t get_crc(ByteSpan at) {
  return ByteReader(at).le32();
}

}  // namespace

Bytes encode(const Superblock& s) {
  Bytes out;
  ByteWriter(out)
      .u8(s.active ? 1 : 0)
      .u8(s.clean ? 1 : 0)
      .u8(static_cast<uint8_t>(s.baseline))
      .u8(0)
      .le32(s.block_size)
      .le32(s.slot_count)
      .le32(s.region_size)
      .le64(s.tracked_size)
      .le64(s.tracked_size_previous)
      .le64(s.bitmap_generation)
      .le64(s.log_generation)
      .raw(s.stamp.identity.bytes)
      .le64(s.stamp.size)
      .le64(static_cast<uint64_t>(s.stamp.modified_ns));
  return out;
}

Result<Superblock> decode_superblock(ByteSpan payload) {
  ByteReader reader(payload);
  Superblock s;
  const uint8_t active = reader.u8();
  const uint8_t clean = reader.u8();
  const uint8_t baseline = reader.u8();
  reader.u8();
  s.block_size = reader.le32();
  s.slot_count = reader.le32();
  s.region_size = reader.le32();
  s.tracked_size = reader.le64();
  s.tracked_size_previous = reader.le64();
  s.bitmap_generation = reader.le64();
  s.log_generation = reader.le64();
  reader.copy_to(s.stamp.identity.bytes);
  s.stamp.size = reader.le64();
  s.stamp.modified_ns = static_cast<int64_t>(reader.le64());
  const bool sane = active <= 1 && clean <= 1 && baseline <= static_cast<uint8_t>(Baseline::Dirty) &&
                    s.block_size >= 4_KiB && s.block_size <= 1_MiB && std::has_single_bit(s.block_size) &&
                    std::has_single_bit(s.region_size) && s.region_size >= kRegionSizeMin &&
                    s.region_size <= kRegionSizeMax && s.slot_count >= kSlotCountMin && s.slot_count <= kSlotCountMax;
  if (!reader.done() || !sane) {
    return fail(ErrorKind::Corrupt, "tracking superblock of {} bytes is malformed", payload.size());
  }
  s.active = active == 1;
  s.clean = clean == 1;
  s.baseline = static_cast<Baseline>(baseline);
  return s;
}

void encode(const Transaction& t, MutableByteSpan out) {
  VF_ASSERT(out.size() == kTransactionSize && t.updates.size() <= kUpdatesMax && t.context.size() <= kContextSlots);
  Bytes bytes;
  bytes.reserve(kTransactionSize);
  ByteWriter writer(bytes);
  writer.le32(kTransactionMagic).le16(kTransactionFormat).le16(0).le64(t.generation).le64(t.sequence);
  writer.le32(t.slot_count).le32(static_cast<uint32_t>(t.updates.size()));
  writer.le32(t.context_first).le32(static_cast<uint32_t>(t.context.size()));
  bytes.resize(kTransactionHeader);
  for (const SlotUpdate& update : t.updates) writer.le32(update.slot).le64(update.region);
  bytes.resize(kContextAt);
  for (const uint64_t region : t.context) writer.le64(region);
  bytes.resize(kTransactionCrcAt);
  writer.le32(crc32c(bytes));
  std::memcpy(out.data(), bytes.data(), kTransactionSize);
}

std::optional<Transaction> decode_transaction(ByteSpan raw) {
  if (raw.size() != kTransactionSize) return std::nullopt;
  if (get_crc(raw.subspan(kTransactionCrcAt)) != crc32c(raw.first(kTransactionCrcAt))) return std::nullopt;
  ByteReader reader(raw);
  Transaction t;
  const uint32_t magic = reader.le32();
  const uint16_t format = reader.le16();
  reader.le16();
  t.generation = reader.le64();
  t.sequence = reader.le64();
  t.slot_count = reader.le32();
  const uint32_t updates = reader.le32();
  t.context_first = reader.le32();
  const uint32_t context = reader.le32();
  if (magic != kTransactionMagic || format != kTransactionFormat || t.slot_count < kSlotCountMin ||
      t.slot_count > kSlotCountMax || updates > kUpdatesMax || context > kContextSlots ||
      t.context_first > t.slot_count || context > t.slot_count - t.context_first) {
    return std::nullopt;
  }
  ByteReader update_reader(raw.subspan(kTransactionHeader));
  for (uint32_t i = 0; i < updates; ++i) {
    SlotUpdate update;
    update.slot = update_reader.le32();
    update.region = update_reader.le64();
    if (update.slot >= t.slot_count) return std::nullopt;
    t.updates.push_back(update);
  }
  ByteReader context_reader(raw.subspan(kContextAt));
  for (uint32_t i = 0; i < context; ++i) t.context.push_back(context_reader.le64());
  return t;
}

Result<RecoveredLog> recover_log(ByteSpan raw, uint64_t generation, uint32_t slot_count) {
  VF_ASSERT(raw.size() == kTransactionSize * kTransactionCount);
  std::array<std::optional<Transaction>, kTransactionCount> ring;
  RecoveredLog log;
  log.slots.assign(slot_count, kNoRegion);
  for (size_t position = 0; position < kTransactionCount; ++position) {
    auto t = decode_transaction(raw.subspan(position * kTransactionSize, kTransactionSize));
    if (!t || t->generation != generation || t->slot_count != slot_count || t->sequence == 0 ||
        t->sequence % kTransactionCount != position) {
      continue;
    }
    log.sequence = std::max(log.sequence, t->sequence);
    ring[position] = std::move(t);
  }
  // Any context_cycle() transactions in a row name every slot; before the first cycle is complete the first one of
  // the generation takes the place of the missing ones, because the log began empty. Only the transaction after the
  // newest can have been torn, since the next is written when the one before it is durable: a gap is damage.
  const uint64_t cycle = std::min<uint64_t>(context_cycle(slot_count), log.sequence);
  for (uint64_t sequence = log.sequence - cycle + 1; sequence <= log.sequence; ++sequence) {
    const auto& t = ring[sequence % kTransactionCount];
    if (!t || t->sequence != sequence) {
      return fail(ErrorKind::Corrupt, "activity log: transaction {} of generation {} is missing, the newest is {}",
                  sequence, generation, log.sequence);
    }
    for (size_t i = 0; i < t->context.size(); ++i) log.slots[t->context_first + i] = t->context[i];
    for (const SlotUpdate& update : t->updates) log.slots[update.slot] = update.region;
  }
  return log;
}

void encode_sector(uint64_t generation, uint64_t index, const SectorWords& words, MutableByteSpan out) {
  VF_ASSERT(out.size() == kSectorSize);
  Bytes bytes;
  bytes.reserve(kSectorSize);
  ByteWriter writer(bytes);
  writer.le32(kSectorMagic).le32(0).le16(kSectorFormat).le16(0).le32(0).le64(generation).le64(index);
  bytes.resize(kSectorBitsAt);
  for (const uint64_t word : words) writer.le64(word);
  put_crc(MutableByteSpan(bytes).subspan(kSectorCrcAt), crc32c(ByteSpan(bytes).subspan(kSectorCrcFrom)));
  std::memcpy(out.data(), bytes.data(), kSectorSize);
}

SectorState decode_sector(ByteSpan raw, uint64_t generation, uint64_t index, SectorWords& words) {
  VF_ASSERT(raw.size() == kSectorSize);
  if (std::all_of(raw.begin(), raw.end(), [](uint8_t byte) { return byte == 0; })) return SectorState::OtherGeneration;
  if (get_crc(raw.subspan(kSectorCrcAt)) != crc32c(raw.subspan(kSectorCrcFrom))) return SectorState::Damaged;
  ByteReader reader(raw);
  const uint32_t magic = reader.le32();
  reader.le32();
  const uint16_t format = reader.le16();
  reader.le16();
  reader.le32();
  const uint64_t sector_generation = reader.le64();
  const uint64_t sector_index = reader.le64();
  if (magic != kSectorMagic || format != kSectorFormat || sector_index != index) return SectorState::Damaged;
  if (sector_generation != generation) return SectorState::OtherGeneration;
  ByteReader bits(raw.subspan(kSectorBitsAt));
  for (uint64_t& word : words) word = bits.le64();
  return SectorState::Current;
}

}  // namespace vmferry::track
