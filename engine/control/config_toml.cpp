// SPDX-License-Identifier: Apache-2.0
//
// The TOML file: same keys as the options; volumes as an array of tables [[volume]].
#define TOML_EXCEPTIONS 0
#include <toml++/toml.h>

#include "engine/base/utf8.h"
#include "engine/control/config_internal.h"

namespace vmferry {

namespace {

constexpr size_t kFileSizeMax = 1U << 20;

std::string place(const std::string& name, const toml::node& node) {
  return fmt::format("{}:{}", name, node.source().begin.line);
}

// toml++ 3.3 is undefined for most characters from U+00A0 to U+FEFF that stand outside of strings and comments, and
// behind a backslash in strings of several lines (is_non_ascii_horizontal_whitespace runs into __builtin_unreachable).
// Whatever is beyond ASCII is therefore handed to it in plane 16, for private use, where that function returns at once,
// and moved back in every text that comes out of it. Where quotes begin and end stays the business of the parser.
constexpr uint32_t kPlane = 0x100000;

void append_character(std::string& text, uint32_t code) {
  if (code < 0x80) {
    text += static_cast<char>(code);
    return;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  text += static_cast<char>((0xFFU << (7 - more) & 0xFFU) | code >> (6 * more));
  for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80U | (code >> (6 * i) & 0x3FU));
}

struct Hidden {
  std::string text;
  size_t bad_line = 0;  // 0: none
  const char* problem = nullptr;
};

Hidden hide(std::string_view text) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);  // a byte order mark
  Hidden hidden;
  size_t line = 1;
  const auto refuse = [&](const char* problem) {
    hidden.bad_line = line;
    hidden.problem = problem;
    return hidden;
  };
  for (std::optional<Utf8Character> c; !text.empty(); text.remove_prefix(c->length)) {
    c = first_utf8_character(text);
    if (!c) return refuse("bytes that are not UTF-8, the encoding of TOML");
    if (c->code >= kPlane || text.starts_with("\\U0010"))
      return refuse("a character for private use (U+100000 and above), which no name or path of ours can have");
    if (c->code == '\n') ++line;
    append_character(hidden.text, c->code >= 0x80 && c->code < 0x10000 ? c->code + kPlane : c->code);
  }
  return hidden;
}

std::string reveal(std::string_view text) {
  std::string revealed;
  for (std::optional<Utf8Character> c; !text.empty(); text.remove_prefix(c->length)) {
    c = first_utf8_character(text);
    if (!c) c = Utf8Character{'?', 1};  // toml++ hands out UTF-8 only
    append_character(revealed, c->code >= kPlane ? c->code - kPlane : c->code);
  }
  return revealed;
}

// Strings and integers are what our keys take, and true or false for those that are switched; everything else names its
// type in the problem.
std::optional<std::string> scalar(std::string_view key, const toml::node& node) {
  if (const auto* flag = node.as_boolean(); flag != nullptr && config_detail::is_switch(key))
    return flag->get() ? "on" : "off";
  if (const auto* text = node.as_string()) return reveal(text->get());
  if (const auto* number = node.as_integer()) return fmt::format("{}", number->get());
  return std::nullopt;
}

void apply_volume(const toml::table& table, const std::string& name, DaemonConfig& config,
                  std::vector<ConfigProblem>& problems) {
  config_detail::VolumeSettings settings(place(name, table), problems);
  for (const auto& [key, value] : table) {
    const std::string known_as = reveal(key.str());
    if (const auto text = scalar(known_as, value)) {
      settings.set(known_as, *text, place(name, value));
    } else {
      problems.push_back({place(name, value),
                          fmt::format("'{}' has to be {}", known_as,
                                      config_detail::is_switch(known_as) ? "true or false" : "a string or a number")});
    }
  }
  config.volumes.push_back(settings.finish());
}

}  // namespace

void apply_toml(std::string_view text, const std::string& name, DaemonConfig& config,
                std::vector<ConfigProblem>& problems) {
  if (text.size() > kFileSizeMax) {
    problems.push_back({name, fmt::format("{} bytes are over the limit of {}", text.size(), kFileSizeMax)});
    return;
  }
  const Hidden hidden = hide(text);
  if (hidden.bad_line > 0) {
    problems.push_back({fmt::format("{}:{}", name, hidden.bad_line), hidden.problem});
    return;
  }
  const toml::parse_result parsed = toml::parse(hidden.text, name);
  if (!parsed) {
    problems.push_back(
        {fmt::format("{}:{}", name, parsed.error().source().begin.line), reveal(parsed.error().description())});
    return;
  }
  for (const auto& [key, value] : parsed.table()) {
    if (reveal(key.str()) == "volume") {
      const toml::array* volumes = value.as_array();
      if (volumes == nullptr || !volumes->is_homogeneous(toml::node_type::table)) {
        problems.push_back({place(name, value), "'volume' has to be an array of tables: [[volume]]"});
        continue;
      }
      for (const toml::node& volume : *volumes) apply_volume(*volume.as_table(), name, config, problems);
    } else if (const auto text_value = scalar(reveal(key.str()), value)) {
      config_detail::apply_setting(reveal(key.str()), *text_value, place(name, value), config, problems);
    } else {
      problems.push_back({place(name, value), fmt::format("'{}' has to be a string or a number", reveal(key.str()))});
    }
  }
}

}  // namespace vmferry
