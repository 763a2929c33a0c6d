// SPDX-License-Identifier: Apache-2.0
//
// What happened, for operators and scripts: a bounded ring that `vmferry events` reads and follows.
//
// Names of events are stable words (role_changed, migration_phase, peer_connected, ...; docs/operations.md).
// Threads: the daemon's reactor.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <string>

#include "engine/runtime/executor.h"
#include "netproto/rpc/json_lines.h"

namespace vmferry {

class EventLog {
 public:
  explicit EventLog(Executor& executor, size_t count_max = 1000) : executor_(executor), count_max_(count_max) {}

  // `fields` is an object; "seq", "time" (RFC 3339, UTC) and "event" are added.
  void add(const std::string& event, Json fields = Json::object());

  // The kept events with seq >= from, oldest first.
  std::vector<Json> since(uint64_t from) const;
  uint64_t next_seq() const { return next_seq_; }

  using Watcher = std::function<void(const Json&)>;
  uint64_t watch(Watcher watcher);
  void unwatch(uint64_t id) { watchers_.erase(id); }

 private:
  Executor& executor_;
  const size_t count_max_;
  std::deque<Json> ring_;
  uint64_t next_seq_ = 1;
  std::map<uint64_t, Watcher> watchers_;
  uint64_t next_watcher_ = 1;
};

std::string format_time(Nanoseconds wall);  // 2026-01-31T12:00:00.123Z

}  // namespace vmferry
