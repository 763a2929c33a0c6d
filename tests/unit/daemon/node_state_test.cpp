// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "engine/daemon/node_state_json.h"
#include "tests/sim/sim_disk.h"
#include "tests/sim/sim_world.h"

namespace vmferry {
namespace {

NodeRecord sample() {
  NodeRecord record;
  record.node = Id128::parse("000102030405060708090a0b0c0d0e0f").value();
  record.volumes["vda"] = {.name = "vda",
                           .path = "/srv/a,b.img",
                           .size = 1_GiB,
                           .nbd = Endpoint::parse("tcp:127.0.0.1:10809").value(),
                           .read_only = true,
                           .description = "disk 1 of h\u00f4te",
                           .qmp = "/run/q",
                           .aio = AioSetting::Libaio,
                           .cache = CacheSetting::None};
  GroupRecord group;
  group.id = Id128::parse("ff000000000000000000000000000001").value();
  group.members = {"vda"};
  group.peer = "hostb";
  group.replication.active = true;
  group.ownership.role = Role::Secondary;
  group.ownership.owner = Owner::Peer;
  group.ownership.state = HandoverState::Prepared;
  group.ownership.term = 7;
  group.ownership.attempt = group.id;
  group.ownership.capabilities = "events,xbzrle";
  group.ownership.qemu = {.pid = 42, .start_time = 99, .boot_id = "b"};
  group.ownership.reason = "because";
  record.groups[group.id] = group;
  record.attachments["vda"] = {.device = "/dev/nbd3",
                               .identifier = "vmferry:1",
                               .connections = 4,
                               .dead_timeout_s = 300,
                               .request_timeout_s = 30};
  record.hooks[group.id] = {.volumes = {"vda", "vdb"}, .peer = "hostb", .guest_running = false, .starts = 1};
  return record;
}

// A field that does not survive is a role, term or peer forgotten by a restart.
TEST(NodeState, EveryFieldSurvives) {
  const Json written = to_json(sample());
  const auto read = node_record_from_json(written);
  ASSERT_TRUE(read) << read.error().text;
  EXPECT_EQ(to_json(*read), written);
  const Ownership& ownership = read->groups.begin()->second.ownership;
  EXPECT_EQ(ownership.state, HandoverState::Prepared);
  EXPECT_EQ(ownership.qemu.start_time, 99U);
  EXPECT_EQ(ownership.capabilities, "events,xbzrle");
  EXPECT_EQ(read->volumes.at("vda").nbd->port, 10809);
  EXPECT_TRUE(read->volumes.at("vda").read_only);
  EXPECT_EQ(read->volumes.at("vda").description, "disk 1 of h\u00f4te");
  EXPECT_EQ(read->hooks.begin()->second.volumes.size(), 2U);
  ASSERT_NE(find_group_of(*read, "vda"), nullptr);
  EXPECT_EQ(find_group_of(*read, "vdb"), nullptr);
}

// A record that is taken in part would start a volume with a default role: primary.
TEST(NodeState, EveryMissingOrWrongFieldIsRefused) {
  const Json whole = to_json(sample());
  const Json flat = whole.flatten();
  for (const auto& item : flat.items()) {
    const Json::json_pointer pointer(item.key());
    if (pointer.to_string().starts_with("/peers")) continue;
    Json broken = whole;
    broken[pointer] = Json::array({1.5});
    EXPECT_FALSE(node_record_from_json(broken)) << pointer.to_string();
  }
  Json older = whole;  // before there were hooks
  older.erase("hooks");
  EXPECT_TRUE(node_record_from_json(older));
  Json newer = whole;
  newer["format"] = 2;
  EXPECT_FALSE(node_record_from_json(newer));
  EXPECT_FALSE(node_record_from_json(Json::array()));
}

// A daemon that was updated must still start: its state knows no attachments.
TEST(NodeState, ARecordFromBeforeAttachmentsIsRead) {
  Json older = to_json(sample());
  older.erase("attachments");
  const auto read = node_record_from_json(older);
  ASSERT_TRUE(read) << read.error().text;
  EXPECT_TRUE(read->attachments.empty());
}

// An attachment without an identifier would take any device of an old kernel for its own.
TEST(NodeState, AttachmentsOutOfRangeAreRefused) {
  const auto with = [](const char* key, Json value) {
    Json broken = to_json(sample());
    broken["attachments"][0][key] = std::move(value);
    return node_record_from_json(broken).has_value();
  };
  EXPECT_TRUE(with("connections", 16U));
  EXPECT_FALSE(with("connections", 17U));
  EXPECT_FALSE(with("connections", 0U));
  EXPECT_FALSE(with("identifier", ""));
  EXPECT_FALSE(with("device", ""));
  EXPECT_FALSE(with("dead_timeout_s", uint64_t{1} << 32));
  Json twice = to_json(sample());
  twice["attachments"].push_back(twice["attachments"][0]);
  EXPECT_FALSE(node_record_from_json(twice));
}

// The coordinator saves in the middle of a transition; an answer inside the call would begin the next one in it.
TEST(NodeState, SavingForAGroupThatIsGoneFailsFromATask) {
  sim::SimWorld world(1);
  Executor& executor = world.add_executor("daemon");
  sim::SimDisk disk(world.add_executor("disk"), NodeState::kFileSize);  // not reached
  NodeState state(executor, disk);
  GroupOwnershipStore store(executor, state, *Id128::parse("ff000000000000000000000000000001"));
  std::optional<Status> answer;
  store.save({}, [&](const Status& status) { answer = status; });
  EXPECT_FALSE(answer) << "inline";
  world.run_for(kSecond);
  ASSERT_TRUE(answer);
  EXPECT_FALSE(*answer);
}

// A hook that were noted later than Running would be lost with a daemon that dies in between; one that were noted for
// anything else would tell the network that a guest is here that is not.
TEST(NodeState, AHookIsOwedFromTheRecordOfRunningOnAndForNothingElse) {
  sim::SimWorld world(1);
  Executor& executor = world.add_executor("daemon");
  sim::SimDisk disk(world.add_executor("disk"), NodeState::kFileSize);
  NodeState state(executor, disk);
  std::optional<Status> done;
  const auto noted = [&](const Status& status) { done = status; };
  const auto settle = [&] {
    world.run_for(kSecond);
    EXPECT_TRUE(done && *done);
    done.reset();
  };
  state.load(noted);
  settle();
  GroupRecord group = sample().groups.begin()->second;
  state.update([&](NodeRecord& record) { record.groups[group.id] = group; }, noted);
  settle();
  std::vector<Id128> arrived;
  GroupOwnershipStore store(executor, state, group.id, [&](const Id128& attempt) { arrived.push_back(attempt); });
  Ownership ownership = group.ownership;
  const auto save = [&](HandoverState to) {
    ownership.state = to;
    store.save(ownership, noted);
    settle();
  };
  // By force: the operator boots the guest, or takes care of what is there.
  for (const HandoverState from : {HandoverState::Prepared, HandoverState::Aborted, HandoverState::Primary}) {
    save(from);
    save(HandoverState::Running);
    save(HandoverState::Running);
  }
  save(HandoverState::Own);
  EXPECT_TRUE(arrived.empty());
  EXPECT_TRUE(state.record().hooks.empty());
  save(HandoverState::Started);
  save(HandoverState::Running);
  save(HandoverState::Running);
  ASSERT_EQ(arrived.size(), 1U);
  EXPECT_EQ(arrived.front(), ownership.attempt);
  NodeState again(executor, disk);
  again.load(noted);
  settle();
  ASSERT_EQ(again.record().hooks.size(), 1U);
  const HookRecord& hook = again.record().hooks.at(ownership.attempt);
  EXPECT_EQ(hook.volumes, group.members);
  EXPECT_EQ(hook.peer, "hostb");
  EXPECT_EQ(hook.starts, 0U);
  EXPECT_EQ(again.record().groups.at(group.id).ownership.state, HandoverState::Running);
}

}  // namespace
}  // namespace vmferry
