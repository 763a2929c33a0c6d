// SPDX-License-Identifier: Apache-2.0
//
// Looks at data block by block: is it zero, and if not, what would the session index know it by?
//
// Threads: pure functions, run on CPU workers.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/base/bytes.h"

namespace vmferry::delta {

// The unit of deduplication: what guests' file systems allocate in. Independent of the tracker's block size.
inline constexpr uint32_t kDedupBlockSize = 4096;

// Of a block's content. 0 means all zeroes; a content whose hash is 0 gets 1. XXH3-64, a prefilter only: guests choose
// their data, so equality is proved by SHA-256 at the copy (I8).
using Fingerprint = uint64_t;
inline constexpr Fingerprint kZeroFingerprint = 0;

bool is_zero(ByteSpan bytes) noexcept;
Fingerprint fingerprint(ByteSpan block) noexcept;

// One fingerprint per kDedupBlockSize bytes of `data`, the last one of what is left. Replaces `out`.
void scan_blocks(ByteSpan data, std::vector<Fingerprint>& out);

}  // namespace vmferry::delta
