// SPDX-License-Identifier: Apache-2.0
//
// Where things are on a volume's metadata device, and the encodings of its three parts: docs/on-disk.md section 2.
//
// Flow: TrackMetadata uses the superblock, ActivityLog the transactions, SavedBitmap the pages. Pure functions; every
// decoder checks a checksum before it believes a field (I11).
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/result.h"
#include "engine/base/units.h"
#include "engine/track/tracked_device.h"

namespace vmferry::track {

inline constexpr uint32_t kRegionSizeMin = 32U << 10;  // what one entry of the activity log stands for, bytes
inline constexpr uint32_t kRegionSizeMax = 32U << 20;

// --- Device layout
inline constexpr uint64_t kSuperblockOffset = 0;
inline constexpr uint32_t kSuperblockSlotSize = 4096;
inline constexpr uint64_t kLogOffset = 64_KiB;
inline constexpr uint64_t kTransactionSize = 4096;
inline constexpr uint64_t kTransactionCount = 32;  // ring; recovery reads exactly these 128 KiB
inline constexpr uint64_t kBitmapOffset = 256_KiB;

// --- Superblock, payload of a DurableRecord of kind "TRKS"
struct Superblock {
  bool active = false;
  bool clean = false;  // only written by close()
  Baseline baseline = Baseline::Clean;
  uint32_t block_size = 0;
  uint32_t slot_count = 0;
  uint32_t region_size = 0;
  uint64_t tracked_size = 0;
  uint64_t tracked_size_previous = 0;  // before a growth whose store may not have grown yet
  uint64_t bitmap_generation = 0;      // pages of another generation mean the baseline
  uint64_t log_generation = 0;         // transactions of another generation mean nothing
  StoreStamp stamp{};
  friend bool operator==(const Superblock&, const Superblock&) = default;
};
inline constexpr uint16_t kSuperblockVersion = 1;
Bytes encode(const Superblock& superblock);
Result<Superblock> decode_superblock(ByteSpan payload);

// --- Activity log transaction: updates of slots, and a part of all slots in rotation, so that any
// context_cycle(slot_count) consecutive transactions name every slot.
inline constexpr uint32_t kSlotCountMin = 8;
inline constexpr uint32_t kSlotCountMax = 4096;
inline constexpr uint32_t kUpdatesMax = 64;
inline constexpr uint32_t kContextSlots = 256;
inline constexpr uint64_t kNoRegion = ~uint64_t{0};
constexpr uint32_t context_cycle(uint32_t slot_count) {
  return (slot_count + kContextSlots - 1) / kContextSlots;
}
static_assert(context_cycle(kSlotCountMax) < kTransactionCount, "losing the oldest transaction must lose nothing");

struct SlotUpdate {
  uint32_t slot = 0;
  uint64_t region = kNoRegion;
  friend bool operator==(const SlotUpdate&, const SlotUpdate&) = default;
};
struct Transaction {
  uint64_t generation = 0;
  uint64_t sequence = 0;  // from 1; written at position sequence % kTransactionCount
  uint32_t slot_count = 0;
  std::vector<SlotUpdate> updates;
  uint32_t context_first = 0;     // slot of context[0]
  std::vector<uint64_t> context;  // regions, kNoRegion for an empty slot
  friend bool operator==(const Transaction&, const Transaction&) = default;
};
// Exactly kTransactionSize bytes.
void encode(const Transaction& transaction, MutableByteSpan out);
std::optional<Transaction> decode_transaction(ByteSpan raw);  // nullopt: not intact

// The slots after the newest transaction of `generation`. `raw` is the whole ring. Corrupt: a transaction that must be
// there is not, so the set of active regions is unknown.
struct RecoveredLog {
  uint64_t sequence = 0;        // of the newest transaction, 0 when there is none
  std::vector<uint64_t> slots;  // slot_count regions
};
Result<RecoveredLog> recover_log(ByteSpan raw, uint64_t generation, uint32_t slot_count);

// --- Bitmap page: 8 sectors, each with its own checksum because a disk may tear between sectors but not within one.
inline constexpr uint64_t kSectorSize = 512;
inline constexpr uint64_t kSectorWords = 48;  // 3072 blocks: three regions at 4 KiB blocks
inline constexpr uint64_t kPageSectors = 8;
inline constexpr uint64_t kPageSize = kSectorSize * kPageSectors;
inline constexpr uint64_t kPageWords = kSectorWords * kPageSectors;
constexpr uint64_t page_bytes_covered(uint32_t block_size) {
  return kPageWords * 64 * block_size;
}
static_assert(page_bytes_covered(4096) % kRegionSizeMax == 0, "a region never spans two pages");

using SectorWords = std::array<uint64_t, kSectorWords>;
enum class SectorState : uint8_t { Current, OtherGeneration, Damaged };
void encode_sector(uint64_t generation, uint64_t index, const SectorWords& words, MutableByteSpan out);
// An all-zero sector was never written: OtherGeneration.
SectorState decode_sector(ByteSpan raw, uint64_t generation, uint64_t index, SectorWords& words);

}  // namespace vmferry::track
