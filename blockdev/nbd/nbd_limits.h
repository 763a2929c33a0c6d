// SPDX-License-Identifier: Apache-2.0
//
// Limits of the NBD server (I9). All sizes in bytes, all times in nanoseconds.
// Threads: a value.
#pragma once

#include "engine/base/units.h"
#include "netproto/nbd/handshake.h"

namespace vmferry {

struct NbdLimits {
  size_t connections_max = 1024;  // in all phases; one more is closed at once, or the oldest handshake that stalls
  size_t handshakes_max = 256;    // a newcomer beyond this takes the place of the oldest unfinished handshake
  Nanoseconds handshake_time_max = 10 * kSecond;

  // Data of requests that are being received, carried out or answered. At the limit reading stops. Each is raised to
  // what one request of the largest size needs, so that no client can wait for ever.
  uint64_t inflight_bytes_max = 128_MiB;            // of the whole server
  uint64_t connection_inflight_bytes_max = 64_MiB;  // of one connection
  uint64_t buffer_cache_bytes_max = 32_MiB;         // free buffers kept for the next requests

  // While connections wait for memory of the server-wide limit, one that holds some and has made no progress for
  // this long (half a payload, replies not taken) is closed.
  Nanoseconds stall_time_max = 30 * kSecond;

  Nanoseconds drain_grace = 100 * kMillisecond;  // requests that come meanwhile are answered with ESHUTDOWN
  // Instead, at a drain: no grace, and what is not carried out is not answered at all. For a server that will be back:
  // QEMU sends such requests again within its reconnect-delay, while ESHUTDOWN reaches the guest as an I/O error.
  bool drain_unanswered = false;
  // What a client sent before it closed, and was not read until then, is not carried out. For the kernel's client,
  // which gives a silent connection up and sends the same requests, and then others, over another one: what comes late
  // from the old one would overwrite newer data. Costs a look at the socket per read.
  bool drop_requests_of_gone_clients = false;
  Nanoseconds drain_time_max = 10 * kSecond;  // for replies to be taken by the client

  size_t status_extents_max = 2048;  // descriptors of one BLOCK_STATUS reply
  nbd::HandshakeLimits handshake{};
};

}  // namespace vmferry
