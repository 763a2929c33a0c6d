// SPDX-License-Identifier: Apache-2.0
//
// 128-bit random identifiers (attempts, groups, nodes) and names.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "engine/base/result.h"

namespace vmferry {

// All zeroes means "none". Written as 32 hex digits.
struct Id128 {
  std::array<uint8_t, 16> bytes{};

  bool is_none() const { return bytes == std::array<uint8_t, 16>{}; }
  std::string to_string() const;
  static Result<Id128> parse(std::string_view hex);
  friend auto operator<=>(const Id128&, const Id128&) = default;
};

// From the kernel's random source; never none. Deterministic code (the simulator) draws ids from its Executor instead.
Id128 random_id();

// Names of volumes, peers and groups: [A-Za-z0-9][A-Za-z0-9._-]{0,63} (design section 10).
bool is_valid_name(std::string_view name) noexcept;

}  // namespace vmferry
