// SPDX-License-Identifier: Apache-2.0
//
// The replication of one group as the handover sees it: rounds, the last epoch, and following afterwards.
// Threads: the group's executor.
#pragma once

#include "engine/migrate/interfaces.h"

namespace vmferry {

class Group;

class GroupReplicationLink final : public GroupReplication {
 public:
  explicit GroupReplicationLink(Group& group) : group_(group) {}

  void ensure_started(std::function<void(Status)> done) override;
  RoundProgress progress() const override;
  void run_round_now(const RoundOptions& options, std::function<void(Status)> done) override;
  void send_final_epoch(const Id128& attempt, std::function<void(Result<uint64_t>)> done) override;
  void cancel_final_epoch() override;
  void prepare_to_follow(uint64_t epoch, std::function<void(Status)> done) override;
  void prepare_to_own(const OwnOptions& options, std::function<void(Status)> done) override;
  void set_final_epoch_listener(std::function<void(const Id128& attempt, uint64_t epoch)> durable) override;
  Id128 durable_final_attempt(uint64_t& epoch) const override;
  bool copy_is_consistent() const override;
  bool copy_is_whole() const override;
  bool holds_unsent_writes() const override;
  // Before the sender goes: a migration's report needs its totals afterwards.
  void keep_totals() { totals_ = progress(); }

 private:
  Group& group_;
  RoundProgress totals_;
};

}  // namespace vmferry
