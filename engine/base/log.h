// SPDX-License-Identifier: Apache-2.0
//
// Log lines for operators: `log::info("volume={} role={}", ...)`, keys first, units in the key (docs/operations.md).
//
// Threads: any. Before set_sink()/set_level() lines of level info and above go to standard error.
#pragma once

#include <fmt/format.h>

#include <functional>
#include <string_view>

#include "engine/base/result.h"

namespace vmferry::log {

enum class Level : uint8_t { Debug, Info, Warn, Error };

void set_level(Level level) noexcept;
bool enabled(Level level) noexcept;
Result<Level> parse_level(std::string_view text);
void write(Level level, std::string_view line);
// Tests and the simulator take the lines instead of standard error; an empty function restores it.
void set_sink(std::function<void(Level, std::string_view)> sink);

template <typename... Args>
void line(Level level, fmt::format_string<Args...> format, Args&&... args) {
  if (enabled(level)) write(level, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void debug(fmt::format_string<Args...> f, Args&&... args) {
  line(Level::Debug, f, std::forward<Args>(args)...);
}
template <typename... Args>
void info(fmt::format_string<Args...> f, Args&&... args) {
  line(Level::Info, f, std::forward<Args>(args)...);
}
template <typename... Args>
void warn(fmt::format_string<Args...> f, Args&&... args) {
  line(Level::Warn, f, std::forward<Args>(args)...);
}
template <typename... Args>
void error(fmt::format_string<Args...> f, Args&&... args) {
  line(Level::Error, f, std::forward<Args>(args)...);
}

}  // namespace vmferry::log
