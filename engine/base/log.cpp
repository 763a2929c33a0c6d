// SPDX-License-Identifier: Apache-2.0
#include "engine/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <mutex>

namespace vmferry::log {

namespace {

std::atomic<Level> current_level{Level::Info};

struct SinkSlot {
  std::mutex mutex;
  std::function<void(Level, std::string_view)> sink;
};

SinkSlot& sink_slot() {
  static SinkSlot slot;
  return slot;
}

spdlog::logger& standard_error() {
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made = std::make_shared<spdlog::logger>("vmferry", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %l %v");
    made->set_level(spdlog::level::trace);  // write() has filtered already
    made->flush_on(spdlog::level::info);
    return made;
  }();
  return *logger;
}

spdlog::level::level_enum to_spdlog(Level level) {
  switch (level) {
    case Level::Debug:
      return spdlog::level::debug;
    case Level::Info:
      return spdlog::level::info;
    case Level::Warn:
      return spdlog::level::warn;
    case Level::Error:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

}  // namespace

void set_level(Level level) noexcept {
  current_level.store(level, std::memory_order_relaxed);
}

bool enabled(Level level) noexcept {
  return level >= current_level.load(std::memory_order_relaxed);
}

Result<Level> parse_level(std::string_view text) {
  if (text == "debug") return Level::Debug;
  if (text == "info") return Level::Info;
  if (text == "warn") return Level::Warn;
  if (text == "error") return Level::Error;
  return fail(ErrorKind::InvalidArgument, "log level '{}' is not one of debug, info, warn, error", text);
}

void write(Level level, std::string_view line) {
  SinkSlot& slot = sink_slot();
  const std::lock_guard lock(slot.mutex);
  if (slot.sink) {
    slot.sink(level, line);
  } else {
    standard_error().log(to_spdlog(level), "{}", fmt::string_view(line.data(), line.size()));
  }
}

void set_sink(std::function<void(Level, std::string_view)> sink) {
  SinkSlot& slot = sink_slot();
  const std::lock_guard lock(slot.mutex);
  slot.sink = std::move(sink);
}

}  // namespace vmferry::log
