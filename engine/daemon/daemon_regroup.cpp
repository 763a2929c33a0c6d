// SPDX-License-Identifier: Apache-2.0
//
// One group takes the place of others: closed, recorded, opened; or, when that fails, everything as it was.
//
// Flow: form_group(), an offer of a peer and forget_peer_of() end here. The volumes stay open all the time; guests only
// wait. What the daemon knows about the copies (ReplicaState, in the staging file) goes with a group whose members stay
// the same, so that the same peer's copy is still known as one.
#include <algorithm>
#include <utility>

#include "engine/base/log.h"
#include "engine/daemon/daemon.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kReopenInterval = 5 * kSecond;

}  // namespace

void Daemon::close_groups(const std::vector<Id128>& ids, Done done) {
  std::vector<AsyncStep> steps;
  for (const Id128& id : ids) {
    if (!groups_.contains(id)) continue;
    steps.push_back([group = groups_.at(id).group.get()](StepDone next) { group->close(std::move(next)); });
  }
  for (const Id128& id : ids) {
    if (!groups_.contains(id)) continue;
    steps.push_back(
        [staging = groups_.at(id).staging.get()](StepDone next) { staging->when_idle([next] { next({}); }); });
  }
  steps.push_back([this, ids](StepDone next) {
    reactor_.post([this, ids, next] {
      for (const Id128& id : ids) groups_.erase(id);
      next({});
    });
  });
  run_steps(std::move(steps), std::move(done));
}

// Its name comes from a peer when the group does: it is one in our folder, whatever is there (design section 10).
std::string Daemon::name_of_staging(const Id128& id) {
  return id.to_string() + ".staging";
}

void Daemon::delete_staging(const Id128& id) {
  if (const Status removed = groups_folder_.remove(name_of_staging(id)); !removed) {
    log::warn("staging area: {}", removed.error().text);
  }
}

// A second name, so that a crash before the new group is recorded finds the old one complete.
Status Daemon::hand_over_staging(const Id128& from, const Id128& to) {
  const Status linked = groups_folder_.link(name_of_staging(from), name_of_staging(to));
  if (!linked) return fail_with(linked.error(), "staging area");
  return {};
}

void Daemon::replace_groups(const std::vector<Id128>& old_ids, const GroupRecord& record, CopyState copy,
                            std::function<void(Result<Group*>)> done) {
  regrouping_ = true;
  std::vector<GroupRecord> before;
  for (const Id128& id : old_ids) {
    before.push_back(groups_.at(id).group->record());
    before.back().ownership = groups_.at(id).group->ownership();
  }
  const bool same = copy == CopyState::Keep && before.size() == 1 && before.front().members == record.members;
  run_steps({[this, old_ids](StepDone next) { close_groups(old_ids, std::move(next)); },
             [this, same, from = old_ids.front(), to = record.id](StepDone next) {
               next(same ? hand_over_staging(from, to) : Status{});
             },
             [this, old_ids, record](StepDone next) {
               state_->update(
                   [&](NodeRecord& node) {
                     for (const Id128& id : old_ids) node.groups.erase(id);
                     node.groups[record.id] = record;
                   },
                   std::move(next));
             },
             [this, record](StepDone next) { open_group(record, std::move(next)); }},
            [this, old_ids, before, record, done = std::move(done)](const Status& status) {
              if (!status) return restore_groups(before, record, status.error(), done);
              regrouping_ = false;
              for (const std::string& name : record.members) group_troubles_.erase(name);
              for (const Id128& id : old_ids) delete_staging(id);
              Group* const group = groups_.at(record.id).group.get();
              connect_group(*group);
              done(group);
            });
}

