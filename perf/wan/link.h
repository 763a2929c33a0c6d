// SPDX-License-Identifier: Apache-2.0
//
// One direction of the emulated wire: a queue, a transmitter of a given rate, then a pipe of a given delay.
//
// A packet that arrives is dropped when the queue is full, else it gets the instant at which its last bit leaves the
// transmitter, may be lost on the way, and is due at the far end one delay later. Each segment of a super-packet is
// treated by itself; survivors that leave within kRunTimeMax of each other are delivered together, when the last is
// due.
//
// Flow: Emulator offers what it reads from one TUN and writes what is due to the other. No clock, file or thread here.
// Source of truth: docs/wan-emulator.md, "The model".
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>

#include "engine/base/units.h"
#include "perf/wan/packet.h"
#include "perf/wan/parse.h"

namespace vmferry::wan {

// What both directions have in common. delay is one way.
struct Profile {
  uint64_t rate_bps = 0;
  Nanoseconds delay = 0;
  Nanoseconds jitter = 0;  // largest deviation from delay, to either side; <= delay
  double loss = 0;         // probability per packet
  QueueLimit queue = QueueTime{100 * kMillisecond};
  bool reorder = false;  // jitter is drawn for each packet by itself, so that they may overtake

  // Refuses what cannot be simulated: jitter larger than the delay, more than kInFlightBytesMax on the way.
  Status check() const;
};

// Of one direction, since the start or the last reset. Bytes are IP bytes.
//   offered = wire + dropped_queue + (dropped_cut that never left)
//   wire    = delivered + dropped_loss + (dropped_cut on the way) + dropped_device + still on the way
struct Counters {
  uint64_t offered_bytes = 0;
  uint64_t offered_packets = 0;
  uint64_t wire_bytes = 0;  // took time on the wire, whether they arrived or not
  uint64_t wire_packets = 0;
  uint64_t delivered_bytes = 0;
  uint64_t delivered_packets = 0;
  uint64_t dropped_queue = 0;  // packets
  uint64_t dropped_loss = 0;
  uint64_t dropped_cut = 0;
  uint64_t dropped_device = 0;  // the receiving TUN refused it, or it made no sense
  uint64_t late_packets = 0;    // delivered more than kLateness after they were due: the machine was too busy
  Nanoseconds lateness_max = 0;

  uint64_t dropped() const { return dropped_queue + dropped_loss + dropped_cut + dropped_device; }
};

// Longer than this and a reader of the table in docs/wan-emulator.md would be misled.
constexpr Nanoseconds kLateness = 500 * kMicrosecond;

class Link {
 public:
  // A run of segments that is due at one instant.
  struct Flight {
    Nanoseconds due = 0;
    std::shared_ptr<const Packet> packet;
    uint32_t first = 0;
    uint32_t count = 0;
    uint64_t bytes = 0;
  };

  Link(const Profile& profile, uint64_t seed);

  // For packets that arrive from now on; what is on the way keeps its instants.
  void set_profile(const Profile& profile) { profile_ = profile; }
  const Profile& profile() const { return profile_; }

  // Until then everything that arrives or comes due is dropped.
  void cut_until(Nanoseconds end) { cut_end_ = end; }

  void offer(const std::shared_ptr<const Packet>& packet, Nanoseconds now);

  // When the next flight is due; nullopt when the pipe is empty.
  std::optional<Nanoseconds> next_due() const;
  // The next flight that is due at `now`. The caller reports its fate with delivered() or refused().
  std::optional<Flight> pop_due(Nanoseconds now);
  void delivered(const Flight& flight, Nanoseconds now);
  void refused(const Flight& flight) { counters_.dropped_device += flight.count; }
  void malformed() { ++counters_.dropped_device; }

  const Counters& counters() const { return counters_; }
  void reset_counters() { counters_ = Counters{}; }
  uint64_t in_flight_bytes() const { return in_flight_bytes_; }
  // Bytes that wait for the transmitter, the one being sent included.
  uint64_t queued_bytes(Nanoseconds now) const;

 private:
  // splitmix64 (Steele, Lea, Flood 2014): the same draws with every library and compiler, unlike <random>.
  struct Random {
    uint64_t state;
    double share();  // [0, 1)
  };

  bool has_room(uint64_t bytes, Nanoseconds now) const;
  Nanoseconds jitter_at(Nanoseconds departure);
  void launch(Flight&& flight);

  Profile profile_;
  Random loss_draws_;
  Random jitter_draws_;
  Nanoseconds busy_until_ = 0;
  Nanoseconds cut_end_ = 0;
  Nanoseconds due_last_ = 0;
  // Jitter wanders linearly between deviations drawn for instants kept kJitterStep or more apart.
  Nanoseconds knot_at_ = 0;
  Nanoseconds knot_step_ = 0;
  double knot_from_ = 0;
  double knot_to_ = 0;
  std::deque<Flight> flights_;  // by due
  uint64_t in_flight_bytes_ = 0;
  Counters counters_;
};

}  // namespace vmferry::wan
