// SPDX-License-Identifier: Apache-2.0
//
// The virtio block device: feature bits, configuration space, request header. Source of truth: virtio 1.2, 5.2.
// Sectors are 512 bytes whatever the block size. All integers little-endian. Threads: values.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "engine/base/bytes.h"

namespace vmferry::virtio {

inline constexpr uint64_t kSectorSize = 512;

enum Feature : uint64_t {
  kBlkSegMax = 1ULL << 2,
  kBlkReadOnly = 1ULL << 5,
  kBlkBlockSize = 1ULL << 6,
  kBlkFlush = 1ULL << 9,
  kBlkTopology = 1ULL << 10,
  kBlkConfigWce = 1ULL << 11,
  kBlkMq = 1ULL << 12,
  kBlkDiscard = 1ULL << 13,
  kBlkWriteZeroes = 1ULL << 14,
  kRingIndirect = 1ULL << 28,
  kRingEventIdx = 1ULL << 29,
  kVersion1 = 1ULL << 32,
  kRingPacked = 1ULL << 34,
};

// Type of a request. A number, not an enumerator, because guests send what they like.
inline constexpr uint32_t kBlkIn = 0;
inline constexpr uint32_t kBlkOut = 1;
inline constexpr uint32_t kBlkFlushRequest = 4;
inline constexpr uint32_t kBlkGetId = 8;
inline constexpr uint32_t kBlkDiscardRequest = 11;
inline constexpr uint32_t kBlkWriteZeroesRequest = 13;

inline constexpr size_t kBlkHeaderSize = 16;
inline constexpr size_t kBlkRangeSize = 16;  // of one range of DISCARD and WRITE_ZEROES
inline constexpr size_t kBlkIdSize = 20;
inline constexpr uint32_t kBlkRangeUnmap = 1;

enum class BlkStatus : uint8_t { Ok = 0, IoError = 1, Unsupported = 2 };

struct BlkHeader {
  uint32_t type = 0;
  uint64_t sector = 0;
};
inline BlkHeader decode_blk_header(const uint8_t (&bytes)[kBlkHeaderSize]) {
  ByteReader reader(bytes);
  BlkHeader header;
  header.type = reader.le32();
  reader.le32();  // priority of old drivers
  header.sector = reader.le64();
  return header;
}

struct BlkRange {
  uint64_t sector = 0;
  uint32_t sectors = 0;
  uint32_t flags = 0;
};
inline BlkRange decode_blk_range(ByteSpan bytes) {
  ByteReader reader(bytes);
  BlkRange range;
  range.sector = reader.le64();
  range.sectors = reader.le32();
  range.flags = reader.le32();
  return range;
}

inline constexpr size_t kBlkConfigWriteback = 32;  // offset of the one field that a driver may change
inline constexpr size_t kBlkConfigSize = 60;       // up to and including write_zeroes_may_unmap and its padding

struct BlkConfig {
  uint64_t size = 0;  // bytes; whole sectors
  uint32_t segments_max = 0;
  uint32_t block_size = 512;      // logical, a power of two
  uint32_t physical_block = 512;  // smallest efficient unit, a power of two >= block_size
  uint32_t optimal_io = 0;        // bytes; 0: not known
  bool writeback = true;
  uint16_t queues = 1;
  uint32_t discard_sectors_max = 0;
  uint32_t discard_ranges_max = 0;
  uint32_t discard_alignment = 0;  // bytes
};
std::array<uint8_t, kBlkConfigSize> encode_blk_config(const BlkConfig& config);
// nullopt when shorter than kBlkConfigSize.
std::optional<BlkConfig> decode_blk_config(ByteSpan bytes);

}  // namespace vmferry::virtio
