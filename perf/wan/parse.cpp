// SPDX-License-Identifier: Apache-2.0
#include "perf/wan/parse.h"

#include <array>
#include <charconv>
#include <cmath>
#include <span>

namespace vmferry::wan {
namespace {

struct Unit {
  std::string_view suffix;
  double factor;
};

constexpr std::array kRateUnits{Unit{"bit", 1}, Unit{"kbit", 1e3}, Unit{"Mbit", 1e6}, Unit{"Gbit", 1e9}};
constexpr std::array kTimeUnits{Unit{"ns", 1}, Unit{"us", 1e3}, Unit{"ms", 1e6}, Unit{"s", 1e9}};
constexpr std::array kSizeUnits{Unit{"B", 1}, Unit{"KiB", 1024}, Unit{"MiB", 1048576}, Unit{"GiB", 1073741824}};
constexpr std::array kShareUnits{Unit{"%", 0.01}};

constexpr double kRateBpsMin = 8e3;
constexpr double kRateBpsMax = 100e9;
constexpr double kSizeBytesMax = 1073741824;
constexpr Nanoseconds kQueueTimeMax = 10 * kSecond;

std::string unit_list(std::span<const Unit> units) {
  std::string list;
  for (const Unit& unit : units) {
    if (!list.empty()) list += ", ";
    list += unit.suffix;
  }
  return list;
}

// Number and unit. Only digits and one point: no sign, exponent, "inf" or "nan", which from_chars would accept.
Result<double> parse_quantity(std::string_view what, std::string_view text, std::span<const Unit> units) {
  const size_t number_end = std::min(text.find_first_not_of("0123456789."), text.size());
  const std::string_view number = text.substr(0, number_end);
  const std::string_view suffix = text.substr(number_end);
  double value = 0;
  const auto [end, error] =
      std::from_chars(number.data(), number.data() + number.size(), value, std::chars_format::fixed);
  if (number.empty() || error != std::errc{} || end != number.data() + number.size()) {
    return fail(ErrorKind::InvalidArgument, "{} '{}' is not a number with a unit ({})", what, text, unit_list(units));
  }
  if (suffix.empty() && value == 0) return 0.0;
  for (const Unit& unit : units) {
    if (unit.suffix == suffix) return value * unit.factor;
  }
  return fail(ErrorKind::InvalidArgument, "{} '{}' needs one of the units {}", what, text, unit_list(units));
}

}  // namespace

Result<uint64_t> parse_rate_bps(std::string_view text) {
  const Result<double> bps = parse_quantity("rate", text, kRateUnits);
  if (!bps) return tl::unexpected(bps.error());
  if (*bps < kRateBpsMin || *bps > kRateBpsMax) {
    return fail(ErrorKind::InvalidArgument, "rate '{}' is outside 8kbit .. 100Gbit", text);
  }
  return static_cast<uint64_t>(std::llround(*bps));
}

Result<Nanoseconds> parse_duration(std::string_view text, Nanoseconds max) {
  const Result<double> time = parse_quantity("time", text, kTimeUnits);
  if (!time) return tl::unexpected(time.error());
  if (*time > static_cast<double>(max)) {
    return fail(ErrorKind::InvalidArgument, "time '{}' is outside 0 .. {}ms", text, max / kMillisecond);
  }
  return static_cast<Nanoseconds>(std::llround(*time));
}

Result<uint64_t> parse_size_bytes(std::string_view text) {
  const Result<double> bytes = parse_quantity("size", text, kSizeUnits);
  if (!bytes) return tl::unexpected(bytes.error());
  if (*bytes < 1 || *bytes > kSizeBytesMax) {
    return fail(ErrorKind::InvalidArgument, "size '{}' is outside 1B .. 1GiB", text);
  }
  return static_cast<uint64_t>(std::llround(*bytes));
}

Result<double> parse_share(std::string_view text) {
  const Result<double> share = parse_quantity("share", text, kShareUnits);
  if (!share) return tl::unexpected(share.error());
  if (*share > 1) return fail(ErrorKind::InvalidArgument, "share '{}' is outside 0% .. 100%", text);
  return *share;
}

Result<QueueLimit> parse_queue(std::string_view text) {
  if (text.ends_with('B')) {
    const Result<uint64_t> bytes = parse_size_bytes(text);
    if (!bytes) return tl::unexpected(bytes.error());
    return QueueBytes{*bytes};
  }
  const Result<Nanoseconds> time = parse_duration(text, kQueueTimeMax);
  if (!time) return tl::unexpected(time.error());
  return QueueTime{*time};
}

}  // namespace vmferry::wan
