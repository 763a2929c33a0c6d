// SPDX-License-Identifier: Apache-2.0
//
// Strict UTF-8 (RFC 3629: shortest form, no surrogates, nothing beyond U+10FFFF).
// Threads: pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace vmferry {

struct Utf8Character {
  uint32_t code;
  size_t length;  // bytes
};

// The character at the front of a text that is not empty; nullopt when its bytes are no strict UTF-8.
std::optional<Utf8Character> first_utf8_character(std::string_view text);

// Text that may be shown as it is: strict UTF-8 without control characters, line separators, and the marks that change
// the direction of what stands around them, by which a text could forge its surroundings.
bool is_plain_utf8(std::string_view text);

}  // namespace vmferry
