// SPDX-License-Identifier: Apache-2.0
//
// One seed: two hosts, a guest that works all the time, migrations to and fro, and everything that can fail.
//
// Faults: link cuts; SIGKILL, SIGTERM and restart of either daemon; power cuts of either host; death of either QEMU;
// anywhere, and aimed at every state of a handover with a random delay. After each round everything is repaired and
// the group has to settle by itself: exactly one guest runs, or the state says that the operator has to speak and
// `resolve` finishes it. In the end both disks are equal and hold what the guest was told.
// Threads: one.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "tests/sim/host.h"
#include "tests/sim/oracle.h"

namespace vmferry::sim {

struct Totals {
  SimDiskTotals disk;
  SimLinkTotals link;
  uint64_t seeds = 0;
  uint64_t steps = 0;
  uint64_t guest_writes = 0;
  uint64_t guest_checks = 0;
  uint64_t checked_images = 0;
  uint64_t final_epochs = 0;  // compared with the source
  uint64_t moments = 0;       // copies called consistent, looked for in the past of the source
  uint64_t refused_writes = 0;
  uint64_t migrations = 0;
  uint64_t resolves = 0;
  std::map<std::string, uint64_t> promotions;  // rounds and what happened in them
  std::map<std::string, uint64_t> outcomes;    // of migrations
  std::map<std::string, uint64_t> faults;      // by kind
  std::map<std::string, uint64_t> aimed;       // faults by the state of the handover that they hit
  std::map<std::string, uint64_t> messages;
};

class Scenario {
 public:
  // `promotions`: half of the rounds change the primary without a migration.
  Scenario(uint64_t seed, const Faults& faults, Totals& totals, bool promotions);
  ~Scenario();

  // "" when nothing was violated.
  std::string run();

 private:
  enum class Fault : uint8_t {
    Cut,
    KillSourceDaemon,
    KillPeerDaemon,
    RestartSourceDaemon,
    RestartPeerDaemon,
    PowerSource,
    PowerPeer,
    KillSourceQemu,
    KillPeerQemu,
  };
  static constexpr size_t kFaultCount = 9;
  struct Aim {
    bool at_peer = false;
    HandoverState state{};
  };

  // Runs for a while or until the condition holds, with the oracle looking after every step. False: not in time, or
  // something was violated.
  bool run_until(const std::function<bool()>& condition, Nanoseconds time_max);
  void run_for(Nanoseconds time);
  void fail(std::string what) { oracle_.violation(std::move(what)); }

  void tick();
  void operate(Host& host);
  void give_word_to_overwrite(Host& host);
  void write_as_another_client(Host& host);
  void inject(Fault fault);
  void repair();
  void round_of_chaos();
  void round_of_migration();
  // scenario_promotion.cpp
  void round_of_promotion();
  void planned_promotion(Host& from, Host& to);
  void promote_in_order(Host& to, bool demoted);
  void forced_promotion(Host& to);
  std::optional<Status> promote(Host& host, bool accept_inconsistent, bool force = false);
  bool shut_guest_down(Host& host);
  void retire_qemu(Host& host);
  std::optional<Status> ask(const std::function<void(std::function<void(Status)>)>& question, const Host& host);
  bool reunite();
  bool settle();
  bool settled() const;
  bool try_resolve();
  void finish();
  Host& owner();
  std::string describe() const;

  Totals& totals_;
  const bool promotions_;
  SimWorld world_;
  SimExecutor& operator_;
  std::vector<uint64_t> sizes_;
  Oracle oracle_;
  std::unique_ptr<SimLink> link_;
  std::array<std::unique_ptr<Host>, 2> hosts_;
  std::array<bool, 2> writing_{};
  size_t source_ = 0;  // of the migration under way
  bool quiet_ = false;
  bool shut_down_ = false;  // the operator keeps the guest off
  uint64_t questions_ = 0;
  bool promoted_ = false;  // there was a round of promotion
  std::optional<MigrateResult> result_;
};

}  // namespace vmferry::sim
