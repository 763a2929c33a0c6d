// SPDX-License-Identifier: Apache-2.0
#include "engine/base/text.h"

#include <array>
#include <charconv>
#include <limits>
#include <span>

namespace vmferry {

namespace {

struct Unit {
  std::string_view suffix;
  uint64_t factor;
};

// number [fraction] suffix. The fraction is kept to nine digits; exact for everything that people write.
Result<uint64_t> parse_quantity(std::string_view text, std::span<const Unit> units, std::string_view what,
                                std::string_view example) {
  const auto bad = [&] {
    return fail(ErrorKind::InvalidArgument, "'{}' is not a {} (example: {})", text, what, example);
  };
  uint64_t whole = 0;
  const char* const end = text.data() + text.size();
  const auto [after, error] = std::from_chars(text.data(), end, whole);
  if (error != std::errc{}) return bad();
  uint64_t fraction = 0;
  uint64_t fraction_scale = 1;
  const char* p = after;
  if (p != end && *p == '.') {
    ++p;
    const char* const digits = p;
    for (; p != end && *p >= '0' && *p <= '9'; ++p) {
      if (fraction_scale >= 1'000'000'000) continue;
      fraction = fraction * 10 + static_cast<uint64_t>(*p - '0');
      fraction_scale *= 10;
    }
    if (p == digits) return bad();
  }
  const std::string_view suffix(p, static_cast<size_t>(end - p));
  for (const Unit& unit : units) {
    if (suffix != unit.suffix) continue;
    if (whole > std::numeric_limits<int64_t>::max() / unit.factor - 1) {
      return fail(ErrorKind::InvalidArgument, "'{}' is too large for a {}", text, what);
    }
    const auto part = static_cast<unsigned __int128>(fraction) * unit.factor / fraction_scale;
    return whole * unit.factor + static_cast<uint64_t>(part);
  }
  return bad();
}

}  // namespace

Result<uint64_t> parse_size(std::string_view text) {
  static constexpr std::array<Unit, 17> kUnits{{{"", 1},
                                                {"B", 1},
                                                {"K", 1_KiB},
                                                {"k", 1_KiB},
                                                {"KiB", 1_KiB},
                                                {"KB", 1_KiB},
                                                {"M", 1_MiB},
                                                {"MiB", 1_MiB},
                                                {"MB", 1_MiB},
                                                {"G", 1_GiB},
                                                {"GiB", 1_GiB},
                                                {"GB", 1_GiB},
                                                {"T", 1_TiB},
                                                {"TiB", 1_TiB},
                                                {"TB", 1_TiB},
                                                {"P", 1024_TiB},
                                                {"PiB", 1024_TiB}}};
  return parse_quantity(text, kUnits, "size", "20G");
}

Result<uint64_t> parse_bit_rate(std::string_view text) {
  static constexpr std::array<Unit, 8> kUnits{{{"", 1},
                                               {"bit", 1},
                                               {"kbit", 1'000},
                                               {"Kbit", 1'000},
                                               {"Mbit", 1'000'000},
                                               {"mbit", 1'000'000},
                                               {"Gbit", 1'000'000'000},
                                               {"gbit", 1'000'000'000}}};
  const auto bits = parse_quantity(text, kUnits, "rate", "50Mbit");
  if (!bits) return bits;
  if (*bits < 8) return fail(ErrorKind::InvalidArgument, "rate '{}' is below one byte per second", text);
  return *bits / 8;
}

Result<Nanoseconds> parse_duration(std::string_view text) {
  static constexpr std::array<Unit, 7> kUnits{{{"", 1'000'000'000},
                                               {"s", 1'000'000'000},
                                               {"ms", 1'000'000},
                                               {"us", 1'000},
                                               {"m", 60'000'000'000},
                                               {"h", 3'600'000'000'000},
                                               {"d", 86'400'000'000'000}}};
  const auto value = parse_quantity(text, kUnits, "duration", "300ms");
  if (!value) return tl::unexpected(value.error());
  return static_cast<Nanoseconds>(*value);
}

Result<uint64_t> parse_uint(std::string_view text) {
  uint64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [after, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || after != end) return fail(ErrorKind::InvalidArgument, "'{}' is not a number", text);
  return value;
}

std::string format_size(uint64_t bytes) {
  static constexpr std::array<std::string_view, 5> kNames{"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kNames.size()) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kNames[unit]);
}

std::string format_rate(uint64_t bytes_per_second) {
  const double bits = static_cast<double>(bytes_per_second) * 8;
  if (bits >= 1e9) return fmt::format("{:.2f} Gbit/s", bits / 1e9);
  if (bits >= 1e6) return fmt::format("{:.1f} Mbit/s", bits / 1e6);
  return fmt::format("{:.0f} kbit/s", bits / 1e3);
}

std::string format_duration(Nanoseconds duration) {
  const double seconds = static_cast<double>(duration) / 1e9;
  if (seconds < 1) return fmt::format("{:.0f} ms", seconds * 1e3);
  if (seconds < 120) return fmt::format("{:.1f} s", seconds);
  if (seconds < 7200) return fmt::format("{:.0f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

std::string printable(std::string_view text) {
  constexpr size_t kSizeMax = 128;
  std::string result;
  for (const char c : text.substr(0, kSizeMax)) {
    const bool plain = c >= 0x20 && c < 0x7f && c != '"' && c != '\\';
    result.push_back(plain ? c : '?');
  }
  if (text.size() > kSizeMax) result += "...";
  return result;
}

}  // namespace vmferry
