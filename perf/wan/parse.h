// SPDX-License-Identifier: Apache-2.0
//
// Reads the quantities of the WAN emulator's command line and control socket: rates, times, sizes, shares.
//
// Every number carries its unit: a bare "100" for a rate has cost too many measurements. Values out of range are
// refused with the range in the text. Threads: pure functions.
// See docs/wan-emulator.md.
#pragma once

#include <cstdint>
#include <string_view>
#include <variant>

#include "engine/base/result.h"
#include "engine/base/units.h"

namespace vmferry::wan {

struct QueueBytes {
  uint64_t value = 0;
};
struct QueueTime {
  Nanoseconds value = 0;
};
// Room for packets that wait for the wire; a time is converted with the rate at the moment of the packet's arrival.
using QueueLimit = std::variant<QueueTime, QueueBytes>;

// "100Mbit", "1.5Gbit", "64kbit", "9600bit"; decimal multiples. 8 kbit/s .. 100 Gbit/s.
Result<uint64_t> parse_rate_bps(std::string_view text);

// "40ms", "1.5s", "250us", "10ns", or a bare "0". 0 .. `max`.
Result<Nanoseconds> parse_duration(std::string_view text, Nanoseconds max);

// "64KiB", "2MiB", "1500B"; binary multiples. 1 B .. 1 GiB.
Result<uint64_t> parse_size_bytes(std::string_view text);

// "0.5%" -> 0.005, or a bare "0". 0 .. 100 %.
Result<double> parse_share(std::string_view text);

// A size or a duration.
Result<QueueLimit> parse_queue(std::string_view text);

}  // namespace vmferry::wan
