// SPDX-License-Identifier: Apache-2.0
//
// The daemon's configuration: command line and TOML file with the same names (design section 9).
//
// Both sources become a list of settings (key, value, where), so that there is one place that knows each key. Every
// problem is collected with its place, so that an operator fixes a file in one round. The command line overrides the
// file; volumes of both are joined, a volume named in both is a problem.
// Threads: none; pure but for reading the file.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/base/log.h"
#include "engine/base/text.h"
#include "engine/runtime/account.h"
#include "engine/runtime/endpoint.h"

namespace vmferry {

enum class AioSetting : uint8_t { Automatic, IoUring, Libaio };
enum class CacheSetting : uint8_t { Writeback, None };

// Key -> where it was given: "vmferry.toml:12", "--volume name=vda,...".
using ConfigPlaces = std::map<std::string, std::string, std::less<>>;

// Automatic: of a volume, what the daemon says; of the daemon, Require with credentials and Off without.
enum class NbdTlsSetting : uint8_t { Automatic, Off, Allow, Require };

// TLS of the NBD exports.
struct NbdTlsConfig {
  NbdTlsSetting setting = NbdTlsSetting::Automatic;
  std::string certificates{};  // folder with ca-cert.pem, server-cert.pem, server-key.pem, perhaps ca-crl.pem; "": none
  std::string psk{};           // file of USER:HEXKEY; "": none
};

// Of each NBD export.
struct NbdExportLimits {
  size_t connections = 1024;
  Nanoseconds handshake_timeout = 10 * kSecond;
};

// Addresses of the listening sockets that the service manager passed, by the volume whose NBD export they are of.
using PassedAddresses = std::map<std::string, std::vector<Endpoint>, std::less<>>;

struct VolumeConfig {
  std::string name;
  std::string path;              // absolute, once accepted
  std::optional<uint64_t> size;  // bytes; creates or checks the file
  bool secondary = false;        // role=; counts only for a new volume
  std::optional<Endpoint> nbd;
  NbdTlsSetting nbd_tls = NbdTlsSetting::Automatic;
  bool read_only = false;                // of its exports, whatever the role; replication is not concerned
  std::string description{};             // for clients that list exports; "": the daemon's own words
  std::vector<std::string> tls_allow{};  // names that clients have to prove through TLS; empty: whoever gets in
  std::string vhost_user_blk{};          // path of the socket that QEMU connects to; "" when none
  uint16_t queues = 0;                   // of vhost-user-blk, at most; 0: the default
  SocketAccess socket_access{};          // of the unix sockets of its exports
  std::string qmp;                       // path of the QMP socket of the QEMU that uses this volume; "" when none
  AioSetting aio = AioSetting::Automatic;
  CacheSetting cache = CacheSetting::Writeback;
  std::vector<Endpoint> passed{};  // takes the place of nbd=; not recorded, because each start has its own
  ConfigPlaces places{};           // of the keys that were given; not recorded

  // Where its NBD export listens; empty when it has none.
  std::vector<Endpoint> nbd_addresses() const;
};

struct DaemonConfig {
  std::string state_dir;    // absolute, as every path below
  std::string config_file;  // "" when none
  bool check_only = false;
  std::string control_path;  // default: state_dir/control.sock
  std::optional<Endpoint> listen;
  std::optional<Endpoint> metrics;
  NbdTlsConfig nbd_tls{};
  NbdExportLimits nbd_limits{};
  std::string on_running;  // program that is run when a guest has arrived here; "" when none
  log::Level log_level = log::Level::Info;
  std::vector<VolumeConfig> volumes;
  ConfigPlaces places{};
};

// "vmferry.toml:12: volume 'vda': size 'x' is not a size (example: 20G)"
struct ConfigProblem {
  std::string where;
  std::string text;
  std::string to_string() const { return where.empty() ? text : where + ": " + text; }
};

struct ConfigOutcome {
  DaemonConfig config;
  std::vector<ConfigProblem> problems;  // empty: config is usable
  std::string help;                     // not empty: print this and exit 0 (--help, --version)
};

// The place of the first of these keys that was given; "" when none was.
std::string place_of(const ConfigPlaces& places, std::initializer_list<std::string_view> keys);

// What holds for the NBD export of this volume: never Automatic.
NbdTlsSetting nbd_tls_of(const NbdTlsConfig& daemon, const VolumeConfig& volume);
// Whether the volume's export is safe as configured. Asked for every volume before it is served, because a volume may
// have been accepted under another configuration of the daemon.
Status check_nbd_tls(const NbdTlsConfig& daemon, const VolumeConfig& volume);
// Whether nbd= and the sockets that were passed for the volume say the same.
Status check_passed(const VolumeConfig& volume);

// Whether a text may be the description of an export: short enough, and plain (engine/base/utf8.h).
bool is_valid_description(std::string_view text);

// The whole: command line (without argv[0]), then the file that it names. `passed`: VolumeConfig::passed of each
// volume.
ConfigOutcome load_config(const std::vector<std::string>& arguments, const PassedAddresses& passed = {});

// Adds the settings of one TOML text; `name` is for messages. Fuzzed.
void apply_toml(std::string_view text, const std::string& name, DaemonConfig& config,
                std::vector<ConfigProblem>& problems);

// Looks at what the configuration names on disk, as this user, and changes nothing: for --check-config. A start does
// not ask: there each volume fails for itself. See config_files.cpp.
void check_files(const DaemonConfig& config, std::vector<ConfigProblem>& problems);

// Whether the daemon may run this program: a file that root or the daemon's user owns and nobody else can change, nor
// put another in its place. "" is fine. hook_file.cpp
Status check_hook(const std::string& path);

// `base` with the settings on top that were given in `given`.
VolumeConfig with_settings(VolumeConfig base, const VolumeConfig& given);

// name=...,path=...,...; a doubled comma stands for one comma within a value, as in QEMU.
VolumeConfig parse_volume_option(std::string_view text, const std::string& where, std::vector<ConfigProblem>& problems);

}  // namespace vmferry
