// SPDX-License-Identifier: Apache-2.0
//
// Limits of the vhost-user-blk back-end (I9). Sizes in bytes. Requests in flight are bounded by the rings themselves.
// Threads: a value.
#pragma once

#include "engine/base/units.h"

namespace vmferry {

inline constexpr uint16_t kVhostQueuesMax = 64;

struct VhostLimits {
  uint32_t segments_max = 126;           // SEG_MAX: with header and status a chain of 128
  uint64_t request_bytes_max = 64_MiB;   // data of one request
  uint64_t copy_bytes_max = 1_MiB;       // a request in several pieces of memory up to this size is gathered first
  uint64_t buffered_bytes_max = 64_MiB;  // of all such copies; beyond it requests go piece by piece
  uint64_t buffer_cache_bytes_max = 8_MiB;
  uint32_t discard_ranges_max = 32;
  uint32_t discard_sectors_max = 1U << 22;  // of one range: 2 GiB
  size_t waiting_max = 4;                   // connections that wait for their turn; the oldest goes first
  unsigned chains_per_turn = 128;           // of one queue, before the other ones and other devices have theirs
};

}  // namespace vmferry
