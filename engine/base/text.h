// SPDX-License-Identifier: Apache-2.0
//
// Quantities as people write them: sizes (512M, 2GiB), rates (50Mbit), durations (300ms, 30m).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/base/result.h"
#include "engine/base/units.h"

namespace vmferry {

// Bytes. A number with an optional suffix K, M, G, T, with or without "iB" or "B"; all are powers of 1024, as in QEMU.
Result<uint64_t> parse_size(std::string_view text);

// Bits per second as bytes per second. A number with kbit, Mbit or Gbit (powers of 1000), or plain bits per second.
Result<uint64_t> parse_bit_rate(std::string_view text);

// A number with ms, s, m, h or d; a plain number is seconds.
Result<Nanoseconds> parse_duration(std::string_view text);

// Unsigned decimal without sign, space or overflow.
Result<uint64_t> parse_uint(std::string_view text);

// "1.2 GiB", "12.5 Mbit/s", "3.4 s" for people.
std::string format_size(uint64_t bytes);
std::string format_rate(uint64_t bytes_per_second);
std::string format_duration(Nanoseconds duration);

// Text from a stranger for a log line or an error: at most 128 bytes, '?' for all that is not plain ASCII, and for
// quotation marks and backslashes, so that it can neither end the quotes it stands in nor start a line.
std::string printable(std::string_view text);

}  // namespace vmferry
