// SPDX-License-Identifier: Apache-2.0
//
// Messages that carry QEMU's memory stream of one migration attempt (docs/replication-protocol.md, "Memory stream").
//
// Positions are bytes of the raw stream. The source asks with an empty MemoryData, or the sink speaks first: either
// way the first MemoryAck of a connection says where to go on, with a new compression history (generation).
// All integers little-endian. Threads: pure functions.
#pragma once

#include "engine/base/bytes.h"
#include "engine/base/hash.h"
#include "engine/base/id.h"
#include "engine/base/result.h"

namespace vmferry {

inline constexpr size_t kMemoryChunkSizeMax = 256U << 10;  // raw bytes of one MemoryData
// A chunk that does not compress grows by its header only; zstd's bound is below that.
inline constexpr size_t kMemoryCodedSizeMax = kMemoryChunkSizeMax + 4096;

struct MemoryData {
  Id128 attempt{};
  uint32_t generation = 0;  // of the compression history; each connection has a higher one
  uint64_t offset = 0;      // of the first raw byte
  ByteSpan coded;           // delta::StreamCompressor's frame; empty: only asks for a MemoryAck
};

struct MemoryEnd {
  Id128 attempt{};
  uint64_t total = 0;  // raw bytes of the whole stream
  Sha256Digest sha256{};
  friend bool operator==(const MemoryEnd&, const MemoryEnd&) = default;
};

struct MemoryAck {
  Id128 attempt{};
  uint64_t received = 0;   // in the sink's memory: need not be sent again
  uint64_t delivered = 0;  // given to the destination QEMU
  friend bool operator==(const MemoryAck&, const MemoryAck&) = default;
};

Bytes encode(const MemoryData& message);
Bytes encode(const MemoryEnd& message);
Bytes encode(const MemoryAck& message);
// Accept exactly what encode gives.
Result<MemoryData> decode_memory_data(ByteSpan payload);
Result<MemoryEnd> decode_memory_end(ByteSpan payload);
Result<MemoryAck> decode_memory_ack(ByteSpan payload);

}  // namespace vmferry
