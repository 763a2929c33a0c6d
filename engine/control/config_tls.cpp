// SPDX-License-Identifier: Apache-2.0
//
// TLS of the NBD exports: what may be said, and what would be unsafe.
#include "engine/control/config_internal.h"

namespace vmferry {

namespace {

constexpr size_t kClientNameSizeMax = 128;
constexpr size_t kClientNamesMax = 64;

std::string_view to_string(NbdTlsSetting setting) {
  switch (setting) {
    case NbdTlsSetting::Off:
      return "off";
    case NbdTlsSetting::Allow:
      return "allow";
    case NbdTlsSetting::Require:
      return "require";
    case NbdTlsSetting::Automatic:
      break;
  }
  return "automatic";
}

bool has_credentials(const NbdTlsConfig& config) {
  return !config.certificates.empty() || !config.psk.empty();
}

}  // namespace

namespace config_detail {

std::optional<NbdTlsSetting> parse_nbd_tls(std::string_view text) {
  for (const NbdTlsSetting setting : {NbdTlsSetting::Off, NbdTlsSetting::Allow, NbdTlsSetting::Require}) {
    if (text == to_string(setting)) return setting;
  }
  return std::nullopt;
}

// Names of clients, separated by ':'.
void VolumeSettings::set_tls_allow(std::string_view value, const std::string& where) {
  while (true) {
    const std::string_view name = value.substr(0, value.find(':'));
    if (name.empty() || name.size() > kClientNameSizeMax || name.find('\0') != std::string_view::npos) {
      return problem(where, "tls-allow has an empty or overlong name (example: tls-allow=backup:hosta)");
    }
    volume_.tls_allow.emplace_back(name);
    if (volume_.tls_allow.size() > kClientNamesMax) {
      return problem(where, "tls-allow names more than {} clients", kClientNamesMax);
    }
    if (name.size() == value.size()) return;
    value.remove_prefix(name.size() + 1);
  }
}

void check_tls(const DaemonConfig& config, std::vector<ConfigProblem>& problems) {
  const NbdTlsSetting setting = config.nbd_tls.setting;
  const bool wanted = setting == NbdTlsSetting::Allow || setting == NbdTlsSetting::Require;
  if (wanted && !has_credentials(config.nbd_tls)) {
    problems.push_back({place_of(config.places, {"nbd-tls"}),
                        fmt::format("nbd-tls '{}' needs nbd-tls-certificates or nbd-tls-psk", to_string(setting))});
    return;
  }
  for (const VolumeConfig& volume : config.volumes) {
    if (const Status safe = check_nbd_tls(config.nbd_tls, volume); !safe) {
      problems.push_back({place_of(volume.places, {"nbd-tls", "tls-allow", "nbd"}), safe.error().text});
    }
  }
}

}  // namespace config_detail

NbdTlsSetting nbd_tls_of(const NbdTlsConfig& daemon, const VolumeConfig& volume) {
  if (volume.nbd_tls != NbdTlsSetting::Automatic) return volume.nbd_tls;
  if (daemon.setting != NbdTlsSetting::Automatic) return daemon.setting;
  return has_credentials(daemon) ? NbdTlsSetting::Require : NbdTlsSetting::Off;
}

Status check_nbd_tls(const NbdTlsConfig& daemon, const VolumeConfig& volume) {
  const NbdTlsSetting setting = nbd_tls_of(daemon, volume);
  const std::vector<Endpoint> addresses = volume.nbd_addresses();
  if (addresses.empty()) {
    if (volume.nbd_tls == NbdTlsSetting::Automatic && volume.tls_allow.empty()) return {};
    return fail(ErrorKind::InvalidArgument, "volume '{}': nbd-tls= and tls-allow= are of nbd=, which is missing",
                volume.name);
  }
  if (setting != NbdTlsSetting::Off && !has_credentials(daemon)) {
    return fail(ErrorKind::InvalidArgument,
                "volume '{}': nbd-tls={} needs vmferryd's nbd-tls-certificates or nbd-tls-psk", volume.name,
                to_string(setting));
  }
  for (const Endpoint& address : addresses) {
    if (address.is_loopback() || setting == NbdTlsSetting::Require) continue;
    return fail(ErrorKind::InvalidArgument,
                "volume '{}': {}tcp:{} is not on loopback, and with nbd-tls '{}' the network could read and write "
                "it: give vmferryd nbd-tls-certificates or nbd-tls-psk, and nbd-tls 'require'",
                volume.name, volume.passed.empty() ? "nbd=" : "the service manager's socket ", address.to_string(),
                to_string(setting));
  }
  if (!volume.tls_allow.empty() && setting == NbdTlsSetting::Off) {
    return fail(ErrorKind::InvalidArgument,
                "volume '{}': tls-allow= needs TLS, through which clients prove their names; nbd-tls is off",
                volume.name);
  }
  return {};
}

}  // namespace vmferry
