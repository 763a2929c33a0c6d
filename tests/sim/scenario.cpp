// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/scenario.h"

#include <algorithm>
#include <cstring>

#include "engine/base/log.h"
#include "engine/migrate/handover.h"

namespace vmferry::sim {

namespace {

std::vector<uint64_t> draw_sizes(uint64_t seed) {
  Random random(seed ^ 0x51e5);
  std::vector<uint64_t> sizes{768U << 10};
  if (random.chance(1, 3)) sizes.push_back((64U << 10) + 512);  // with a short last block
  return sizes;
}

constexpr const char* kFaultNames[] = {"cut",           "kill-source",  "kill-peer",  "restart-source",
                                       "restart-peer",  "power-source", "power-peer", "kill-source-qemu",
                                       "kill-peer-qemu"};

}  // namespace

Scenario::Scenario(uint64_t seed, const Faults& faults, Totals& totals, bool promotions)
    : totals_(totals),
      promotions_(promotions),
      world_(seed),
      operator_(world_.add_executor("operator")),
      sizes_(draw_sizes(seed)),
      oracle_(sizes_) {
  HostSettings a{.name = "A",
                 .peer = "B",
                 .index = 0,
                 .volume_sizes = sizes_,
                 .role = Role::Primary,
                 .group = {},
                 .faults = faults};
  a.group.bytes[0] = 7;
  HostSettings b = a;
  b.name = "B";
  b.peer = "A";
  b.index = 1;
  b.role = Role::Secondary;
  link_ = std::make_unique<SimLink>(totals.link);
  hosts_[0] = std::make_unique<Host>(world_, *link_, oracle_, a, totals.disk);
  hosts_[1] = std::make_unique<Host>(world_, *link_, oracle_, b, totals.disk);
  link_->set_executors(hosts_[0]->executor(), hosts_[1]->executor());
  oracle_.set_hosts(hosts_[0].get(), hosts_[1].get());
  link_->on_send = [this](size_t side, MessageType type, ByteSpan payload) {
    log::debug("t={}us {} sends {} of {} bytes", world_.now() / kMicrosecond, side == 0 ? "A" : "B",
               static_cast<int>(type), payload.size());
    oracle_.message_sent(side, type, payload);
  };
  Random& random = world_.random();
  link_->delay = static_cast<Nanoseconds>(1 + random.below(10)) * kMillisecond;
  link_->bytes_per_second = random.chance(1, 2) ? 2'000'000 : 40'000'000;
}

Scenario::~Scenario() {
  world_.kill_all();
  hosts_ = {};
}

std::string Scenario::run() {
  Random& random = world_.random();
  tick();
  link_->heal();
  for (auto& host : hosts_) host->start_daemon();
  run_until([this] { return hosts_[0]->serving() && hosts_[1]->serving(); }, 5 * kSecond);
  const uint64_t rounds = 2 + random.below(2);
  for (uint64_t round = 0; round < rounds && !oracle_.violated(); ++round) {
    if (promotions_ && random.chance(1, 2)) {
      round_of_promotion();
    } else if (random.chance(1, 3)) {
      round_of_chaos();
    } else {
      round_of_migration();
    }
    if (!oracle_.violated() && !settle()) fail("does not settle: " + describe());
  }
  if (!oracle_.violated()) finish();
  ++totals_.seeds;
  totals_.steps += world_.steps();
  totals_.guest_writes += oracle_.guest_writes;
  totals_.guest_checks += oracle_.guest_checks;
  totals_.checked_images += oracle_.checked_images;
  totals_.final_epochs += oracle_.final_epochs;
  totals_.moments += oracle_.moments;
  totals_.refused_writes += oracle_.refused_writes;
  for (const auto& [name, count] : oracle_.messages) totals_.messages[name] += count;
  return oracle_.violation();
}

bool Scenario::run_until(const std::function<bool()>& condition, Nanoseconds time_max) {
  const Nanoseconds end = world_.now() + time_max;
  while (!oracle_.violated()) {
    if (condition()) return true;
    if (world_.now() > end) return false;
    if (!world_.step()) {
      fail("nothing is left to do");
      return false;
    }
    oracle_.check_step();
  }
  return false;
}

void Scenario::run_for(Nanoseconds time) {
  bool over = false;
  const TimerId id = operator_.start_timer(time, [&over] { over = true; });
  run_until([&over] { return over; }, time + kSecond);
  operator_.cancel_timer(id);
}

// --- The operator

void Scenario::tick() {
  for (auto& host : hosts_) {
    if (host == nullptr) continue;
    if (host->start_error()) fail(fmt::format("{} does not start: {}", host->name(), host->start_error()->text));
    operate(*host);
    if (!oracle_.promoting) give_word_to_overwrite(*host);
    write_as_another_client(*host);
  }
  operator_.start_timer(15 * kMillisecond, [this] { tick(); });
}

// Keeps a QEMU where the state says that one belongs.
void Scenario::operate(Host& host) {
  Group* group = host.group();
  if (group == nullptr || quiet_ || shut_down_) return;
  const Ownership& own = group->ownership();
  const auto qemu = host.qemu();
  const bool live = qemu != nullptr && qemu->alive();
  const bool at_rest = own.state == HandoverState::Own || own.state == HandoverState::Running;
  if (own.role == Role::Primary && at_rest && may_run(own) && !group->coordinator().migrating() &&
      (!live || qemu->fresh_incoming()) && !host.requests_outstanding()) {
    host.spawn_qemu(QemuProcess::Start::Boot);
    return;
  }
  const bool idle = own.state == HandoverState::Secondary || own.state == HandoverState::Aborted;
  if (own.role == Role::Secondary && idle && !(live && (qemu->guest_runs() || qemu->fresh_incoming()))) {
    host.spawn_qemu(QemuProcess::Start::Incoming);
  }
}

// Where a promotion was disturbed, the new owner may not know that the other side has nothing of its own; then it asks.
void Scenario::give_word_to_overwrite(Host& host) {
  Group* group = host.group();
  if (!promoted_ || group == nullptr || group->sender() == nullptr || !may_run(group->ownership())) return;
  if (group->ownership().split_brain || group->coordinator().migrating()) return;
  if (group->sender()->status().reason.find("--overwrite-peer") == std::string::npos) return;
  ++totals_.promotions["overwrite-word"];
  ReplicationConfig config = group->record().replication;
  config.overwrite_peer = true;
  group->start_replication(config, [](Status) {});
}

// A second client of the export, e.g. a tool on the host: it writes also while the guest is stopped.
void Scenario::write_as_another_client(Host& host) {
  if (quiet_ || writing_[host.index()] || !(host.accepts_writes() || host.parks_writes())) return;
  DiskModel& model = oracle_.disks(host)[0];
  auto request = std::make_unique<DiskRequest>();
  const uint64_t first = model.sector_count() - kReservedSectors + host.index() * (kReservedSectors / 2) +
                         world_.random().below(kReservedSectors / 2);
  request->first = first;
  request->versions = {model.next_version()};
  request->data.resize(DiskModel::kSector);
  DiskModel::fill(request->versions[0], request->data.data());
  request->request.op = BlockOp::Write;
  request->request.range = {first * DiskModel::kSector, DiskModel::kSector};
  request->request.data = request->data.data();
  request->reply_to = &operator_;
  log::debug("t={}us client on {} writes sector {} version {}", world_.now() / kMicrosecond, host.name(), first,
             request->versions.front());
  model.write_submitted(first, request->versions);
  writing_[host.index()] = true;
  request->answer = [this, &model, &host](DiskRequest& done, Errno error) {
    writing_[host.index()] = false;
    log::debug("t={}us client on {}: sector {} answered {}", world_.now() / kMicrosecond, host.name(), done.first,
               error);
    if (error != 0) {
      oracle_.write_failed(host, error, false);
      return model.write_refused(done.first, done.versions);
    }
    model.write_acknowledged(done.first, done.versions);
  };
  host.submit(std::move(request));
}

Host& Scenario::owner() {
  return *hosts_[hosts_[1]->durable_ownership().role == Role::Primary &&
                         hosts_[0]->durable_ownership().role != Role::Primary
                     ? 1
                     : 0];
}

// --- Faults

void Scenario::inject(Fault fault) {
  Host& source = *hosts_[source_];
  Host& peer = *hosts_[1 - source_];
  ++totals_.faults[kFaultNames[static_cast<size_t>(fault)]];
  log::debug("t={}us fault={} source={} {}", world_.now() / kMicrosecond, kFaultNames[static_cast<size_t>(fault)],
             source.name(), describe());
  const auto restart = [this](Host& host) {
    if (!host.serving()) return;
    host.stop_daemon([this, &host] {
      operator_.post([&host] {
        host.kill_daemon();
        host.start_daemon();
      });
    });
  };
  const auto power = [this](Host& host) {
    host.lose_power();
    writing_[host.index()] = false;
  };
  switch (fault) {
    case Fault::Cut:
      return link_->cut();
    case Fault::KillSourceDaemon:
      return source.kill_daemon();
    case Fault::KillPeerDaemon:
      return peer.kill_daemon();
    case Fault::RestartSourceDaemon:
      return restart(source);
    case Fault::RestartPeerDaemon:
      return restart(peer);
    case Fault::PowerSource:
      return power(source);
    case Fault::PowerPeer:
      return power(peer);
    case Fault::KillSourceQemu:
      if (source.qemu() != nullptr) source.qemu()->die();
      return;
    case Fault::KillPeerQemu:
      if (peer.qemu() != nullptr) peer.qemu()->die();
      return;
  }
}

void Scenario::repair() {
  link_->heal();
  for (auto& host : hosts_) host->start_daemon();
}

void Scenario::round_of_chaos() {
  Random& random = world_.random();
  source_ = owner().index();
  for (uint64_t left = 1 + random.below(3); left > 0 && !oracle_.violated(); --left) {
    run_for(static_cast<Nanoseconds>(random.below(250)) * kMillisecond);
    inject(static_cast<Fault>(random.below(kFaultCount - 1)));  // the incoming QEMU does not matter here
    if (random.chance(1, 2)) {
      run_for(static_cast<Nanoseconds>(random.below(100)) * kMillisecond);
      repair();
    }
  }
}

void Scenario::round_of_migration() {
  Random& random = world_.random();
  repair();
  source_ = owner().index();
  Host& source = *hosts_[source_];
  Host& peer = *hosts_[1 - source_];
  const auto ready = [&] {
    return source.group() != nullptr && peer.group() != nullptr && link_->connected() && source.qemu() != nullptr &&
           source.qemu()->guest_runs() && peer.qemu() != nullptr && peer.qemu()->fresh_incoming() &&
           source.group()->sender() != nullptr;
  };
  if (!run_until(ready, 10 * kSecond)) {
    if (!oracle_.violated()) fail("never ready for a migration: " + describe());
    return;
  }
  run_for(static_cast<Nanoseconds>(random.below(200)) * kMillisecond);
  if (!ready()) return;
  ++totals_.migrations;
  result_.reset();
  MigrateRequest request;
  request.downtime_limit = 300 * kMillisecond;
  request.timeout = 20 * kSecond;
  const Status begun = source.group()->migrate(request, [this](const MigrateResult& result) { result_ = result; });
  if (!begun) result_ = MigrateResult{.error = begun.error().text};

  static constexpr Aim kAims[] = {
      {false, HandoverState::Migrating}, {false, HandoverState::Fenced},  {false, HandoverState::GoSent},
      {false, HandoverState::Migrating}, {true, HandoverState::Prepared}, {true, HandoverState::Primary},
      {true, HandoverState::Started},    {true, HandoverState::Running},  {false, HandoverState::AbortedResumeOwed},
      {true, HandoverState::Aborted},
  };
  for (uint64_t left = random.below(4); left > 0 && !oracle_.violated(); --left) {
    const Aim aim = kAims[random.below(std::size(kAims))];
    const auto hit = [&] {
      return hosts_[aim.at_peer ? 1 - source_ : source_]->durable_ownership().state == aim.state;
    };
    if (!run_until([&] { return hit() || result_.has_value(); }, 3 * kSecond) || !hit()) continue;
    // From microseconds to beyond the limits of the protocol.
    const uint64_t scale = random.below(4);
    const uint64_t span = scale == 0 ? 500 : scale == 1 ? 5'000 : scale == 2 ? 50'000 : 400'000;
    run_for(static_cast<Nanoseconds>(random.below(span)) * kMicrosecond);
    ++totals_.aimed[fmt::format("{}-{}", aim.at_peer ? "peer" : "source", to_string(aim.state))];
    // The death of a QEMU that was just told to run is what leaves the last word to the operator.
    const bool last_word = aim.state == HandoverState::Started && random.chance(1, 2);
    inject(last_word ? Fault::KillPeerQemu : static_cast<Fault>(random.below(kFaultCount)));
    if (random.chance(1, 2)) {
      const uint64_t pause = random.chance(1, 4) ? 2'500 : 200;
      run_for(static_cast<Nanoseconds>(random.below(pause)) * kMillisecond);
      repair();
    }
  }
  run_until([&] { return result_.has_value() || !source.serving(); }, 5 * kSecond);
  ++totals_.outcomes[!result_                                         ? "no result: daemon died"
                     : result_->outcome == MigrateOutcome::Done       ? "done"
                     : result_->outcome == MigrateOutcome::RolledBack ? "rolled-back"
                                                                      : "failed"];
}

// --- The end of a round

bool Scenario::settled() const {
  if (!link_->connected()) return false;
  for (size_t i = 0; i < 2; ++i) {
    Group* here = hosts_[i]->group();
    Group* there = hosts_[1 - i]->group();
    if (here == nullptr || there == nullptr) return false;
    const Ownership& ours = here->ownership();
    const Ownership& theirs = there->ownership();
    if (ours.role != Role::Primary) continue;
    const bool owns = ours.state == HandoverState::Own || ours.state == HandoverState::Running;
    const bool follows = theirs.role == Role::Secondary &&
                         (theirs.state == HandoverState::Secondary || theirs.state == HandoverState::Aborted);
    const auto qemu = hosts_[i]->qemu();
    if (owns && follows && !here->coordinator().migrating() && qemu != nullptr && qemu->guest_runs()) return true;
  }
  return false;
}

bool Scenario::settle() {
  repair();
  for (int attempt = 0; attempt < 3; ++attempt) {
    if (run_until(
            [this] {
              for (auto& host : hosts_) {
                if (!host->daemon_runs()) host->start_daemon();
              }
              return settled();
            },
            8 * kSecond)) {
      return true;
    }
    if (oracle_.violated() || !try_resolve()) return false;
  }
  return false;
}

// Where the protocol says that only the operator can go on: the owner's QEMU died after Started.
bool Scenario::try_resolve() {
  for (auto& host : hosts_) {
    Group* group = host->group();
    if (group == nullptr) continue;
    const Ownership& own = group->ownership();
    const auto qemu = host->qemu();
    if (own.state != HandoverState::Started || (qemu != nullptr && qemu->alive())) continue;
    ++totals_.resolves;
    group->coordinator().resolve(ResolveChoice::RunHere, true, [](Status) {});
    return true;
  }
  return false;
}

std::string Scenario::describe() const {
  std::string text = fmt::format("link={}", link_->connected() ? "connected" : "down");
  for (const auto& host : hosts_) {
    Group* group = host->group();
    const auto qemu = host->qemu();
    text += fmt::format(" {}={}", host->name(), host->serving() ? "serving" : "down");
    if (group != nullptr) {
      const Ownership& own = group->ownership();
      text += fmt::format("({} {} term {}{}: {})", to_string(own.role), to_string(own.state), own.term,
                          own.split_brain ? " split-brain" : "", explain(own));
    }
    text += fmt::format(" qemu={}", qemu == nullptr          ? "none"
                                    : !qemu->alive()         ? "dead"
                                    : qemu->guest_runs()     ? "running"
                                    : qemu->fresh_incoming() ? "incoming"
                                                             : "other");
  }
  return text;
}

// Everything works again: the copy must catch up, both disks are equal and hold what the guest knows.
void Scenario::finish() {
  Host& source = owner();
  Host& peer = *hosts_[1 - source.index()];
  run_for(50 * kMillisecond);
  quiet_ = true;
  const auto qemu = source.qemu();
  if (qemu != nullptr) qemu->stop();
  if (!run_until([&] { return !source.requests_outstanding() && !writing_[0] && !writing_[1]; }, 5 * kSecond)) {
    return fail("requests are never answered: " + describe());
  }
  run_for(5 * kMillisecond);
  bool in_sync = false;
  std::string error;
  if (source.group() == nullptr) return fail("the owner is gone: " + describe());
  source.group()->wait_in_sync([&](Status status) {
    in_sync = true;
    if (!status) error = status.error().text;
  });
  if (!run_until([&] { return in_sync; }, 30 * kSecond)) {
    return fail(fmt::format("never in sync: {} {}", describe(),
                            source.group() != nullptr ? source.group()->replication_status().dump() : ""));
  }
  if (!error.empty()) return fail("cannot get in sync: " + error + " " + describe());
  for (size_t volume = 0; volume < sizes_.size(); ++volume) {
    const Bytes& ours = source.store(volume).content();
    const Bytes& theirs = peer.store(volume).content();
    if (ours != theirs) {
      const auto at = std::mismatch(ours.begin(), ours.end(), theirs.begin()).first - ours.begin();
      return fail(fmt::format("I1: in sync, but vd{} of the copy on {} differs at sector {}", volume, peer.name(),
                              static_cast<size_t>(at) / DiskModel::kSector));
    }
    const std::string wrong =
        oracle_.disks(source)[volume].check(0, ours.data(), ours.size() / DiskModel::kSector, false);
    if (!wrong.empty()) return fail(fmt::format("I1: in the end vd{}: {}", volume, wrong));
  }
}

}  // namespace vmferry::sim
