// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/preflight.h"

#include <gmock/gmock.h>

#include <functional>

namespace vmferry {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

PreflightFacts good_facts() {
  PreflightFacts facts;
  facts.peer_connected = true;
  facts.peer_name = "b";
  facts.volumes = {{.name = "root",
                    .size_here = 1 << 30,
                    .size_there = 1 << 30,
                    .primary_here = true,
                    .secondary_there = true,
                    .foreign_data_there = false}};
  QemuPreflight qemu;
  qemu.reachable = true;
  qemu.version = "10.0.2";
  qemu.major = 10;
  qemu.machine = "pc-q35-10.0";
  qemu.cpu = "qemu64";
  qemu.ram_bytes = 512 << 20;
  qemu.blocks = {{.device = "/machine/disk0",
                  .volume = "root",
                  .writable = true,
                  .inserted = true,
                  .medium = "nbd",
                  .nbd_without_reconnect = false},
                 {.device = "/machine/cd",
                  .volume = "",
                  .writable = false,
                  .inserted = true,
                  .medium = "seed.iso",
                  .nbd_without_reconnect = false}};
  facts.source = qemu;
  facts.source.running = true;
  facts.destination = qemu;
  facts.destination.fresh = true;
  facts.staging_free_there = 1 << 30;
  facts.staging_needed = 1 << 20;
  facts.rtt = 40 * kMillisecond;
  facts.link_rate = 12'500'000;
  facts.fsync_here = 2 * kMillisecond;
  facts.fsync_there = 3 * kMillisecond;
  facts.disk_dirty_rate = 1'000'000;
  facts.memory_dirty_rate = 2'000'000;
  facts.downtime_limit = 300 * kMillisecond;
  return facts;
}

TEST(Preflight, GoodFactsHaveNoProblemAndNoWarning) {
  const PreflightReport report = preflight(good_facts());
  EXPECT_THAT(report.problems, IsEmpty());
  EXPECT_THAT(report.warnings, IsEmpty());
}

struct Row {
  const char* name;
  std::function<void(PreflightFacts&)> change;
  const char* expected;
};

// Whatever is not refused here stops the guest first and fails afterwards.
TEST(Preflight, EachObstacleIsOneProblemThatNamesIt) {
  const Row rows[] = {
      {"not owner", [](PreflightFacts& f) { f.not_owner_reason = "the peer owns it"; }, "the peer owns it"},
      {"no right", [](PreflightFacts& f) { f.peer_grants_migrate = false; }, "migrate-in"},
      {"peer busy", [](PreflightFacts& f) { f.peer_not_ready_reason = "busy"; }, "busy"},
      {"missing volume", [](PreflightFacts& f) { f.volumes[0].size_there.reset(); }, "volume add name=root"},
      {"size", [](PreflightFacts& f) { f.volumes[0].size_there = 5; }, "5 at peer 'b'"},
      {"role here", [](PreflightFacts& f) { f.volumes[0].primary_here = false; }, "not primary here"},
      {"role there", [](PreflightFacts& f) { f.volumes[0].secondary_there = false; }, "not secondary"},
      {"foreign data", [](PreflightFacts& f) { f.volumes[0].foreign_data_there = true; }, "--overwrite-peer"},
      {"source gone", [](PreflightFacts& f) { f.source.reachable = false; }, "does not answer"},
      {"source stopped", [](PreflightFacts& f) { f.source.running = false; }, "neither running"},
      {"blocked", [](PreflightFacts& f) { f.source.blocked_reasons = {"9p"}; }, "9p"},
      {"destination gone", [](PreflightFacts& f) { f.destination.reachable = false; }, "does not answer"},
      {"destination used", [](PreflightFacts& f) { f.destination.fresh = false; }, "-incoming defer"},
      {"machine", [](PreflightFacts& f) { f.destination.machine = "pc-i440fx"; }, "machine type"},
      {"cpu", [](PreflightFacts& f) { f.destination.cpu = "max"; }, "CPU model"},
      {"memory", [](PreflightFacts& f) { f.destination.ram_bytes = 1; }, "memory is"},
      {"medium", [](PreflightFacts& f) { f.destination.blocks.pop_back(); }, "seed.iso"},
      {"foreign disk", [](PreflightFacts& f) { f.source.blocks[0].volume = ""; }, "would stay behind"},
      {"unnamed volume", [](PreflightFacts& f) { f.source.blocks[0].volume = "data"; }, "name all volumes"},
      {"device missing", [](PreflightFacts& f) { f.destination.blocks.erase(f.destination.blocks.begin()); },
       "missing"},
      {"crossed devices", [](PreflightFacts& f) { f.destination.blocks[0].volume = "other"; }, "and on 'other'"},
      {"extra device",
       [](PreflightFacts& f) {
         f.destination.blocks.push_back({.device = "/machine/x",
                                         .volume = "x",
                                         .writable = true,
                                         .inserted = true,
                                         .medium = "",
                                         .nbd_without_reconnect = false});
       },
       "exists only"},
      {"space", [](PreflightFacts& f) { f.staging_free_there = 0; }, "staged epoch"},
      {"pause", [](PreflightFacts& f) { f.rtt = 400 * kMillisecond; }, "the limit is 300 ms"},
      {"never ends", [](PreflightFacts& f) { f.memory_dirty_rate = 20'000'000; }, "never ends"},
      {"cap", [](PreflightFacts& f) { f.bandwidth_cap = 2'000'000; }, "never ends"},
  };
  for (const Row& row : rows) {
    PreflightFacts facts = good_facts();
    row.change(facts);
    EXPECT_THAT(preflight(facts).problems, ElementsAre(HasSubstr(row.expected))) << row.name;
  }
}

// A link that had little to carry looks slow: a migration that would have fitted must not be refused for it.
TEST(Preflight, ARateMeasuredWithoutLoadIsNoLimit) {
  PreflightFacts facts = good_facts();
  facts.disk_dirty_rate = 50'000'000;
  EXPECT_THAT(preflight(facts).problems, ElementsAre(HasSubstr("never ends")));
  EXPECT_EQ(link_rate_max(facts), 12'500'000U);
  facts.link_rate_is_limit = false;
  EXPECT_THAT(preflight(facts).problems, IsEmpty());
  EXPECT_EQ(link_rate_max(facts), 0U);
  facts.bandwidth_cap = 1'000'000;
  facts.memory_dirty_rate = 0;
  EXPECT_THAT(preflight(facts).problems,
              ElementsAre(HasSubstr("makes 50000000 bytes per second to send (disk 50000000, memory not counted) and "
                                    "the link carries 1000000 by the bandwidth that it is given")));
}

TEST(Preflight, OverwritePeerIsTheOperatorsWord) {
  PreflightFacts facts = good_facts();
  facts.volumes[0].foreign_data_there = true;
  facts.overwrite_peer = true;
  EXPECT_TRUE(preflight(facts).ok());
}

TEST(Preflight, DisconnectedPeerIsTheOnlyThingSaid) {
  PreflightFacts facts = good_facts();
  facts.peer_connected = false;
  facts.destination = {};
  EXPECT_THAT(preflight(facts).problems, ElementsAre(HasSubstr("not connected")));
}

// Why nothing is known of the peer is said in its own words, and nothing is guessed beside it.
TEST(Preflight, TroubleWithThePeerIsTheOnlyThingSaid) {
  PreflightFacts facts = good_facts();
  facts.peer_connected = false;
  facts.peer_trouble = "there is no peer 'b'";
  facts.destination = {};
  EXPECT_THAT(preflight(facts).problems, ElementsAre("there is no peer 'b'"));
}

TEST(Preflight, APausedGuestCanMove) {
  PreflightFacts facts = good_facts();
  facts.source.running = false;
  facts.source.paused = true;
  EXPECT_TRUE(preflight(facts).ok());
}

// A refusal that says "running-source" of a guest that is paused, or at the peer, makes a script act on the wrong host.
TEST(Preflight, PlaceOfTheGuestIsTakenFromTheQemuOfTheOwner) {
  const PreflightFacts facts = good_facts();
  Ownership own;
  EXPECT_EQ(guest_place(own, facts), GuestPlace::RunningSource);
  PreflightFacts paused = facts;
  paused.source.running = false;
  paused.source.paused = true;
  EXPECT_EQ(guest_place(own, paused), GuestPlace::PausedSource);
  PreflightFacts stopped = facts;  // by an error of its disk: neither word, but it does not run
  stopped.source.running = false;
  EXPECT_EQ(guest_place(own, stopped), GuestPlace::PausedSource);
  PreflightFacts waiting = stopped;
  waiting.source.fresh = true;
  EXPECT_EQ(guest_place(own, waiting), GuestPlace::Unknown);
  EXPECT_EQ(guest_place(own, {}), GuestPlace::Unknown) << "a QEMU that does not answer";

  Ownership follows;
  follows.role = Role::Secondary;
  follows.owner = Owner::Peer;
  follows.state = HandoverState::Secondary;
  EXPECT_EQ(guest_place(follows, facts), GuestPlace::Unknown) << "the peer's QEMU does not run";
  PreflightFacts there = facts;
  there.destination.running = true;
  EXPECT_EQ(guest_place(follows, there), GuestPlace::RunningPeer);
  follows.state = HandoverState::Superseded;
  EXPECT_EQ(guest_place(follows, there), GuestPlace::RunningPeer);
  Ownership doubt;
  doubt.owner = Owner::Unknown;
  doubt.state = HandoverState::GoSent;
  EXPECT_EQ(guest_place(doubt, there), GuestPlace::Unknown);
}

TEST(Preflight, WarningsDoNotRefuse) {
  PreflightFacts facts = good_facts();
  facts.source.blocks[0].nbd_without_reconnect = true;
  facts.destination.major = 9;
  facts.destination.version = "9.2";
  EXPECT_TRUE(preflight(facts).ok());
  EXPECT_EQ(preflight(facts).warnings.size(), 2U);
}

TEST(Preflight, OldQemuWithoutKvmIsWarnedOf) {
  PreflightFacts facts = good_facts();
  facts.source.major = facts.destination.major = 7;
  facts.source.version = "7.2";
  EXPECT_THAT(preflight(facts).warnings, IsEmpty());
  facts.source.kvm = false;
  EXPECT_THAT(preflight(facts).warnings, ElementsAre(HasSubstr("dirty pages")));
}

TEST(Preflight, SmallestPauseCountsTripsRecordsTailAndLoading) {
  PreflightFacts facts = good_facts();
  EXPECT_NEAR(static_cast<double>(smallest_pause(facts)) / 1e6, 40 + 2 * 2 + 4 * 3 + 1.44 + 50, 0.1);
  facts.link_rate = 0;
  facts.bandwidth_cap = 0;
  EXPECT_NEAR(static_cast<double>(smallest_pause(facts)) / 1e6, 40 + 2 * 2 + 4 * 3 + 50, 0.1);
}

}  // namespace
}  // namespace vmferry