// Each step is tried, whatever came of the one before: the volumes have to be usable again.
void Daemon::restore_groups(const std::vector<GroupRecord>& before, const GroupRecord& failed, const Error& error,
                            const std::function<void(Result<Group*>)>& done) {
  log::error("volume={} cannot be regrouped, everything stays as it was: {}", failed.members.front(), error.text);
  events_.add("regroup_failed", {{"volumes", failed.members}, {"reason", error.text}});
  std::vector<AsyncStep> steps{[this, id = failed.id](StepDone next) { close_groups({id}, std::move(next)); },
                               [this, id = failed.id, before](StepDone next) {
                                 delete_staging(id);
                                 state_->update(
                                     [&](NodeRecord& node) {
                                       node.groups.erase(id);
                                       for (const GroupRecord& record : before) node.groups[record.id] = record;
                                     },
                                     std::move(next));
                               }};
  for (const GroupRecord& record : before) {
    steps.push_back([this, record](StepDone next) {
      open_group(record, [this, record, next](const Status& opened) {
        if (opened)
          connect_anew(*groups_.at(record.id).group);
        else
          group_lost(record, opened.error());
        next({});
      });
    });
  }
  run_all_steps(std::move(steps), [this, failed, error, done](const Status& saved) {
    regrouping_ = false;
    if (!saved) log::error("volume={} its group is not saved: {}", failed.members.front(), saved.error().text);
    for (const std::string& name : failed.members) {
      const auto [trouble, added] = group_troubles_.try_emplace(name);
      if (added) trouble->second = fmt::format("the last change of its group failed: {}", error.text);
    }
    done(tl::unexpected(error));
  });
}

// A group that the peer knows already: hellos are said once per connection, and what it has heard is over.
void Daemon::connect_anew(Group& group) {
  connect_group(group);
  if (PeerLink* const link = peers_ != nullptr ? peers_->link(group.record().peer) : nullptr; link != nullptr) {
    link->reconnect({ErrorKind::Unavailable, "a group was opened again"});
  }
}

// A group that cannot be opened is tried again: the disk may have room, or be back, at any time.
void Daemon::group_lost(const GroupRecord& record, const Error& error) {
  log::error("volume={} cannot be used: {}", record.members.front(), error.text);
  if (!lost_groups_.contains(record.id)) {
    events_.add("alert", {{"volumes", record.members}, {"text", "the volumes cannot be used: " + error.text}});
  }
  lost_groups_[record.id] = record;
  for (const std::string& name : record.members) {
    group_troubles_[name] = fmt::format("it cannot be used, which is tried again every 5 s: {}", error.text);
  }
  if (!reopen_timer_.running()) reopen_timer_.start(kReopenInterval, [this] { reopen_lost_groups(); });
}

void Daemon::reopen_lost_groups() {
  if (regrouping_) return reopen_timer_.start(kReopenInterval, [this] { reopen_lost_groups(); });
  regrouping_ = true;
  std::vector<AsyncStep> steps;
  for (const auto& entry : lost_groups_) {
    const GroupRecord& record = entry.second;
    steps.push_back([this, id = record.id](StepDone next) { close_groups({id}, std::move(next)); });
    steps.push_back([this, record](StepDone next) {
      open_group(record, [this, record, next](const Status& opened) {
        if (!opened) {
          group_lost(record, opened.error());
          return next({});
        }
        lost_groups_.erase(record.id);
        for (const std::string& name : record.members) group_troubles_.erase(name);
        connect_anew(*groups_.at(record.id).group);
        next({});
      });
    });
  }
  run_all_steps(std::move(steps), [this](const Status&) {
    regrouping_ = false;
    if (!lost_groups_.empty() && !reopen_timer_.running()) {
      reopen_timer_.start(kReopenInterval, [this] { reopen_lost_groups(); });
    }
  });
}

std::string Daemon::group_trouble(const std::string& volume) const {
  const auto found = group_troubles_.find(volume);
  return found != group_troubles_.end() ? found->second : "";
}

std::string Daemon::why_without_group(const std::string& volume) const {
  const std::string trouble = group_trouble(volume);
  return trouble.empty() ? fmt::format("volume '{}' is being regrouped; try again", volume)
                         : fmt::format("volume '{}': {}", volume, trouble);
}

void Daemon::forget_peer_of(Group& group, Done done) {
  if (regrouping_) return done(fail(ErrorKind::Busy, "another group is being formed; try again"));
  if (const Status allowed = group.may_stop_replication(); !allowed) return done(allowed);
  note_replication_states();  // the last one, also when it was there for a moment only
  GroupRecord record = group.record();
  record.ownership = group.ownership();
  record.peer.clear();
  record.replication = {};
  const Id128 id = record.id;
  // A group of several volumes stays one: they belong to one guest.
  record.id = reactor_.new_id();
  record.left = id;
  group.say_stopped();
  replace_groups({id}, record, CopyState::Keep, [done = std::move(done)](const Result<Group*>& replaced) {
    if (!replaced) return done(tl::unexpected(replaced.error()));
    done({});
  });
}

}  // namespace vmferry
