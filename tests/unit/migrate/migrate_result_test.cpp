// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/migrate_result.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace vmferry {
namespace {

// Scripts outside the project read this line.
TEST(MigrateResult, LineHasEveryFieldOfTheContract) {
  MigrateResult result;
  result.outcome = MigrateOutcome::Done;
  result.owner = "peer";
  result.guest = GuestPlace::RunningPeer;
  result.total_s = 1.5;
  result.downtime_ms = 250.25;
  result.rounds = 7;
  result.wire_bytes_disk = 1;
  result.wire_bytes_memory = 2;
  result.raw_bytes_disk = 3;
  result.raw_bytes_memory = 4;
  EXPECT_EQ(to_json_line(result),
            R"({"result":"done","owner":"peer","guest":"running-peer","total_s":1.5,"downtime_ms":250.25,"rounds":7,)"
            R"("wire_bytes":{"disk":1,"memory":2},"raw_bytes":{"disk":3,"memory":4},"error":null})");
}

TEST(MigrateResult, WordsAreThoseOfTheContract) {
  MigrateResult result;
  result.outcome = MigrateOutcome::RolledBack;
  result.guest = GuestPlace::RunningSource;
  result.error = "why";
  nlohmann::json json = nlohmann::json::parse(to_json_line(result));
  EXPECT_EQ(json["result"], "rolled-back");
  EXPECT_EQ(json["guest"], "running-source");
  EXPECT_EQ(json["owner"], "source");
  EXPECT_EQ(json["error"], "why");
  result.outcome = MigrateOutcome::Failed;
  result.guest = GuestPlace::Unknown;
  json = nlohmann::json::parse(to_json_line(result));
  EXPECT_EQ(json["result"], "failed");
  EXPECT_EQ(json["guest"], "unknown");
  result.guest = GuestPlace::PausedSource;
  EXPECT_EQ(nlohmann::json::parse(to_json_line(result))["guest"], "paused-source");
}

// `unknown` without a way out leaves the operator alone with a guest that may not run.
TEST(MigrateResult, UnknownGoesWithFailedAndNamesTheCommand) {
  for (const auto& [owner, guest] : {std::pair{"unknown", GuestPlace::Unknown},
                                     {"peer", GuestPlace::Unknown},
                                     {"unknown", GuestPlace::PausedSource}}) {
    MigrateResult result;
    result.outcome = MigrateOutcome::RolledBack;
    result.owner = owner;
    result.guest = guest;
    result.error = "why";
    explain_unknown(result);
    EXPECT_EQ(result.outcome, MigrateOutcome::Failed);
    EXPECT_TRUE(result.error.starts_with("why; ")) << result.error;
    EXPECT_NE(result.error.find("vmferry resolve"), std::string::npos) << result.error;
    const std::string once = result.error;
    explain_unknown(result);
    EXPECT_EQ(result.error, once);
  }
  MigrateResult known;
  known.outcome = MigrateOutcome::RolledBack;
  known.guest = GuestPlace::PausedSource;
  known.error = "why";
  explain_unknown(known);
  EXPECT_EQ(known.outcome, MigrateOutcome::RolledBack);
  EXPECT_EQ(known.error, "why");
}

// Error texts come from QEMU and the peer: whatever is in them, the line stays one line of valid JSON.
TEST(MigrateResult, TextThatIsNotUtf8DoesNotBreakTheLine) {
  MigrateResult result;
  result.error = "a\xff\n\"b";
  const std::string line = to_json_line(result);
  EXPECT_EQ(line.find('\n'), std::string::npos);
  EXPECT_TRUE(nlohmann::json::accept(line));
}

// A line without it leaves the operator to watch; one that is wrong by the reduction makes him give up too early.
TEST(MigrateResult, TimeLeftCountsDisksAndMemoryAtTheReductionThatIsSeen) {
  MigrateProgress progress;
  progress.disk_remaining_bytes = 60'000'000;
  progress.memory_remaining_bytes = 40'000'000;
  const LinkGuess link{.rate = 10'000'000, .reduction = 0.5};
  EXPECT_FALSE(seconds_left(progress, link)) << "idle";
  for (const MigratePhase phase : {MigratePhase::Bulk, MigratePhase::Converge, MigratePhase::Precopy}) {
    progress.phase = phase;
    EXPECT_NEAR(seconds_left(progress, link).value(), 5, 1e-9);
  }
  progress.raw_bytes_disk = 100'000'000;
  progress.wire_bytes_disk = 10'000'000;
  EXPECT_NEAR(seconds_left(progress, link).value(), 0.6 + 2, 1e-9);
  EXPECT_FALSE(seconds_left(progress, {.rate = 0, .reduction = 0.5}));
  progress.phase = MigratePhase::Done;
  EXPECT_FALSE(seconds_left(progress, link));
}

// "Timed out" alone leaves the operator to guess between a slow link, a busy guest and a broken daemon.
TEST(MigrateResult, WhyNotDoneNamesWhatIsLeftInEachPhase) {
  MigrateProgress progress;
  progress.rounds = 7;
  progress.wire_bytes_disk = 10 << 20;
  progress.memory_remaining_bytes = 16 << 20;
  progress.memory_total_bytes = 256 << 20;
  progress.predicted_last_round_ms = 357;
  progress.phase = MigratePhase::Bulk;
  EXPECT_NE(why_not_done(progress).find("10 MiB were sent"), std::string::npos);
  progress.phase = MigratePhase::Converge;
  EXPECT_NE(why_not_done(progress).find("after 7 rounds the last one would take 357 ms"), std::string::npos);
  progress.phase = MigratePhase::Precopy;
  EXPECT_NE(why_not_done(progress).find("16 of 256 MiB of memory are left"), std::string::npos);
  progress.phase = MigratePhase::Switchover;
  EXPECT_NE(why_not_done(progress).find("switchover"), std::string::npos);
}

TEST(MigrateResult, PhasesAreNamedAsInStatus) {
  EXPECT_EQ(to_string(MigratePhase::Converge), "converge");
  EXPECT_EQ(to_string(MigratePhase::RolledBack), "rolled-back");
}

}  // namespace
}  // namespace vmferry
