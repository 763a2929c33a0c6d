// SPDX-License-Identifier: Apache-2.0
#include "engine/control/config.h"

#include <charconv>
#include <filesystem>
#include <set>

#include "engine/base/id.h"
#include "engine/control/config_internal.h"

namespace vmferry {

namespace {

constexpr size_t kVolumesMax = 256;
constexpr unsigned kQueuesMax = 64;  // of one vhost-user-blk device

}  // namespace

namespace config_detail {

void VolumeSettings::set(std::string_view key, std::string_view value, const std::string& where) {
  if (!volume_.places.emplace(key, where).second) return problem(where, "'{}' is given twice", key);
  if (key == "name") {
    volume_.name = value;
    if (!is_valid_name(value)) {
      problem(where, "'{}' is not a volume name: letters, digits, '.', '_', '-', at most 64, no '.' in front", value);
    }
  } else if (key == "path") {
    volume_.path = value;
    if (value.empty() || value.find('\0') != std::string_view::npos) problem(where, "path is empty");
  } else if (key == "size") {
    const auto size = parse_size(value);
    if (!size) return problem(where, "{}", size.error().text);
    if (*size == 0 || *size % 512 != 0) return problem(where, "size '{}' is not a positive multiple of 512", value);
    volume_.size = *size;
  } else if (key == "role") {
    volume_.secondary = value == "secondary";
    if (value != "primary" && value != "secondary") problem(where, "role '{}' is not primary or secondary", value);
  } else if (key == "nbd") {
    auto endpoint = Endpoint::parse(value);
    if (!endpoint) return problem(where, "nbd: {}", endpoint.error().text);
    volume_.nbd = std::move(*endpoint);
  } else if (key == "nbd-tls") {
    const auto setting = parse_nbd_tls(value);
    if (!setting) return problem(where, "nbd-tls '{}' is not require, allow or off", value);
    volume_.nbd_tls = *setting;
  } else if (key == "tls-allow") {
    set_tls_allow(value, where);
  } else if (key == "read-only") {
    set_read_only(value, where);
  } else if (key == "description") {
    set_description(value, where);
  } else if (key == "qmp") {
    volume_.qmp = value;
    if (const auto endpoint = Endpoint::parse(fmt::format("unix:{}", value)); !endpoint) {
      problem(where, "qmp: {}", endpoint.error().text);
    }
  } else if (key == "aio") {
    if (value == "io_uring")
      volume_.aio = AioSetting::IoUring;
    else if (value == "libaio")
      volume_.aio = AioSetting::Libaio;
    else
      problem(where, "aio '{}' is not io_uring or libaio", value);
  } else if (key == "cache") {
    if (value == "none")
      volume_.cache = CacheSetting::None;
    else if (value != "writeback")
      problem(where, "cache '{}' is not writeback or none", value);
  } else if (key == "vhost-user-blk") {
    volume_.vhost_user_blk = value;
    if (const auto endpoint = Endpoint::parse(fmt::format("unix:{}", value)); !endpoint) {
      problem(where, "vhost-user-blk: {}", endpoint.error().text);
    }
  } else if (key == "queues") {
    unsigned queues = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), queues);
    if (error != std::errc{} || end != value.data() + value.size() || queues == 0 || queues > kQueuesMax) {
      return problem(where, "queues '{}' is not a number from 1 to {}", value, kQueuesMax);
    }
    volume_.queues = static_cast<uint16_t>(queues);
  } else if (key == "socket-owner") {
    volume_.socket_access.owner = value;
    if (const auto owner = find_owner(value); !owner) problem(where, "socket-owner: {}", owner.error().text);
  } else if (key == "socket-mode") {
    const auto mode = parse_socket_mode(value);
    if (!mode) return problem(where, "socket-mode: {}", mode.error().text);
    volume_.socket_access.mode = *mode;
  } else {
    problem(where,
            "unknown key '{}' of a volume; known are name, path, size, role, nbd, nbd-tls, tls-allow, read-only, "
            "description, vhost-user-blk, queues, socket-owner, socket-mode, qmp, aio, cache",
            key);
  }
}

VolumeConfig VolumeSettings::finish() {
  if (volume_.name.empty() && !volume_.places.contains("name")) problem(where_, "a volume needs name=");
  if (volume_.path.empty() && !volume_.places.contains("path"))
    problem(where_, "volume '{}' needs path=", volume_.name);
  if (volume_.queues > 0 && volume_.vhost_user_blk.empty() && !volume_.places.contains("vhost-user-blk"))
    problem(where_, "volume '{}': queues= is of vhost-user-blk=, which is missing", volume_.name);
  return std::move(volume_);
}

