// SPDX-License-Identifier: Apache-2.0
#include "netproto/virtio/blk.h"

#include <algorithm>
#include <bit>

namespace vmferry::virtio {

std::array<uint8_t, kBlkConfigSize> encode_blk_config(const BlkConfig& config) {
  const auto to_sectors = [](uint32_t bytes) { return static_cast<uint32_t>(bytes / kSectorSize); };
  const uint32_t blocks_per_physical = std::max(config.physical_block / config.block_size, 1U);
  Bytes out;
  ByteWriter writer(out);
  writer.le64(config.size / kSectorSize);
  writer.le32(0);  // size_max: not offered
  writer.le32(config.segments_max);
  writer.le16(0).u8(0).u8(0);  // geometry: not offered
  writer.le32(config.block_size);
  writer.u8(static_cast<uint8_t>(std::countr_zero(blocks_per_physical)));
  writer.u8(0);                                             // alignment offset
  writer.le16(static_cast<uint16_t>(blocks_per_physical));  // minimum I/O, in logical blocks
  writer.le32(config.optimal_io / config.block_size);       // likewise
  writer.u8(config.writeback ? 1 : 0).u8(0).le16(config.queues);
  writer.le32(config.discard_sectors_max).le32(config.discard_ranges_max).le32(to_sectors(config.discard_alignment));
  writer.le32(config.discard_sectors_max).le32(config.discard_ranges_max).u8(1);  // zeroes may unmap
  writer.u8(0).u8(0).u8(0);
  std::array<uint8_t, kBlkConfigSize> bytes{};
  std::copy_n(out.begin(), std::min(out.size(), bytes.size()), bytes.begin());
  return bytes;
}

std::optional<BlkConfig> decode_blk_config(ByteSpan bytes) {
  if (bytes.size() < kBlkConfigSize) return std::nullopt;
  ByteReader reader(bytes);
  BlkConfig config;
  const uint64_t sectors = reader.le64();
  if (sectors > UINT64_MAX / kSectorSize) return std::nullopt;
  config.size = sectors * kSectorSize;
  reader.le32();
  config.segments_max = reader.le32();
  reader.le32();
  config.block_size = reader.le32();
  const uint8_t exponent = reader.u8();
  if (exponent < 16 && config.block_size <= 65536) config.physical_block = config.block_size << exponent;
  reader.u8();
  reader.le16();
  config.optimal_io = reader.le32();
  config.writeback = reader.u8() != 0;
  reader.u8();
  config.queues = reader.le16();
  config.discard_sectors_max = reader.le32();
  config.discard_ranges_max = reader.le32();
  config.discard_alignment = reader.le32();
  return config;
}

}  // namespace vmferry::virtio
