// SPDX-License-Identifier: Apache-2.0
//
// Hashes: SHA-256 where equality must be proved (I8), XXH3-128 for frames already covered by TLS, CRC-32C for our own
// records on disk. Threads: free functions are pure; Sha256Stream is not shared.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "engine/base/bytes.h"

namespace vmferry {

using Sha256Digest = std::array<uint8_t, 32>;
using Hash128 = std::array<uint8_t, 16>;

Sha256Digest sha256(ByteSpan bytes);

// SHA-256 over data that comes in pieces. Movable, not copyable; digest() ends it.
class Sha256Stream {
 public:
  Sha256Stream();
  ~Sha256Stream();
  Sha256Stream(Sha256Stream&&) noexcept;
  Sha256Stream& operator=(Sha256Stream&&) noexcept;
  void update(ByteSpan bytes);
  Sha256Digest digest();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

Hash128 xxh3_128(ByteSpan bytes);
uint64_t xxh3_64(ByteSpan bytes);

// CRC-32C (Castagnoli, RFC 3720 appendix B.4), as used by iSCSI and ext4. `seed` is the CRC of what came before.
uint32_t crc32c(ByteSpan bytes, uint32_t seed = 0);

std::string to_hex(ByteSpan bytes);
// Lower or upper case, even length; empty result for anything else.
Bytes from_hex(std::string_view text);

}  // namespace vmferry
