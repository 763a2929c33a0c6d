// SPDX-License-Identifier: Apache-2.0
//
// Settings of the NBD exports beside TLS: limits, what clients may do and read of them, and where they listen.
#include <algorithm>

#include "engine/base/utf8.h"
#include "engine/control/config_internal.h"

namespace vmferry {

namespace {

constexpr uint64_t kConnectionsMax = 65535;  // a descriptor each
// Below a second, clients on a slow link or with TLS would not get in; beyond ten minutes it is no limit.
constexpr Nanoseconds kHandshakeTimeoutMin = kSecond;
constexpr Nanoseconds kHandshakeTimeoutMax = 600 * kSecond;
constexpr size_t kDescriptionSizeMax = 256;

}  // namespace

namespace config_detail {

bool is_switch(std::string_view key) {
  return key == "read-only";
}

void VolumeSettings::set_read_only(std::string_view value, const std::string& where) {
  volume_.read_only = value == "on";
  if (value != "on" && value != "off") {
    problem(where, "read-only '{}' is not on or off (in a file: true or false)", printable(value));
  }
}

void VolumeSettings::set_description(std::string_view value, const std::string& where) {
  if (value.empty()) return problem(where, "description is empty: leave it out");
  if (value.size() > kDescriptionSizeMax) {
    return problem(where, "description has {} bytes; clients list it beside others, and it may have {}", value.size(),
                   kDescriptionSizeMax);
  }
  if (!is_plain_utf8(value)) {
    return problem(where,
                   "description '{}' is not plain UTF-8 text: control characters and marks of direction would "
                   "change how a list of exports looks",
                   printable(value));
  }
  volume_.description = value;
}

std::string set_nbd_limit(std::string_view key, std::string_view value, NbdExportLimits& limits) {
  if (key == "nbd-connections") {
    const auto count = parse_uint(value);
    if (!count || *count == 0 || *count > kConnectionsMax) {
      return fmt::format("nbd-connections '{}' is not a number from 1 to {}", printable(value), kConnectionsMax);
    }
    limits.connections = static_cast<size_t>(*count);
    return {};
  }
  const auto timeout = parse_duration(value);
  if (!timeout || *timeout < kHandshakeTimeoutMin || *timeout > kHandshakeTimeoutMax) {
    return fmt::format("nbd-handshake-timeout '{}' is not a time from 1s to 10m (example: 10s)", printable(value));
  }
  limits.handshake_timeout = *timeout;
  return {};
}

void check_passed(const DaemonConfig& config, std::vector<ConfigProblem>& problems) {
  for (const VolumeConfig& volume : config.volumes) {
    if (const Status same = vmferry::check_passed(volume); !same) {
      problems.push_back({place_of(volume.places, {"nbd"}), same.error().text});
    }
  }
}

}  // namespace config_detail

bool is_valid_description(std::string_view text) {
  return text.size() <= kDescriptionSizeMax && is_plain_utf8(text);
}

std::vector<Endpoint> VolumeConfig::nbd_addresses() const {
  if (!passed.empty()) return passed;
  if (nbd) return {*nbd};
  return {};
}

Status check_passed(const VolumeConfig& volume) {
  if (volume.passed.empty() || !volume.nbd) return {};
  const std::string wanted = volume.nbd->to_string();
  std::string given;
  for (const Endpoint& address : volume.passed) {
    if (address.to_string() == wanted) return {};
    given += (given.empty() ? "" : ", ") + address.to_string();
  }
  return fail(ErrorKind::InvalidArgument,
              "volume '{}': nbd= says {}, but the service manager passed {} for it: leave nbd= out, or let "
              "ListenStream= of the .socket unit say the same",
              volume.name, wanted, given);
}

}  // namespace vmferry
