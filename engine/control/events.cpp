// SPDX-License-Identifier: Apache-2.0
#include "engine/control/events.h"

#include <ctime>

#include "engine/base/log.h"

namespace vmferry {

std::string format_time(Nanoseconds wall) {
  const time_t seconds = wall / kSecond;
  tm parts{};
  gmtime_r(&seconds, &parts);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z", parts.tm_year + 1900, parts.tm_mon + 1,
                     parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec, wall % kSecond / kMillisecond);
}

void EventLog::add(const std::string& event, Json fields) {
  fields["seq"] = next_seq_++;
  fields["time"] = format_time(executor_.wall_now());
  fields["event"] = event;
  log::info("event={} {}", event, fields.dump(-1, ' ', false, Json::error_handler_t::replace));
  ring_.push_back(fields);
  if (ring_.size() > count_max_) ring_.pop_front();
  const auto watchers = watchers_;  // a watcher may leave while it is called
  for (const auto& [id, watcher] : watchers) watcher(fields);
}

std::vector<Json> EventLog::since(uint64_t from) const {
  std::vector<Json> result;
  for (const Json& event : ring_) {
    if (event["seq"].get<uint64_t>() >= from) result.push_back(event);
  }
  return result;
}

uint64_t EventLog::watch(Watcher watcher) {
  watchers_.emplace(next_watcher_, std::move(watcher));
  return next_watcher_++;
}

}  // namespace vmferry
