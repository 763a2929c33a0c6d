// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/hooks.h"

#include <algorithm>
#include <utility>

#include "engine/base/log.h"
#include "engine/base/text.h"

namespace vmferry {

namespace {

constexpr size_t kRunningMax = 8;
constexpr uint64_t kStartsMax = 2;
constexpr const char* kPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
  return text;
}

}  // namespace

Hooks::Hooks(Reactor& reactor, NodeState& state, EventLog& events, std::string program)
    : reactor_(reactor), state_(state), events_(events), program_(std::move(program)) {}

Hooks::~Hooks() = default;

void Hooks::begin(const Id128& attempt) {
  if (!is_known(attempt)) waiting_.push_back(attempt);
  begin_next();
}

bool Hooks::is_known(const Id128& attempt) const {
  return running_.contains(attempt) || std::find(waiting_.begin(), waiting_.end(), attempt) != waiting_.end();
}

void Hooks::stop() {
  stopped_ = true;
  waiting_.clear();
  running_.clear();
}

void Hooks::resume() {
  std::vector<Id128> over;
  for (const auto& [attempt, hook] : state_.record().hooks) {
    if (is_known(attempt)) continue;  // a handover that ended while we started
    if (wanted() && hook.starts < kStartsMax) {
      log::warn("volume={} hook was not seen to end before the daemon stopped: it is run again", hook.volumes.front());
      waiting_.push_back(attempt);
      continue;
    }
    if (wanted()) {
      const std::string reason = fmt::format("it was begun {} times and the daemon stopped each time", hook.starts);
      log::warn("volume={} hook '{}' is given up: {}", hook.volumes.front(), program_, reason);
      events_.add("hook_failed", {{"volumes", hook.volumes}, {"attempt", attempt.to_string()}, {"reason", reason}});
    }
    over.push_back(attempt);
  }
  for (const Id128& attempt : over) forget(attempt);
  begin_next();
}

void Hooks::begin_next() {
  while (!stopped_ && !waiting_.empty() && running_.size() < kRunningMax) {
    const Id128 attempt = waiting_.front();
    waiting_.pop_front();
    const auto found = state_.record().hooks.find(attempt);
    if (found == state_.record().hooks.end()) continue;
    running_[attempt] = nullptr;
    state_.update([&](NodeRecord& record) { ++record.hooks[attempt].starts; },
                  [this, alive = alive_.token(), attempt, hook = found->second](const Status& saved) {
                    if (!alive() || stopped_) return;
                    // The guest's network waits for it: better twice than not at all.
                    if (!saved) log::warn("volume={} hook: {}", hook.volumes.front(), saved.error().text);
                    run(attempt, hook);
                  });
  }
}

void Hooks::run(const Id128& attempt, const HookRecord& hook) {
  // Again, because the file may have been replaced since the start.
  if (const Status safe = check_hook(program_); !safe) return ended(attempt, hook, safe);
  const std::string& first = hook.volumes.front();
  log::info("volume={} attempt={} hook '{}' begins", first, attempt.to_string(), program_);
  ProgramOptions options;
  options.arguments = {program_, "running"};
  for (const std::string& volume : hook.volumes) options.arguments.push_back(volume);
  options.environment = {fmt::format("PATH={}", kPath),
                         "LANG=C",
                         "VMFERRY_EVENT=running",
                         fmt::format("VMFERRY_VOLUMES={}", joined(hook.volumes)),
                         fmt::format("VMFERRY_PEER={}", hook.peer),
                         fmt::format("VMFERRY_ATTEMPT={}", attempt.to_string()),
                         fmt::format("VMFERRY_GUEST={}", hook.guest_running ? "running" : "paused")};
  options.time_limit = kTimeLimit;
  running_[attempt] = std::make_unique<ProgramRun>(
      reactor_, std::move(options),
      [first](std::string_view line) { log::info("volume={} hook output: {}", first, printable(line)); },
      [this, attempt, hook](const Status& status) {
        // From a task: the run is destroyed there.
        reactor_.post([this, alive = alive_.token(), attempt, hook, status] {
          if (alive() && !stopped_) ended(attempt, hook, status);
        });
      });
}

void Hooks::ended(const Id128& attempt, const HookRecord& hook, const Status& status) {
  running_.erase(attempt);
  Json fields{{"volumes", hook.volumes}, {"peer", hook.peer}, {"attempt", attempt.to_string()}};
  if (status) {
    log::info("volume={} hook '{}' has ended", hook.volumes.front(), program_);
    events_.add("hook_ended", std::move(fields));
  } else {
    log::warn("volume={} hook failed; the guest runs here all the same: {}", hook.volumes.front(), status.error().text);
    fields["reason"] = status.error().text;
    events_.add("hook_failed", std::move(fields));
  }
  forget(attempt);
  begin_next();
}

void Hooks::forget(const Id128& attempt) {
  state_.update([&](NodeRecord& record) { record.hooks.erase(attempt); },
                [](const Status& saved) {
                  if (!saved) log::warn("that a hook has ended is not saved: {}", saved.error().text);
                });
}

}  // namespace vmferry
