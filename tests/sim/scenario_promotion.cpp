// SPDX-License-Identifier: Apache-2.0
//
// Rounds in which the operator changes the primary without a migration: promote in order, demote, promote by force
// while the owner cannot be asked, and the split brain that follows when both have written.
#include "engine/base/log.h"
#include "tests/sim/scenario.h"

namespace vmferry::sim {

void Scenario::round_of_promotion() {
  promoted_ = true;
  repair();
  source_ = owner().index();
  Host& from = *hosts_[source_];
  Host& to = *hosts_[1 - source_];
  const auto ready = [&] {
    return from.group() != nullptr && to.group() != nullptr && link_->connected() && from.qemu() != nullptr &&
           from.qemu()->guest_runs() && from.group()->sender() != nullptr &&
           to.group()->copy_quality() >= CopyQuality::Fuzzy;
  };
  if (!run_until(ready, 10 * kSecond)) {
    if (!oracle_.violated()) fail("never ready for a promotion: " + describe());
    return;
  }
  run_for(static_cast<Nanoseconds>(world_.random().below(200)) * kMillisecond);
  if (!ready()) return;
  if (world_.random().chance(1, 2)) {
    planned_promotion(from, to);
  } else {
    forced_promotion(to);
  }
  shut_down_ = false;
  run_for(5 * kMillisecond);  // until the last answer to a write that was refused for it has arrived
  oracle_.promoting = false;
}

// nullopt: no answer, because its daemon died or it took too long.
std::optional<Status> Scenario::ask(const std::function<void(std::function<void(Status)>)>& question,
                                    const Host& host) {
  const uint64_t number = ++questions_;
  const auto answer = std::make_shared<std::optional<Status>>();
  question([this, number, answer](Status status) {
    if (number == questions_) *answer = std::move(status);
  });
  run_until([&] { return answer->has_value() || !host.serving(); }, 5 * kSecond);
  return *answer;
}

std::optional<Status> Scenario::promote(Host& host, bool accept_inconsistent, bool force) {
  return ask(
      [&](std::function<void(Status)> done) {
        host.group()->promote({.force = force, .accept_inconsistent = accept_inconsistent}, std::move(done));
      },
      host);
}

// The guest is booted anew where it was promoted; what waits there from earlier is of no use.
void Scenario::retire_qemu(Host& host) {
  const auto qemu = host.qemu();
  if (qemu != nullptr && qemu->alive() && !qemu->guest_runs()) qemu->die();
}

bool Scenario::shut_guest_down(Host& host) {
  shut_down_ = true;
  const auto qemu = host.qemu();
  if (qemu == nullptr) return true;
  qemu->stop();
  run_for(20 * kMillisecond);
  if (qemu->alive()) qemu->die();
  return !oracle_.violated();
}

void Scenario::planned_promotion(Host& from, Host& to) {
  Random& random = world_.random();
  if (random.chance(1, 3)) {
    const auto refused = promote(to, true);
    if (oracle_.violated()) return;
    if (refused && refused->has_value()) return fail("promoted beside a running guest: " + describe());
    if (refused) ++totals_.promotions["refused-beside-guest"];
  }
  if (!shut_guest_down(from)) return;
  oracle_.promoting = true;
  const bool demote = random.chance(1, 3);
  if (demote && from.group() != nullptr) {
    const auto demoted =
        ask([&from](std::function<void(Status)> done) { from.group()->coordinator().demote(std::move(done)); }, from);
    if (demoted && demoted->has_value()) ++totals_.promotions["demoted"];
  }
  std::optional<TimerId> disturbance;
  if (random.chance(1, 2)) {
    disturbance =
        operator_.start_timer(static_cast<Nanoseconds>(random.below(60'000)) * kMicrosecond,
                              [this, fault = static_cast<Fault>(random.below(kFaultCount - 2))] { inject(fault); });
  }
  promote_in_order(to, demote);
  retire_qemu(to);
  if (disturbance) operator_.cancel_timer(*disturbance);
}

void Scenario::promote_in_order(Host& to, bool demoted) {
  for (int attempt = 0; attempt < 8 && !oracle_.violated(); ++attempt) {
    if (to.group() != nullptr) {
      const auto answer = promote(to, attempt > 0);
      if (answer && answer->has_value()) {
        ++totals_.promotions[demoted ? "promoted-after-demote" : "promoted"];
        return;
      }
      log::debug("promotion: {}", answer ? answer->error().text : "no answer");
    }
    if (oracle_.violated()) return;
    repair();
    run_for(300 * kMillisecond);
    if (to.durable_ownership().role == Role::Primary) return;
    // Disturbed in the middle, no side may be the owner, and only the former one may know that it lacks nothing.
    Host& from = *hosts_[1 - to.index()];
    if (attempt < 3 || from.group() == nullptr || from.durable_ownership().role == Role::Primary) continue;
    const auto back = promote(from, true);
    if (!back || !back->has_value()) continue;
    ++totals_.promotions["promoted-back"];
    retire_qemu(from);
    return;
  }
  if (!oracle_.violated()) fail("cannot be promoted in order: " + describe());
}

void Scenario::forced_promotion(Host& to) {
  Random& random = world_.random();
  oracle_.promoting = true;
  switch (random.below(4)) {
    case 0:
      inject(Fault::KillSourceDaemon);
      break;
    case 1:
      inject(Fault::PowerSource);
      break;
    case 2:
      inject(Fault::Cut);
      break;
    default:
      break;  // in plain sight of the owner
  }
  run_for(static_cast<Nanoseconds>(random.below(30)) * kMillisecond);
  if (oracle_.violated() || to.group() == nullptr || to.durable_ownership().role == Role::Primary) return;
  const bool consistent = to.group()->copy_is_consistent();
  const bool copy = to.group()->copy_quality() != CopyQuality::Source;  // and not what it wrote itself once
  auto answer = promote(to, false, true);
  if (oracle_.violated()) return;
  if (answer && !answer->has_value() && !consistent) {
    ++totals_.promotions["accepted-inconsistent"];
    answer = promote(to, true, true);
  } else if (answer && answer->has_value() && !consistent) {
    return fail("a copy that is no whole epoch was promoted without --accept-inconsistent");
  } else if (answer && answer->has_value() && copy) {
    ++totals_.promotions["forced-as-consistent"];
    oracle_.promoted_as_consistent(to);
  }
  if (oracle_.violated()) return;
  if (!answer || !answer->has_value()) {
    return fail(fmt::format("promote --force: {} {}", answer ? answer->error().text : "no answer", describe()));
  }
  ++totals_.promotions["forced"];
  retire_qemu(to);
  run_for(static_cast<Nanoseconds>(random.below(400)) * kMillisecond);
  if (random.chance(1, 3)) {
    inject(static_cast<Fault>(random.below(kFaultCount - 2)));
    run_for(static_cast<Nanoseconds>(random.below(100)) * kMillisecond);
  }
  repair();
  if (!oracle_.violated()) reunite();
}

// At first contact one side yields, the one with the lower term or, with equal terms, both: it stops its guest and
// refuses writes; what it holds stays as it is until the operator has chosen.
bool Scenario::reunite() {
  const auto yielded = [&](const Host& host) {
    const auto qemu = host.qemu();
    return host.durable_ownership().state == HandoverState::Superseded && !host.accepts_writes() &&
           !host.parks_writes() && (qemu == nullptr || !qemu->guest_runs());
  };
  const auto met = [&] {
    return link_->connected() && hosts_[0]->serving() && hosts_[1]->serving() &&
           (yielded(*hosts_[0]) || yielded(*hosts_[1]));
  };
  if (!run_until(met, 8 * kSecond)) {
    if (!oracle_.violated()) fail("no side yields: " + describe());
    return false;
  }
  Host& loser = *hosts_[yielded(*hosts_[0]) ? 0 : 1];
  Host& winner = *hosts_[1 - loser.index()];
  run_for(300 * kMillisecond);  // until the last of its writes has landed and both have said so
  const Hash128 kept = oracle_.image_of(loser);
  run_for(static_cast<Nanoseconds>(world_.random().below(600)) * kMillisecond);
  if (oracle_.violated()) return false;
  if (oracle_.image_of(loser) != kept) {
    fail("the data of the superseded side was overwritten before the operator spoke: " + describe());
    return false;
  }
  const bool split = loser.group()->ownership().split_brain;
  if (split != winner.group()->ownership().split_brain) {
    fail("split brain is known to one side only: " + describe());
    return false;
  }
  ++totals_.promotions[split ? "split-brain" : "superseded"];
  Host& keeper = split && world_.random().chance(1, 2) ? loser : winner;
  Host& other = &keeper == &loser ? winner : loser;
  ++totals_.promotions[&keeper == &loser ? "discarded-winner" : "discarded-loser"];
  const auto resolve = [&](Host& host, ResolveChoice choice) {
    const auto answer =
        ask([&](std::function<void(Status)> done) { host.group()->resolve(choice, true, std::move(done)); }, host);
    if (answer && answer->has_value()) return true;
    if (!oracle_.violated()) {
      fail(fmt::format("resolve on {}: {} {}", host.name(), answer ? answer->error().text : "no answer", describe()));
    }
    return false;
  };
  oracle_.given_up = &other;
  if (!resolve(other, ResolveChoice::DiscardLocal)) return false;
  const auto stopped = [&] { return other.qemu() == nullptr || !other.qemu()->guest_runs(); };
  if (!run_until(stopped, 3 * kSecond)) {
    if (!oracle_.violated()) fail("the guest whose data was given up runs on: " + describe());
    return false;
  }
  oracle_.join(keeper);
  oracle_.given_up = nullptr;
  return !split || resolve(keeper, ResolveChoice::DiscardPeer);
}

}  // namespace vmferry::sim
