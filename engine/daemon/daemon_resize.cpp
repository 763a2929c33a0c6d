// SPDX-License-Identifier: Apache-2.0
//
// Growing a volume: the peer first, durably, then tracking, then the store; exports show the new size to new clients.
//
// The group is closed meanwhile at both ends, so that its replication begins anew with the new sizes; the guest writes
// on, tracked. A failure in between leaves a larger peer, which is refused until the command is repeated.
#include "engine/base/log.h"
#include "engine/daemon/daemon.h"
#include "engine/runtime/steps.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kPeerGrowTimeout = 30 * kSecond;
// What a peer may ask for at once: tracking takes memory by size (I9, I11).
constexpr uint64_t kPeerGrowthMax = uint64_t{1} << 40;

}  // namespace

void Daemon::resize_volume(const std::string& name, uint64_t size, Done done) {
  const auto found = volume(name);
  if (!found) return done(tl::unexpected(found.error()));
  const uint64_t present = (*found)->device().size();
  if (size <= present) {
    return done(fail(ErrorKind::InvalidArgument, "volume '{}' has {} bytes; {} is not larger, and volumes only grow",
                     name, present, size));
  }
  Group* const group = group_of(name);
  if (group == nullptr || regrouping_) {
    return done(fail(ErrorKind::Busy, "volume '{}' is being regrouped; try again", name));
  }
  const GroupRecord& record = group->record();
  if (record.peer.empty()) return grow_volume(name, size, std::move(done));
  if (group->ownership().role != Role::Primary) {
    return done(
        fail(ErrorKind::Fenced, "volume '{}' is secondary here; grow it at its primary, '{}'", name, record.peer));
  }
  if (group->coordinator().migrating()) return done(fail(ErrorKind::Busy, "a migration of '{}' is under way", name));
  if (peers_->link(record.peer) == nullptr || !group->connected()) {
    return done(fail(ErrorKind::Unavailable, "peer '{}' has to grow first and is not connected", record.peer));
  }
  regroup_with_size(
      *group,
      [this, name, size, peer = record.peer](StepDone next) {
        PeerLink* const link = peers_->link(peer);
        if (link == nullptr) return next(fail(ErrorKind::Unavailable, "peer '{}' was removed", peer));
        const Json request{{"volume", name}, {"size", size}};
        link->request(
            "resize", to_json_line(request),
            [this, name, size, next](const Result<std::string>& answer) {
              if (!answer) return next(fail_with(answer.error(), "at the peer"));
              grow_volume(name, size, next);
            },
            kPeerGrowTimeout);
      },
      std::move(done));
}

// Closes the group, runs `grow`, and opens the group again whatever came of it.
void Daemon::regroup_with_size(Group& group, AsyncStep grow, Done done) {
  GroupRecord record = group.record();
  record.ownership = group.ownership();
  regrouping_ = true;
  resizing_ = record.id;
  run_all_steps(
      {[this, id = record.id](StepDone next) { close_groups({id}, std::move(next)); }, std::move(grow),
       [this, record](StepDone next) { open_group(record, std::move(next)); }},
      [this, record, id = record.id, peer = record.peer, done = std::move(done)](const Status& status) {
        regrouping_ = false;
        resizing_ = {};
        const auto slot = groups_.find(id);
        if (slot != groups_.end() && slot->second.group->is_open())
          connect_group(*slot->second.group);
        else
          group_lost(record, status.error());
        // Hellos are said once per connection, and these are of other sizes.
        if (PeerLink* const link = peers_->link(peer);
            link != nullptr && slot != groups_.end() && slot->second.group->ownership().role == Role::Primary) {
          link->reconnect({ErrorKind::Unavailable, "a volume has grown"});
        }
        done(status);
      });
}

void Daemon::grow_volume(const std::string& name, uint64_t size, Done done) {
  Volume* const grown = volumes_.at(name).get();
  const uint64_t before = grown->device().size();
  run_steps({[grown, size](StepDone next) { grown->resize(size, std::move(next)); },
             [this, grown, name, before, size](StepDone next) {
               // A copy's dirty blocks would mean that somebody else wrote to it.
               const GroupRecord* const record = find_group_of(state_->record(), name);
               const bool copy = record == nullptr || record->ownership.role != Role::Primary;
               if (copy || !grown->device().tracking()) return next({});
               // A file's new end is zeroes on both sides, a block device's may be anything.
               grown->device().mark_dirty({before, size - before});
               grown->device().save_dirty(std::move(next));
             },
             [this, name, size](StepDone next) {
               state_->update(
                   [&](NodeRecord& record) {
                     if (record.volumes[name].size) record.volumes[name].size = size;
                   },
                   std::move(next));
             },
             [this, name](StepDone next) { attachments_.volume_grew(name, std::move(next)); }},
            [this, name, size, done = std::move(done)](const Status& status) {
              if (status) events_.add("volume_resized", {{"volume", name}, {"size", size}});
              done(status);
            });
}

// The primary asks its copy to grow first.
void Daemon::answer_resize(const PeerLink& link, const Json& request, PeerRequests::Answer answer) {
  const auto refuse = [&](ErrorKind kind, std::string text) { answer(tl::unexpected(Error{kind, std::move(text)})); };
  if (const Status allowed = peers_->check_right(link.name(), &PeerRights::replicate_in); !allowed) {
    return answer(tl::unexpected(allowed.error()));
  }
  if (!request.is_object() || !request.contains("volume") || !request["volume"].is_string() ||
      !request.contains("size") || !request["size"].is_number_unsigned()) {
    return refuse(ErrorKind::Corrupt, "a malformed question for a resize");
  }
  const std::string name = request["volume"];
  const uint64_t size = request["size"];
  const auto found = volumes_.find(name);
  Group* const group = found != volumes_.end() ? group_of(name) : nullptr;
  if (group == nullptr || group->record().peer != link.name()) {
    return refuse(ErrorKind::NotFound, fmt::format("no volume of that name is a copy of yours"));
  }
  if (group->ownership().state != HandoverState::Secondary || regrouping_) {
    return refuse(ErrorKind::Busy, fmt::format("volume '{}' is not an idle copy", name));
  }
  const uint64_t present = found->second->device().size();
  if (size == present) return answer(std::string("{}"));
  if (size < present || size - present > kPeerGrowthMax || size % 512 != 0) {
    return refuse(ErrorKind::InvalidArgument,
                  fmt::format("volume '{}' has {} bytes here and does not become {}; it grows by at most {} at a time",
                              name, present, size, kPeerGrowthMax));
  }
  regroup_with_size(
      *group, [this, name, size](StepDone next) { grow_volume(name, size, std::move(next)); },
      [answer](const Status& status) {
        if (status)
          answer(std::string("{}"));
        else
          answer(tl::unexpected(status.error()));
      });
}

}  // namespace vmferry