// One setting of the daemon itself. Shared by the command line and the file.
void apply_setting(std::string_view key, std::string_view value, const std::string& where, DaemonConfig& config,
                   std::vector<ConfigProblem>& problems) {
  const auto problem = [&](std::string text) { problems.push_back({where, std::move(text)}); };
  config.places[std::string(key)] = where;
  if (key == "state-dir") {
    config.state_dir = value;
    if (value.empty()) problem("state-dir is empty");
  } else if (key == "control") {
    const auto endpoint = Endpoint::parse(value);
    if (!endpoint)
      problem(fmt::format("control: {}", endpoint.error().text));
    else if (!endpoint->is_unix)
      problem(fmt::format("control '{}' is not unix:PATH", value));
    else
      config.control_path = endpoint->path;
  } else if (key == "listen" || key == "metrics") {
    auto endpoint = Endpoint::parse(value);
    if (!endpoint)
      problem(fmt::format("{}: {}", key, endpoint.error().text));
    else if (endpoint->is_unix)
      problem(fmt::format("{} '{}' is not HOST:PORT (example: 192.0.2.7:4411)", key, value));
    else
      (key == "listen" ? config.listen : config.metrics) = std::move(*endpoint);
  } else if (key == "nbd-tls") {
    const auto setting = parse_nbd_tls(value);
    if (!setting)
      problem(fmt::format("nbd-tls '{}' is not require, allow or off", value));
    else
      config.nbd_tls.setting = *setting;
  } else if (key == "nbd-tls-certificates") {
    config.nbd_tls.certificates = value;
    if (value.empty()) problem("nbd-tls-certificates is empty: it names a folder");
  } else if (key == "nbd-tls-psk") {
    config.nbd_tls.psk = value;
    if (value.empty()) problem("nbd-tls-psk is empty: it names a file");
  } else if (key == "nbd-connections" || key == "nbd-handshake-timeout") {
    if (std::string text = set_nbd_limit(key, value, config.nbd_limits); !text.empty()) problem(std::move(text));
  } else if (key == "on-running") {
    config.on_running = value;
    if (!value.starts_with('/') || value.find('\0') != std::string_view::npos)
      problem(fmt::format("on-running '{}' is not the absolute path of a program", value));
  } else if (key == "log-level") {
    const auto level = log::parse_level(value);
    if (!level)
      problem(level.error().text);
    else
      config.log_level = *level;
  } else {
    problem(
        fmt::format("unknown key '{}'; known are state-dir, control, listen, metrics, nbd-tls, nbd-tls-certificates, "
                    "nbd-tls-psk, nbd-connections, nbd-handshake-timeout, "
                    "on-running, log-level, volume",
                    key));
  }
}

namespace {

// From another working directory a relative path would name another file, and paths are kept over restarts.
void make_absolute(std::string& path, const std::string& where, std::vector<ConfigProblem>& problems) {
  if (path.empty()) return;
  std::error_code error;
  const auto absolute = std::filesystem::absolute(path, error);
  if (error)
    problems.push_back({where, fmt::format("path '{}': {}", path, error.message())});
  else
    path = absolute.string();
}

// The same for a socket, whose path may become too long by that.
void make_socket_absolute(std::string& path, std::string_view key, const std::string& where,
                          std::vector<ConfigProblem>& problems) {
  if (path.empty() || path.starts_with('/')) return;
  make_absolute(path, where, problems);
  if (const auto endpoint = Endpoint::parse("unix:" + path); !endpoint) {
    problems.push_back({where, fmt::format("{}: {}", key, endpoint.error().text)});
  }
}

void make_paths_absolute(DaemonConfig& config, std::vector<ConfigProblem>& problems) {
  make_absolute(config.state_dir, place_of(config.places, {"state-dir"}), problems);
  while (config.state_dir.size() > 1 && config.state_dir.ends_with('/')) config.state_dir.pop_back();
  make_absolute(config.nbd_tls.certificates, place_of(config.places, {"nbd-tls-certificates"}), problems);
  make_absolute(config.nbd_tls.psk, place_of(config.places, {"nbd-tls-psk"}), problems);
  make_socket_absolute(config.control_path, "control", place_of(config.places, {"control"}), problems);
  for (VolumeConfig& volume : config.volumes) {
    const auto at = [&](std::string_view key) { return place_of(volume.places, {key}); };
    make_absolute(volume.path, at("path"), problems);
    if (volume.nbd && volume.nbd->is_unix) make_socket_absolute(volume.nbd->path, "nbd", at("nbd"), problems);
    make_socket_absolute(volume.vhost_user_blk, "vhost-user-blk", at("vhost-user-blk"), problems);
    make_socket_absolute(volume.qmp, "qmp", at("qmp"), problems);
  }
}

// What two volumes may not have in common.
void check_sharing(const DaemonConfig& config, std::vector<ConfigProblem>& problems) {
  std::set<std::string> names;
  std::set<std::string> paths;
  std::set<std::string> exports;
  for (const VolumeConfig& volume : config.volumes) {
    const auto at = [&](std::string_view key) { return place_of(volume.places, {key}); };
    if (!volume.name.empty() && !names.insert(volume.name).second) {
      problems.push_back({at("name"), fmt::format("volume '{}' is given twice", volume.name)});
    }
    if (!volume.path.empty() && !paths.insert(volume.path).second) {
      problems.push_back({at("path"), fmt::format("path '{}' is used by two volumes", volume.path)});
    }
    const bool fixed_port = volume.nbd && (volume.nbd->is_unix || volume.nbd->port != 0);
    if (fixed_port && !exports.insert(volume.nbd->to_string()).second) {
      problems.push_back({at("nbd"), fmt::format("nbd '{}' is used by two volumes", volume.nbd->to_string())});
    }
    if (!volume.vhost_user_blk.empty() && !exports.insert("unix:" + volume.vhost_user_blk).second) {
      problems.push_back(
          {at("vhost-user-blk"), fmt::format("socket '{}' is used by two exports", volume.vhost_user_blk)});
    }
  }
}

}  // namespace

