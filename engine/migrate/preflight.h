// SPDX-License-Identifier: Apache-2.0
//
// Whether a migration can work, before anything is changed: a pure function over facts of both sides.
//
// The facts are gathered by engine/daemon; the peer's come over a control request, so they are as hostile as every
// other byte of a peer: they are compared and printed, never used as a path or a command.
// Threads: pure.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "engine/base/units.h"
#include "engine/migrate/migrate_result.h"
#include "engine/migrate/ownership.h"

namespace vmferry {

// A block backend that a QEMU has, as query-block and query-named-block-nodes tell it.
struct BlockFacts {
  std::string device;  // qdev id or name, the same at both ends
  std::string volume;  // of the group; "": it is none of ours
  bool writable = false;
  bool inserted = true;
  std::string medium;  // file name of read-only media, for messages
  bool nbd_without_reconnect = false;
};

struct QemuPreflight {
  bool reachable = false;
  std::string error;  // when it is not
  std::string version;
  std::string machine;
  std::string cpu;
  uint64_t ram_bytes = 0;
  bool running = false;  // its guest, now
  bool paused = false;   // and not for a reason of QEMU's own
  bool fresh = false;    // destination: inmigrate, never used
  bool kvm = true;
  uint32_t major = 0;
  std::vector<std::string> blocked_reasons;
  std::vector<BlockFacts> blocks;
};

struct VolumeFacts {
  std::string name;
  uint64_t size_here = 0;
  std::optional<uint64_t> size_there;  // nullopt: the peer has no such volume
  bool primary_here = true;
  bool secondary_there = true;
  bool foreign_data_there = false;
};

struct PreflightFacts {
  bool peer_connected = false;
  std::string peer_trouble;  // why nothing is known of the peer's side; "": everything is
  std::string peer_name;
  bool peer_grants_migrate = true;
  bool overwrite_peer = false;
  std::string not_owner_reason;  // "" when this side owns the group
  std::string peer_not_ready_reason;
  std::vector<VolumeFacts> volumes;
  QemuPreflight source;
  QemuPreflight destination;
  uint64_t staging_free_there = 0;  // bytes for a staged epoch
  uint64_t staging_needed = 0;
  Nanoseconds rtt = 0;             // 0: not measured
  uint64_t link_rate = 0;          // bytes per second, 0: not measured
  bool link_rate_is_limit = true;  // false: measured with little to send, so that the link may carry more
  uint64_t bandwidth_cap = 0;      // --bandwidth, 0: none
  Nanoseconds fsync_here = 0;
  Nanoseconds fsync_there = 0;
  uint64_t disk_dirty_rate = 0;    // wire bytes per second that the guest's writes make; 0: few, or not known
  uint64_t memory_dirty_rate = 0;  // 0: not known
  Nanoseconds downtime_limit = 0;
};

struct PreflightReport {
  std::vector<std::string> problems;  // any of them: refused
  std::vector<std::string> warnings;
  Nanoseconds smallest_pause = 0;
  bool ok() const { return problems.empty(); }
};

PreflightReport preflight(const PreflightFacts& facts);

// Where the guest is, as far as the QEMU of whoever owns the group showed it (I10).
GuestPlace guest_place(const Ownership& ownership, const PreflightFacts& facts);

// The parts of the pause that no convergence removes: two one-way trips, the durable records in the path, and the tail
// of QEMU's stream.
Nanoseconds smallest_pause(const PreflightFacts& facts);

// Bytes per second that the link carries at most: the cap, or what it carried under load. 0: not known.
uint64_t link_rate_max(const PreflightFacts& facts);

}  // namespace vmferry
