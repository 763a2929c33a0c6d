// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/node_state.h"

#include "engine/base/assert.h"
#include "engine/daemon/node_state_json.h"

namespace vmferry {

namespace {

constexpr DurableRecordPlace kPlace{
    .offset = 0, .slot_size = NodeState::kSlotSize, .kind = record_kind("NODE"), .version = 1};

}  // namespace

NodeState::NodeState(Executor& executor, BlockDevice& device) : executor_(executor), durable_(device, kPlace) {}

void NodeState::load(Done done) {
  durable_.load([this, done = std::move(done)](Result<std::optional<Bytes>> loaded) {
    if (!loaded) return done(fail_with(loaded.error(), "node state"));
    if (!loaded->has_value()) {
      record_.node = executor_.new_id();
      return done({});
    }
    const auto json = parse_json(as_text(**loaded), {.line_size_max = kSlotSize, .depth_max = 32});
    if (!json) return done(fail_with(json.error(), "node state"));
    auto record = node_record_from_json(*json);
    if (!record) return done(fail_with(record.error(), "node state"));
    record_ = std::move(*record);
    done({});
  });
}

void NodeState::update(const std::function<void(NodeRecord&)>& change, Done done) {
  NodeRecord next = record_;
  change(next);
  const std::string text = to_json_line(to_json(next));
  if (text.size() > durable_.payload_size_max()) {
    return executor_.post([done = std::move(done)] {
      done(fail(ErrorKind::LimitExceeded, "the node state would exceed {} bytes: too many volumes", kSlotSize));
    });
  }
  record_ = std::move(next);
  const ByteSpan bytes = as_bytes(text);
  durable_.save(Bytes(bytes.begin(), bytes.end()), std::move(done));
}

const GroupRecord* find_group_of(const NodeRecord& record, const std::string& volume) {
  for (const auto& [id, group] : record.groups) {
    for (const std::string& member : group.members) {
      if (member == volume) return &group;
    }
  }
  return nullptr;
}

void GroupOwnershipStore::save(const Ownership& ownership, std::function<void(Status)> done) {
  if (!state_.record().groups.contains(group_)) {
    // From a task: the coordinator saves in the middle of a transition.
    return executor_.post([done = std::move(done), name = group_.to_string()] {
      done(fail(ErrorKind::NotFound, "group {} is gone", name));
    });
  }
  const GroupRecord& before = state_.record().groups.at(group_);
  // By `cont`, or because it was to stay paused. What the operator forces is Running from other states.
  const bool arrived = arrived_ && before.ownership.state == HandoverState::Started &&
                       ownership.state == HandoverState::Running && before.ownership.attempt == ownership.attempt;
  if (!arrived) {
    return state_.update([&](NodeRecord& record) { record.groups.at(group_).ownership = ownership; }, std::move(done));
  }
  state_.update(
      [&](NodeRecord& record) {
        GroupRecord& group = record.groups.at(group_);
        group.ownership = ownership;
        record.hooks[ownership.attempt] = {
            .volumes = group.members, .peer = group.peer, .guest_running = ownership.guest_was_running};
      },
      [arrived_here = arrived_, attempt = ownership.attempt, done = std::move(done)](const Status& saved) {
        if (saved) arrived_here(attempt);
        done(saved);
      });
}

}  // namespace vmferry
