// SPDX-License-Identifier: Apache-2.0
//
// What a paired peer may ask of a group is decided where it is asked (design section 10). An honest peer does not ask
// for what it was not granted, so that only a hand-made one shows whether anybody looks.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "engine/daemon/group.h"
#include "netproto/repl/handover_messages.h"
#include "tests/sim/sim_disk.h"
#include "tests/sim/sim_world.h"

namespace vmferry {
namespace {

constexpr uint64_t kVolumeSize = 1U << 20;

struct Sent {
  MessageType type;
  Bytes payload;
};

class RecordingChannel final : public GroupChannel {
 public:
  explicit RecordingChannel(std::vector<Sent>& sent) : sent_(sent) {}
  bool connected() const override { return true; }
  bool peer_has(uint64_t) const override { return true; }
  void send(TrafficClass, MessageType type, Bytes payload) override { sent_.push_back({type, std::move(payload)}); }
  uint64_t queued_bytes(TrafficClass) const override { return 0; }
  uint64_t queue_limit(TrafficClass) const override { return 1U << 20; }
  LinkFigures figures() const override { return {}; }

 private:
  std::vector<Sent>& sent_;
};

class MemoryStore final : public OwnershipStore {
 public:
  explicit MemoryStore(Executor& executor) : executor_(executor) {}
  void save(const Ownership&, std::function<void(Status)> done) override {
    executor_.post([done = std::move(done)] { done({}); });
  }

 private:
  Executor& executor_;
};

// A secondary whose peer says that it is the primary.
class GroupRightsTest : public ::testing::Test {
 protected:
  void open(const GroupRights& rights) {
    GroupRecord record;
    record.id = *Id128::parse("ff000000000000000000000000000001");
    record.members = {"vda"};
    record.peer = "a";
    record.replication.active = true;
    record.ownership.role = Role::Secondary;
    record.ownership.owner = Owner::Peer;
    record.ownership.state = HandoverState::Secondary;
    device_.open([](const Status& status) { ASSERT_TRUE(status.has_value()); });
    world_.run_for(kSecond);
    group_ = std::make_unique<Group>(record, std::vector<ReplicaVolume>{{"vda", &device_}},
                                     GroupParts{.executor = executor_,
                                                .ownership = store_,
                                                .staging = staging_,
                                                .make_qemu = [](const std::string&) { return nullptr; },
                                                .qmp_path = ""},
                                     GroupOptions{}, GroupEvents{});
    bool opened = false;
    group_->open([&](const Status& status) { opened = status.has_value(); });
    world_.run_for(kSecond);
    ASSERT_TRUE(opened);
    group_->set_channel(std::make_unique<RecordingChannel>(sent_), rights);
    group_->channel_handler().channel_connected();
    world_.run_for(kSecond);
    sent_.clear();
    GroupHello hello;
    hello.volumes = {{"vda", kVolumeSize}};
    hello.role = static_cast<uint8_t>(Role::Primary);
    hello.term = 1;
    hello.quality = CopyQuality::Source;
    hello.lineage = executor_.new_id();
    hello.session = executor_.new_id();
    say(MessageType::GroupHello, encode(hello));
  }
  void TearDown() override {
    if (group_ == nullptr) return;
    group_->close([](const Status&) {});
    world_.run_for(kSecond);
    group_.reset();
    device_.close([](const Status&) {});
    world_.run_for(kSecond);
  }
  void say(MessageType type, const Bytes& payload) {
    group_->channel_handler().channel_message(type, payload);
    world_.run_for(kSecond);
  }
  // "" when the group refused nothing.
  std::string refusal() const {
    for (const Sent& message : sent_) {
      if (message.type != MessageType::GroupReject) continue;
      const auto reject = decode_group_reject(message.payload);
      return reject ? reject->reason : "malformed";
    }
    return "";
  }
  bool answered(MessageType type) const {
    return std::any_of(sent_.begin(), sent_.end(), [type](const Sent& message) { return message.type == type; });
  }

  void ask_to_verify() { say(MessageType::VerifyRequest, encode(VerifyRequest{.id = 1, .range = {0, 4096}})); }
  void prepare() { say(MessageType::Prepare, encode(PrepareMessage{.attempt = executor_.new_id(), .term = 2})); }

  sim::SimWorld world_{1};
  sim::SimExecutor& executor_ = world_.add_executor("b");
  sim::SimDisk disk_{executor_, kVolumeSize};
  sim::SimDisk metadata_{executor_, TrackedDevice::metadata_size(kVolumeSize)};
  sim::SimDisk staging_{executor_, 8U << 20};
  TrackedDevice device_{executor_, disk_, metadata_, TrackOptions{}};
  MemoryStore store_{executor_};
  std::vector<Sent> sent_;
  std::unique_ptr<Group> group_;
};

TEST_F(GroupRightsTest, WithAllRightsNothingIsRefused) {
  open({});
  ask_to_verify();
  EXPECT_TRUE(answered(MessageType::VerifyReply));
  prepare();
  EXPECT_TRUE(answered(MessageType::Prepared)) << "there is no QEMU, which is an answer";
  EXPECT_EQ(refusal(), "");
}

// Digests of pieces of any size tell a peer what a disk holds, block by block.
TEST_F(GroupRightsTest, WithoutVerifyNoDigestIsGiven) {
  open({.replicate_in = true, .verify = false, .migrate_in = true});
  ask_to_verify();
  EXPECT_NE(refusal().find("no right verify"), std::string::npos) << refusal();
  EXPECT_FALSE(answered(MessageType::VerifyReply));
}

// Its stream is code in the QEMU here.
TEST_F(GroupRightsTest, WithoutMigrateInNoMigrationIsPrepared) {
  open({.replicate_in = true, .verify = true, .migrate_in = false});
  prepare();
  EXPECT_NE(refusal().find("no right migrate-in"), std::string::npos) << refusal();
  EXPECT_FALSE(answered(MessageType::Prepared));
  EXPECT_EQ(group_->ownership().state, HandoverState::Secondary);
}

TEST_F(GroupRightsTest, WithoutReplicateInItsHelloIsRefused) {
  open({.replicate_in = false, .verify = true, .migrate_in = true});
  EXPECT_NE(refusal().find("no right replicate-in"), std::string::npos) << refusal();
}

}  // namespace
}  // namespace vmferry
