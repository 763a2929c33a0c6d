// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/migrate_result.h"

#include <fmt/core.h>

#include <nlohmann/json.hpp>

namespace vmferry {

std::string_view to_string(MigratePhase phase) noexcept {
  switch (phase) {
    case MigratePhase::Idle:
      return "idle";
    case MigratePhase::Preflight:
      return "preflight";
    case MigratePhase::Bulk:
      return "bulk";
    case MigratePhase::Converge:
      return "converge";
    case MigratePhase::Precopy:
      return "precopy";
    case MigratePhase::Switchover:
      return "switchover";
    case MigratePhase::Handover:
      return "handover";
    case MigratePhase::Running:
      return "running";
    case MigratePhase::Done:
      return "done";
    case MigratePhase::RolledBack:
      return "rolled-back";
    case MigratePhase::Failed:
      return "failed";
  }
  return "invalid";
}

namespace {

std::string_view to_string(MigrateOutcome outcome) {
  switch (outcome) {
    case MigrateOutcome::Done:
      return "done";
    case MigrateOutcome::RolledBack:
      return "rolled-back";
    case MigrateOutcome::Failed:
      return "failed";
  }
  return "failed";
}

std::string_view to_string(GuestPlace guest) {
  switch (guest) {
    case GuestPlace::RunningSource:
      return "running-source";
    case GuestPlace::RunningPeer:
      return "running-peer";
    case GuestPlace::PausedSource:
      return "paused-source";
    case GuestPlace::Unknown:
      return "unknown";
  }
  return "unknown";
}

}  // namespace

std::string_view owner_word(const Ownership& ownership) noexcept {
  if (ownership.state == HandoverState::Superseded) return "peer";
  switch (ownership.owner) {
    case Owner::Self:
      return "source";
    case Owner::Peer:
      return "peer";
    case Owner::Unknown:
      return "unknown";
  }
  return "unknown";
}

void explain_unknown(MigrateResult& result) {
  if (result.owner != "unknown" && result.guest != GuestPlace::Unknown) return;
  result.outcome = MigrateOutcome::Failed;
  if (result.error.find("vmferry resolve") != std::string::npos) return;
  result.error +=
      "; where the guest is was not seen from here: `vmferry status` on both sides tells which one may run it, and "
      "`vmferry resolve VOLUME` decides should one of them be lost for good";
}

std::string to_json_line(const MigrateResult& result) {
  nlohmann::ordered_json json;
  json["result"] = to_string(result.outcome);
  json["owner"] = result.owner;
  json["guest"] = to_string(result.guest);
  json["total_s"] = result.total_s;
  json["downtime_ms"] = result.downtime_ms;
  json["rounds"] = result.rounds;
  json["wire_bytes"] = {{"disk", result.wire_bytes_disk}, {"memory", result.wire_bytes_memory}};
  json["raw_bytes"] = {{"disk", result.raw_bytes_disk}, {"memory", result.raw_bytes_memory}};
  json["error"] = result.error.empty() ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(result.error);
  // Texts may come from QEMU: whatever is not UTF-8 must not end the daemon.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::optional<double> seconds_left(const MigrateProgress& progress, const LinkGuess& link) {
  const bool sending = progress.phase == MigratePhase::Bulk || progress.phase == MigratePhase::Converge ||
                       progress.phase == MigratePhase::Precopy;
  if (!sending || link.rate == 0) return std::nullopt;
  constexpr uint64_t kEnough = 16U << 20;
  const auto wire = [&link](uint64_t remaining, uint64_t wire_sent, uint64_t raw_sent) {
    const double reduction =
        raw_sent >= kEnough ? static_cast<double>(wire_sent) / static_cast<double>(raw_sent) : link.reduction;
    return static_cast<double>(remaining) * reduction;
  };
  return (wire(progress.disk_remaining_bytes, progress.wire_bytes_disk, progress.raw_bytes_disk) +
          wire(progress.memory_remaining_bytes, progress.wire_bytes_memory, progress.raw_bytes_memory)) /
         static_cast<double>(link.rate);
}

std::string why_not_done(const MigrateProgress& progress) {
  constexpr std::string_view kHelp =
      "let the guest write less, give the link more, or allow a longer pause or more time";
  const auto mib = [](uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  switch (progress.phase) {
    case MigratePhase::Bulk:
      return fmt::format("the first copy of the disks is not done, {:.0f} MiB were sent: give it more time",
                         mib(progress.wire_bytes_disk));
    case MigratePhase::Converge:
      return fmt::format(
          "the guest changes its disks faster than the link carries: after {} rounds the last one would "
          "take {:.0f} ms; {}",
          progress.rounds, progress.predicted_last_round_ms, kHelp);
    case MigratePhase::Precopy:
      return fmt::format(
          "the guest changes more than the link carries: {:.0f} of {:.0f} MiB of memory are left, the last "
          "round of the disks would take {:.0f} ms; {}",
          mib(progress.memory_remaining_bytes), mib(progress.memory_total_bytes), progress.predicted_last_round_ms,
          kHelp);
    default:
      return fmt::format("it was in phase {}", to_string(progress.phase));
  }
}

}  // namespace vmferry
