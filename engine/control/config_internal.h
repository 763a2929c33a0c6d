// SPDX-License-Identifier: Apache-2.0
//
// What config.cpp (keys; those of the NBD exports: config_nbd.cpp, config_tls.cpp), config_toml.cpp (file) and
// config_options.cpp (command line) share.
#pragma once

#include "engine/control/config.h"

namespace vmferry::config_detail {

// One setting of the daemon itself. A bad one adds a problem.
void apply_setting(std::string_view key, std::string_view value, const std::string& where, DaemonConfig& config,
                   std::vector<ConfigProblem>& problems);

// Collects the settings of one volume; finish() checks that the necessary ones were given.
class VolumeSettings {
 public:
  VolumeSettings(std::string where, std::vector<ConfigProblem>& problems)
      : where_(std::move(where)), problems_(problems) {}
  void set(std::string_view key, std::string_view value, const std::string& where);
  VolumeConfig finish();

 private:
  void set_tls_allow(std::string_view value, const std::string& where);
  void set_read_only(std::string_view value, const std::string& where);
  void set_description(std::string_view value, const std::string& where);
  template <typename... Args>
  void problem(const std::string& where, fmt::format_string<Args...> format, Args&&... args) {
    problems_.push_back({where, fmt::format(format, std::forward<Args>(args)...)});
  }

  std::string where_;
  std::vector<ConfigProblem>& problems_;
  VolumeConfig volume_{};
};

// Whether the key of a volume is on or off; TOML says true or false.
bool is_switch(std::string_view key);

// "nbd-connections", "nbd-handshake-timeout". The problem with the value; "" when it was taken.
std::string set_nbd_limit(std::string_view key, std::string_view value, NbdExportLimits& limits);
// Sockets of the service manager and nbd= of every volume.
void check_passed(const DaemonConfig& config, std::vector<ConfigProblem>& problems);

// "require", "allow", "off".
std::optional<NbdTlsSetting> parse_nbd_tls(std::string_view text);
// TLS of every volume's export, against the daemon's settings.
void check_tls(const DaemonConfig& config, std::vector<ConfigProblem>& problems);

// Defaults and what only the whole can show: missing keys, names and paths used twice.
void finish(DaemonConfig& config, std::vector<ConfigProblem>& problems);

}  // namespace vmferry::config_detail
