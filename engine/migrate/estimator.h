// SPDX-License-Identifier: Apache-2.0
//
// When memory may start, when the brake is on, and whether the guest was stopped too early: pure decisions on measured
// rates. docs/migration.md, "Converging".
// Threads: pure.
#pragma once

#include "engine/base/units.h"
#include "engine/migrate/interfaces.h"

namespace vmferry {

// What the link needs for the last disk epoch, sealed now. `figures_rate` is used while the replication has no rate
// of its own yet; with neither, what is not empty takes "for ever".
Nanoseconds predicted_last_round(const RoundProgress& progress, uint64_t figures_rate, Nanoseconds rtt);

// Memory starts when the disks' predicted last round is about a second of link: earlier, both fight for the link and
// pages are sent twice; later, the link idles between short rounds.
inline constexpr Nanoseconds kPrecopyEntry = 1 * kSecond;

// The downtime limit is shared by three: the disks' last epoch, what memory QEMU keeps for the pause, and everything
// that takes time without bytes (round trip, flushes, loading).
struct DowntimeShares {
  Nanoseconds disk = 0;    // the brake is released when the predicted last round fits in here
  Nanoseconds memory = 0;  // given to QEMU as its own downtime-limit
};
DowntimeShares downtime_shares(Nanoseconds downtime_limit);

struct BrakeFacts {
  bool first_round_done = false;  // of the rounds beside the memory stream
  uint64_t ram_remaining = 0;     // QEMU's, bytes; 0 with ram_total 0: not known yet
  uint64_t ram_total = 0;
  uint64_t memory_rate = 0;  // raw bytes per second that QEMU's socket was read with lately
  Nanoseconds predicted_last_round = 0;
  Nanoseconds poll_interval = 0;
  DowntimeShares shares;
};
// Whether QEMU's socket must not be read: it is near its own end and the disks are not.
bool brake_held(const BrakeFacts& facts);

// Bytes per second that QEMU is told to count on when it decides whether what is left fits into its share of the pause.
// By itself it takes the speed of its socket, which is the link's times the compression of the pages of the last 100
// ms; what is left in the end is what the guest changes all the time, and need not compress at all. `link_rate`: bytes
// per second on the wire; 0 (not measured) leaves QEMU to itself.
uint64_t switchover_bandwidth(uint64_t link_rate);

// Pages that do compress would fit earlier: a guest that never comes down to that amount, but near it, is given twice
// as much after each `kSwitchoverPatience`.
constexpr Nanoseconds kSwitchoverPatience = 5 * kSecond;
bool near_switchover(uint64_t ram_remaining, uint64_t bandwidth, const DowntimeShares& shares);

// Stopped although the disks' last round would break the limit by more than estimates err.
bool stopped_too_early(Nanoseconds predicted_last_round, Nanoseconds downtime_limit);

}  // namespace vmferry