void finish(DaemonConfig& config, std::vector<ConfigProblem>& problems) {
  if (config.state_dir.empty() && problems.empty()) {
    problems.push_back({"", "--state-dir is missing: the folder that keeps roles, keys and dirty state over restarts"});
  }
  make_paths_absolute(config, problems);
  if (config.control_path.empty() && !config.state_dir.empty()) {
    config.control_path = config.state_dir + "/control.sock";
    if (const auto control = Endpoint::parse("unix:" + config.control_path); !control) {
      problems.push_back(
          {place_of(config.places, {"state-dir"}), fmt::format("control socket: {}", control.error().text)});
    }
  }
  if (config.volumes.size() > kVolumesMax) {
    problems.push_back({"", fmt::format("{} volumes are over the limit of {}", config.volumes.size(), kVolumesMax)});
  }
  check_sharing(config, problems);
  check_passed(config, problems);
  check_tls(config, problems);
}

}  // namespace config_detail

std::string place_of(const ConfigPlaces& places, std::initializer_list<std::string_view> keys) {
  for (const std::string_view key : keys) {
    if (const auto it = places.find(key); it != places.end()) return it->second;
  }
  return {};
}

VolumeConfig with_settings(VolumeConfig base, const VolumeConfig& given) {
  const auto has = [&](std::string_view key) { return given.places.contains(key); };
  if (has("path")) base.path = given.path;
  if (has("size")) base.size = given.size;
  if (has("role")) base.secondary = given.secondary;
  if (has("nbd")) base.nbd = given.nbd;
  if (has("nbd-tls")) base.nbd_tls = given.nbd_tls;
  if (has("tls-allow")) base.tls_allow = given.tls_allow;
  if (has("read-only")) base.read_only = given.read_only;
  if (has("description")) base.description = given.description;
  if (has("vhost-user-blk")) base.vhost_user_blk = given.vhost_user_blk;
  if (has("queues")) base.queues = given.queues;
  if (has("socket-owner")) base.socket_access.owner = given.socket_access.owner;
  if (has("socket-mode")) base.socket_access.mode = given.socket_access.mode;
  if (has("qmp")) base.qmp = given.qmp;
  if (has("aio")) base.aio = given.aio;
  if (has("cache")) base.cache = given.cache;
  return base;
}

VolumeConfig parse_volume_option(std::string_view text, const std::string& where,
                                 std::vector<ConfigProblem>& problems) {
  config_detail::VolumeSettings settings(where, problems);
  size_t at = 0;
  while (at <= text.size()) {
    std::string item;
    for (; at < text.size(); ++at) {
      if (text[at] == ',') {
        if (at + 1 >= text.size() || text[at + 1] != ',') break;
        ++at;
      }
      item.push_back(text[at]);
    }
    ++at;  // the comma, or one past the end
    const size_t equals = item.find('=');
    if (equals == std::string::npos) {
      problems.push_back({where, fmt::format("'{}' is not KEY=VALUE (example: name=vda,path=/srv/vda.img)", item)});
      continue;
    }
    settings.set(std::string_view(item).substr(0, equals), std::string_view(item).substr(equals + 1), where);
  }
  return settings.finish();
}

}  // namespace vmferry
