// SPDX-License-Identifier: Apache-2.0
#include "engine/delta/block_scan.h"

#include <cstring>

#include "engine/base/hash.h"

namespace vmferry::delta {

bool is_zero(ByteSpan bytes) noexcept {
  // Most blocks with data show it in the first words; for the rest memcmp against itself, one byte shifted, compares
  // at memory speed.
  const size_t head = std::min<size_t>(bytes.size(), 16);
  for (size_t i = 0; i < head; ++i) {
    if (bytes[i] != 0) return false;
  }
  return bytes.size() <= head || std::memcmp(bytes.data(), bytes.data() + head, bytes.size() - head) == 0;
}

Fingerprint fingerprint(ByteSpan block) noexcept {
  if (is_zero(block)) return kZeroFingerprint;
  const uint64_t hash = xxh3_64(block);
  return hash == kZeroFingerprint ? 1 : hash;
}

void scan_blocks(ByteSpan data, std::vector<Fingerprint>& out) {
  out.clear();
  for (size_t at = 0; at < data.size(); at += kDedupBlockSize) {
    out.push_back(fingerprint(data.subspan(at, std::min<size_t>(kDedupBlockSize, data.size() - at))));
  }
}

}  // namespace vmferry::delta
