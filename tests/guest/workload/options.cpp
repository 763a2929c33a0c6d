// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/workload/options.h"

#include <charconv>
#include <functional>
#include <map>
#include <string_view>

namespace vmferry::guest {

namespace {

bool parse_size(std::string_view text, std::uint64_t& value) {
  unsigned shift = 0;
  if (!text.empty()) {
    const std::size_t unit = std::string_view("KMG").find(text.back());
    if (unit != std::string_view::npos) {
      shift = 10 * static_cast<unsigned>(unit + 1);
      text.remove_suffix(1);
    }
  }
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc{} || end != text.data() + text.size() || value > (UINT64_MAX >> shift)) return false;
  value <<= shift;
  return true;
}

bool parse_unsigned(std::string_view text, unsigned max, unsigned& value) {
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  return problem == std::errc{} && end == text.data() + text.size() && value <= max;
}

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> parts;
  for (;;) {
    const std::size_t comma = text.find(',');
    parts.emplace_back(text.substr(0, comma));
    if (comma == std::string_view::npos) return parts;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace

bool parse_options(const std::vector<std::string>& words, Options& options, std::string& error) {
  using Setter = std::function<bool(std::string_view)>;
  bool direct_given = false;
  const auto size = [](std::uint64_t& to) -> Setter { return [&to](auto text) { return parse_size(text, to); }; };
  const auto number = [](unsigned& to, unsigned max) -> Setter {
    return [&to, max](auto text) { return parse_unsigned(text, max, to); };
  };
  const auto string = [](std::string& to) -> Setter {
    return [&to](auto text) {
      to = text;
      return !text.empty();
    };
  };
  const std::map<std::string_view, Setter> setters = {
      {"mode",
       [&](auto text) {
         options.mode = text == "file" ? DiskMode::File : text == "raw" ? DiskMode::Raw : DiskMode::None;
         return text == "file" || text == "raw" || text == "none";
       }},
      {"disk",
       [&](auto text) {
         options.disks = split(text);
         return !text.empty();
       }},
      {"direct",
       [&](auto text) {
         direct_given = true;
         options.direct = text == "1";
         return text == "0" || text == "1";
       }},
      {"offset", size(options.offset)},
      {"area", size(options.area_bytes)},
      {"hot", size(options.hot_bytes)},
      {"disk_rate", size(options.disk_rate)},
      {"random", number(options.random_percent, 100)},
      {"hot_percent", number(options.hot_percent, 100)},
      {"fsync", number(options.fsync_every, 65536)},
      {"file", string(options.file_name)},
      {"fs", string(options.mount_type)},
      {"mem", size(options.memory_bytes)},
      {"mem_rate", size(options.memory_rate)},
      {"warm", size(options.warm_bytes)},
      {"heartbeat", number(options.heartbeat_ms, 60000)},
      {"seconds", number(options.seconds, 86400)},
      {"seed", size(options.seed)},
      {"log", string(options.log_path)},
      {"heartbeat_log", string(options.heartbeat_path)},
  };
  for (const std::string& word : words) {
    const std::string_view view = word;
    if (!view.starts_with("vf.")) continue;  // the kernel's own words
    const std::size_t equals = view.find('=');
    const auto setter = setters.find(view.substr(3, equals == std::string_view::npos ? equals : equals - 3));
    const bool good =
        equals != std::string_view::npos && setter != setters.end() && setter->second(view.substr(equals + 1));
    // The others still count: among them is the place where the error goes to.
    if (!good && error.empty()) error = "bad option '" + word + "'";
  }
  if (options.mode == DiskMode::File && !direct_given) options.direct = false;
  return error.empty();
}

}  // namespace vmferry::guest
