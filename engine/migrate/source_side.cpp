// SPDX-License-Identifier: Apache-2.0
//
// The source's part of a migration: disk rounds, memory beside them, the brake, the switchover, GO and the answer.
#include <algorithm>

#include "engine/migrate/coordinator_impl.h"

namespace vmferry {

namespace {

double to_seconds(Nanoseconds duration) {
  return static_cast<double>(duration) / static_cast<double>(kSecond);
}

uint64_t above(uint64_t now, uint64_t base) {
  return now > base ? now - base : 0;
}

}  // namespace

Status CoordinatorImpl::migrate(const MigrateRequest& request, MigrateDone done) {
  if (source && source->done) return fail(ErrorKind::Busy, "a migration of this group is under way");
  if (own.split_brain || (own.state != HandoverState::Own && own.state != HandoverState::Running))
    return fail(ErrorKind::Fenced, "{}", explain(own));
  Qemu* qemu = qemu_for(request.qmp_path);
  if (!qemu) return fail(ErrorKind::InvalidArgument, "no QEMU is known for this volume: give --qmp PATH");
  source = std::make_unique<SourceRun>(parts.executor);
  source->request = request;
  if (source->request.qmp_path.empty()) source->request.qmp_path = parts.default_qmp_path;
  source->done = std::move(done);
  source->qemu = qemu;
  source->run = ++runs;
  source->started_at = parts.executor.now();
  source->base = parts.replication.progress();
  enter(MigratePhase::Preflight);
  source->deadline.start(request.timeout, [this] {
    if (own.state == HandoverState::GoSent) return;  // in doubt: only the peer's word counts
    (void)cancel(
        fmt::format("not done within {:.0f} s: {}", to_seconds(source->request.timeout), why_not_done(progress())));
  });
  // Always anew: the socket may lead to another QEMU by now.
  qemu->connect([token = alive.token(), this](const Status& ok) {
    if (!token() || !source || source->phase != MigratePhase::Preflight) return;
    if (!ok) return finish(MigrateOutcome::Failed, ok.error().text);
    check_source_qemu();
  });
  return {};
}

void CoordinatorImpl::check_source_qemu() {
  source->qemu->query([token = alive.token(), this](const Result<QemuState>& state) {
    if (!token() || !source || source->phase != MigratePhase::Preflight) return;
    if (!state) return finish(MigrateOutcome::Failed, state.error().text);
    if (state->run != RunState::Running && state->run != RunState::Paused)
      return finish(MigrateOutcome::Failed, "the guest is neither running nor paused");
    source->guest_seen = true;
    source->guest_running = state->run == RunState::Running;
    ask_capabilities();
  });
}

void CoordinatorImpl::ask_capabilities() {
  source->qemu->capabilities([token = alive.token(), this](const Result<std::string>& on) {
    if (!token() || !source || source->phase != MigratePhase::Preflight) return;
    if (!on) return finish(MigrateOutcome::Failed, on.error().text);
    source->capabilities = *on;
    source->qemu->set_events({.run_state =
                                  [t = alive.token(), this](RunState run) {
                                    if (t()) on_source_run_state(run);
                                  },
                              .migration_state =
                                  [t = alive.token(), this](MigrationState migration) {
                                    if (t()) on_source_migration_state(migration);
                                  },
                              .connection_lost = {},
                              .process_dead =
                                  [t = alive.token(), this] {
                                    if (t()) source_failed("the source QEMU died");
                                  }});
    start_rounds();
  });
}

void CoordinatorImpl::start_rounds() {
  enter(MigratePhase::Bulk);
  parts.replication.ensure_started([token = alive.token(), this](const Status& ok) {
    if (!token() || !source || source->phase != MigratePhase::Bulk) return;
    if (!ok) return finish(MigrateOutcome::Failed, ok.error().text);
    poll_bulk();
  });
}

void CoordinatorImpl::poll_bulk() {
  if (!source || source->phase != MigratePhase::Bulk) return;
  note_throughput();
  if (!parts.replication.progress().initial_done) {
    source->poll.start(options.poll_interval, [this] { poll_bulk(); });
    return;
  }
  enter(MigratePhase::Converge);
  run_converge_round();
}

void CoordinatorImpl::run_converge_round() {
  if (!source || source->phase != MigratePhase::Converge) return;
  const Nanoseconds begun = parts.executor.now();
  parts.replication.run_round_now(
      {.urgent = false}, [token = alive.token(), this, begun, run = source->run](const Status& ok) {
        if (!token() || !source || source->run != run || source->phase != MigratePhase::Converge) return;
        if (!ok) {
          source->round.start(options.retry_interval, [this] { run_converge_round(); });
          return;
        }
        ++source->rounds;
        note_throughput();
        if (connected() && predicted_last_round_now() <= kPrecopyEntry) return begin_attempt();
        // A round that took no time sent nothing: looking again at once would only burn a core.
        const Nanoseconds took = parts.executor.now() - begun;
        source->round.start(took < options.poll_interval ? options.poll_interval : 0, [this] { run_converge_round(); });
      });
}

void CoordinatorImpl::begin_attempt() {
  enter(MigratePhase::Precopy);
  const MemoryFigures figures = parts.memory.figures();
  source->prepared = source->memory_started = source->switchover_asked = source->too_early = false;
  source->precopy_round_done = source->held = false;
  source->stopped_at = 0;
  source->qemu_state = {};
  source->memory_rate = 0;
  source->memory_bytes_seen = figures.raw_bytes;
  source->memory_seen_at = parts.executor.now();
  source->attempt_open = true;
  ++source->attempts;
  source->run = ++runs;
  apply(event::Start{.attempt = parts.executor.new_id(),
                     .qmp_path = source->request.qmp_path,
                     .qemu = source->qemu->identity(),
                     .qemu_reachable = source->qemu->connected(),
                     .guest_running = source->guest_running,
                     .detach = source->request.detach,
                     .quit_source = source->request.quit_source,
                     .capabilities = source->capabilities},
        [this](const Transition& transition) {
          if (transition.refused()) {
            source->attempt_open = false;
            finish(MigrateOutcome::RolledBack, transition.refusal);
          }
        });
}

void CoordinatorImpl::on_prepared(const PreparedMessage& message) {
  if (!source || own.state != HandoverState::Migrating || message.attempt != own.attempt || source->prepared) return;
  if (!message.accepted) return source_failed("the peer refused: " + message.reason);
  source->prepared = true;
  start_memory();
}

void CoordinatorImpl::start_memory() {
  const Id128 attempt = own.attempt;
  const MigrateOptions limits{.downtime_limit = downtime_shares(source->request.downtime_limit).memory,
                              .bandwidth_max = 0,
                              .switchover_bandwidth = switchover_bandwidth(link_rate_now())};
  source->switchover_bandwidth = limits.switchover_bandwidth;
  source->widened_at = parts.executor.now();
  // Held until the first round beside the stream is done; the sink of the stream is told before a byte is read.
  source->held = true;
  Qemu* qemu = source->qemu;
  qemu->migrate_out(limits, [token = alive.token(), this, attempt, qemu](Result<std::unique_ptr<ByteStream>> stream) {
    if (!token()) return;
    const bool ours = source && own.attempt == attempt;
    if (!stream) return ours ? source_failed(stream.error().text) : void();
    if (!ours || own.state != HandoverState::Migrating) {
      // Given up meanwhile: the stream closes here. A QEMU that had written everything already does not notice, and
      // would keep its guest stopped at pre-switchover for ever.
      return qemu->migrate_cancel([](const Status&) {});
    }
    source->memory_started = true;
    parts.memory.start_source(std::move(*stream), attempt,
                              {.ended = {}, .failed = [t = alive.token(), this, attempt](const Error& error) {
                                 if (t() && own.attempt == attempt) source_failed(error.text);
                               }});
    parts.memory.hold(source->held);
    run_precopy_round();
    poll_precopy();
  });
}

// Short rounds beside the memory stream, ahead of it on the link: what the disks still lack stays small until QEMU
// stops the guest, at whatever moment that is.
void CoordinatorImpl::run_precopy_round() {
  if (!source || source->phase != MigratePhase::Precopy || !source->memory_started) return;
  const Nanoseconds begun = parts.executor.now();
  source->precopy_round_running = true;
  parts.replication.run_round_now(
      {.urgent = true}, [token = alive.token(), this, begun, run = source->run](const Status& ok) {
        if (!token() || !source || source->run != run || source->phase != MigratePhase::Precopy) return;
        source->precopy_round_running = false;
        const Nanoseconds took = parts.executor.now() - begun;
        if (ok) {
          ++source->rounds;
          source->precopy_round_done = true;
        }
        update_brake();
        // As long a pause as the round took, so that memory gets at least half of the link; none while it is held.
        const Nanoseconds pause =
            source->held ? options.poll_interval / 2 : std::clamp(took, options.poll_interval / 2, kSecond);
        source->round.start(pause, [this] { run_precopy_round(); });
      });
}

void CoordinatorImpl::poll_precopy() {
  if (!source || source->phase != MigratePhase::Precopy) return;
  source->qemu->query([token = alive.token(), this, run = source->run](const Result<QemuState>& state) {
    if (!token() || !source || source->run != run || source->phase != MigratePhase::Precopy) return;
    if (state) {
      source->qemu_state = *state;
      // Paused by somebody else: QEMU's own stop is `finish-migrate`.
      if (state->migration == MigrationState::Active && state->run == RunState::Paused) source->guest_running = false;
      on_source_migration_state(state->migration);
      if (!source || source->phase != MigratePhase::Precopy) return;
    } else if (source_qemu_dead()) {
      return source_failed("the source QEMU died");
    }
    const Nanoseconds now = parts.executor.now();
    const uint64_t raw = parts.memory.figures().raw_bytes;
    if (source->held) {  // a brake says nothing about how fast QEMU would be without it
      source->memory_bytes_seen = raw;
      source->memory_seen_at = now;
    } else if (now - source->memory_seen_at >= options.poll_interval / 2) {
      source->memory_rate = static_cast<uint64_t>(static_cast<double>(above(raw, source->memory_bytes_seen)) /
                                                  to_seconds(now - source->memory_seen_at));
      source->memory_bytes_seen = raw;
      source->memory_seen_at = now;
    }
    note_throughput();
    update_brake();
    widen_switchover(now);
    source->poll.start(options.poll_interval, [this] { poll_precopy(); });
  });
}

void CoordinatorImpl::widen_switchover(Nanoseconds now) {
  const bool near = source->switchover_bandwidth > 0 && !source->held && source->qemu_state.ram_total > 0 &&
                    near_switchover(source->qemu_state.ram_remaining, source->switchover_bandwidth,
                                    downtime_shares(source->request.downtime_limit));
  if (!near) source->widened_at = now;
  if (!near || now - source->widened_at < kSwitchoverPatience) return;
  source->widened_at = now;
  source->switchover_bandwidth *= 2;
  source->qemu->set_switchover_bandwidth(source->switchover_bandwidth);
}

void CoordinatorImpl::update_brake() {
  if (!source || !source->memory_started) return;
  // Without a link the disks fall behind, however little QEMU has left.
  const bool held =
      source->phase == MigratePhase::Precopy &&
      (!connected() || brake_held({.first_round_done = source->precopy_round_done,
                                   .ram_remaining = source->qemu_state.ram_remaining,
                                   .ram_total = source->qemu_state.ram_total,
                                   .memory_rate = std::max(source->memory_rate, parts.replication.progress().send_rate),
                                   .predicted_last_round = predicted_last_round_now(),
                                   .poll_interval = options.poll_interval,
                                   .shares = downtime_shares(source->request.downtime_limit)}));
  if (held == source->held) return;
  source->held = held;
  parts.memory.hold(held);
}

uint64_t CoordinatorImpl::link_rate_now() const {
  return std::max(parts.channel.figures().send_rate, source ? source->throughput : 0);
}

Nanoseconds CoordinatorImpl::predicted_last_round_now() const {
  return predicted_last_round(parts.replication.progress(), link_rate_now(), parts.channel.figures().rtt);
}

// What the link carried in its best second of this migration. Short rounds are ruled by the round trip, not by the
// rate: judged by what they reach alone, the last one would never seem to fit.
void CoordinatorImpl::note_throughput() {
  const Nanoseconds now = parts.executor.now();
  const uint64_t sent = parts.channel.figures().sent_bytes;
  if (source->window_at == 0 || sent < source->window_sent) {
    source->window_at = now;
    source->window_sent = sent;
  }
  const Nanoseconds passed = now - source->window_at;
  if (passed < kSecond) return;
  const double rate = static_cast<double>(sent - source->window_sent) / to_seconds(passed);
  source->throughput = std::max(source->throughput, static_cast<uint64_t>(rate));
  source->window_at = now;
  source->window_sent = sent;
}

// STOP is where the pause begins; a RESUME before the switchover means that it was somebody else's.
void CoordinatorImpl::on_source_run_state(RunState run) {
  if (!source) return;
  // Before an attempt, too: a guest that its operator stops meanwhile is moved as one that is paused.
  if (!source->attempt_open && source->done) source->guest_running = run == RunState::Running;
  if (!source->attempt_open || own.state != HandoverState::Migrating || source->switchover_asked) return;
  if (run == RunState::Running) {
    source->guest_running = true;
    source->stopped_at = 0;
  } else if (source->stopped_at == 0) {
    source->stopped_at = parts.executor.now();
  }
}

void CoordinatorImpl::on_source_migration_state(MigrationState state) {
  if (!source || !source->attempt_open || !source->memory_started) return;
  switch (state) {
    case MigrationState::PreSwitchover:
      return reached_pre_switchover();
    case MigrationState::Completed:
      if (own.state == HandoverState::Fenced) poll_fenced();
      return;
    case MigrationState::Failed:
      return source_failed("QEMU reports that the migration failed");
    case MigrationState::Cancelled:
      return source_failed("the migration was cancelled in QEMU");
    default:
      return;
  }
}

void CoordinatorImpl::reached_pre_switchover() {
  if (own.state != HandoverState::Migrating || source->switchover_asked) return;
  source->switchover_asked = true;
  if (source->stopped_at == 0) source->stopped_at = parts.executor.now();
  if (stopped_too_early(predicted_last_round_now(), source->request.downtime_limit)) {
    source->too_early = true;
    return source_failed(
        fmt::format("QEMU stopped the guest while the last disk round needs {:.0f} ms; the limit is {:.0f} ms",
                    to_seconds(predicted_last_round_now()) * 1000, to_seconds(source->request.downtime_limit) * 1000));
  }
  // The guest is stopped and writes nothing; other clients of the export are held before the record is written.
  parts.devices.park_writes();
  gate = Gate::Parked;
  enter(MigratePhase::Switchover);
  apply(event::SwitchoverReached{.attempt = own.attempt,
                                 .peer_prepared = source->prepared,
                                 .same_run = true,
                                 .guest_was_running = source->guest_running},
        [this](const Transition& transition) {
          if (!transition.next) sync_gate();
        });
}

void CoordinatorImpl::send_last_epoch() {
  update_brake();
  source->limit.start(options.fenced_limit, [this] {
    source_failed(fmt::format("the switchover was not done within {:.0f} s", to_seconds(options.fenced_limit)));
  });
  const Id128 attempt = own.attempt;
  parts.devices.quiesce([token = alive.token(), this, attempt](const Status& ok) {
    if (!token() || !source || own.attempt != attempt || !parks_writes(own)) return;
    if (!ok) return source_failed(ok.error().text);
    parts.replication.send_final_epoch(attempt, [t = alive.token(), this, attempt](const Result<uint64_t>& epoch) {
      if (!t() || own.attempt != attempt) return;
      if (!epoch) return source_failed(epoch.error().text);
      if (source) ++source->rounds;
    });
  });
}

void CoordinatorImpl::continue_migration() {
  if (options.faults.go_before_postmigrate) {
    apply(event::SourceQemuState{.completed = true, .postmigrate = true});
  }
  const Id128 attempt = own.attempt;
  source->qemu->migrate_continue([token = alive.token(), this, attempt](const Status& ok) {
    if (!token() || !source || own.attempt != attempt || own.state != HandoverState::Fenced) return;
    if (!ok) return source_failed(ok.error().text);
    poll_fenced();
  });
}

// `completed` is announced a moment before `postmigrate`: asked until both are seen.
void CoordinatorImpl::poll_fenced() {
  if (!source || own.state != HandoverState::Fenced) return;
  const Id128 attempt = own.attempt;
  source->qemu->query([token = alive.token(), this, attempt](const Result<QemuState>& state) {
    if (!token() || !source || own.attempt != attempt || own.state != HandoverState::Fenced) return;
    if (!state) {
      if (source_qemu_dead()) return source_failed("the source QEMU died");
    } else {
      if (state->migration == MigrationState::Failed || state->migration == MigrationState::Cancelled)
        return source_failed("the migration failed in QEMU: " + state->migration_error);
      apply(event::SourceQemuState{.completed = state->migration == MigrationState::Completed,
                                   .postmigrate = state->run == RunState::PostMigrate});
    }
    const bool close = state && state->migration == MigrationState::Completed;
    source->poll.start(close ? 2 * kMillisecond : options.poll_interval / 2, [this] { poll_fenced(); });
  });
}

void CoordinatorImpl::source_failed(const std::string& reason) {
  if (!source) return;
  if (!source->attempt_open) {
    if (source->done) finish(MigrateOutcome::RolledBack, reason);
    return;
  }
  if (source->error.empty()) source->error = reason;
  apply(event::SourceAbort{.qemu_dead = source_qemu_dead(), .operator_spoke = false, .reason = reason});
}

bool CoordinatorImpl::source_qemu_dead() const {
  if (own.qemu.is_none()) return false;
  Qemu* qemu = parts.qemu_at(own.qmp_path.empty() ? parts.default_qmp_path : own.qmp_path);
  return qemu && qemu->fate(own.qemu) == ProcessFate::Dead;
}

void CoordinatorImpl::entered_go_sent() {
  if (!source || !source->done || source->phase == MigratePhase::Handover) return;
  source->poll.cancel();
  enter(MigratePhase::Handover);
  start_doubt_limit();
}

// The protocol goes on whatever the command says; but the command does not wait for ever.
void CoordinatorImpl::start_doubt_limit() {
  if (!source || !source->done) return;
  source->limit.start(options.doubt_limit, [this] {
    if (options.faults.unfence_after_go_without_aborted && own.state == HandoverState::GoSent) {
      own.state = HandoverState::Fenced;
      apply(event::SourceAbort{.qemu_dead = false, .operator_spoke = true, .reason = "planted"});
      return;
    }
    finish(MigrateOutcome::Failed, explain(own));
  });
}

void CoordinatorImpl::on_answer(event::Answer answer, const Id128& attempt, uint64_t term, const std::string& reason) {
  if (options.faults.fail_parked_on_primary && answer == event::Answer::Primary && own.state == HandoverState::GoSent)
    parts.devices.refuse_writes();
  if (answer == event::Answer::Aborted && source && source->attempt_open && attempt == own.attempt &&
      source->error.empty())
    source->error = "the peer gave up: " + reason;
  apply(event::PeerAnswered{.answer = answer, .attempt = attempt, .term = term, .reason = reason});
}

void CoordinatorImpl::on_running(const RunningMessage& message) {
  if (own.state == HandoverState::GoSent && message.attempt == own.attempt) {
    if (source) {
      source->peer_epoch = message.last_epoch;
      if (source->stopped_at != 0) {
        const Nanoseconds resumed =
            parts.executor.now() - static_cast<Nanoseconds>(message.resumed_ago_ns) - parts.channel.figures().rtt / 2;
        source->downtime_ms = std::max(0.0, to_seconds(resumed - source->stopped_at) * 1000);
      }
      if (source->done) enter(MigratePhase::Running);
    } else {
      source = std::make_unique<SourceRun>(parts.executor);  // after a restart: only to know the epoch
      source->peer_epoch = message.last_epoch;
    }
  }
  on_answer(event::Answer::Running, message.attempt, message.term, "");
}

void CoordinatorImpl::end_source_memory() {
  if (!source) return;
  source->poll.cancel();
  source->round.cancel();
  source->limit.cancel();
  if (source->memory_started) {
    const MemoryFigures figures = parts.memory.figures();
    source->earlier_attempts.raw_bytes += figures.raw_bytes;
    source->earlier_attempts.wire_bytes += figures.wire_bytes;
    parts.memory.stop();
    source->memory_started = false;
  }
}

void CoordinatorImpl::handed_over() {
  end_source_memory();
  if (!own.quit_source) restore_capabilities();
  if (!source) return;
  source->attempt_open = false;
  finish(MigrateOutcome::Done, "");
}

void CoordinatorImpl::rolled_back() {
  end_source_memory();
  restore_capabilities();
  if (!source || !source->attempt_open) return;
  source->attempt_open = false;
  if (source->stopped_at != 0) source->downtime_ms = to_seconds(parts.executor.now() - source->stopped_at) * 1000;
  parts.replication.cancel_final_epoch();
  if (!source->done) return;
  // H9: another attempt is worth asking for; the peer refuses it without a fresh QEMU.
  constexpr uint32_t kAttemptsMax = 3;
  if (source->too_early && source->attempts < kAttemptsMax) {
    log::info("group={} {}; trying again", options.group, source->error);
    source->too_early = false;
    enter(MigratePhase::Converge);
    return run_converge_round();
  }
  finish(MigrateOutcome::RolledBack, source->error.empty() ? own.reason : source->error);
}

// The peer turned out to own the group: nothing of the attempt goes on here.
void CoordinatorImpl::lost_to_peer() {
  if (!source || may_run(own)) return;
  end_source_memory();
  source->attempt_open = false;
  finish(MigrateOutcome::Failed, explain(own));
}

void CoordinatorImpl::enter(MigratePhase phase) {
  source->phase = phase;
  source->phase_at = parts.executor.now();
  log::info("group={} phase={}", options.group, to_string(phase));
  if (events.phase_changed) events.phase_changed(phase);
}

Status CoordinatorImpl::cancel(const std::string& reason) {
  if (!source || !source->done) return fail(ErrorKind::NotFound, "no migration of this group is under way");
  if (own.state == HandoverState::GoSent)
    return fail(ErrorKind::Fenced, "too late: the peer was told to run the guest");
  if (!source->attempt_open) {
    finish(MigrateOutcome::RolledBack, reason);
    return {};
  }
  source->too_early = false;
  source->error = reason;
  source_failed(reason);
  return {};
}

MigratePhase CoordinatorImpl::phase() const {
  switch (own.state) {
    case HandoverState::Prepared:
      return peer && peer->fence_noticed ? MigratePhase::Switchover : MigratePhase::Precopy;
    case HandoverState::Primary:
    case HandoverState::Started:
      return MigratePhase::Handover;
    default:
      break;
  }
  if (source && source->phase != MigratePhase::Idle) return source->phase;
  switch (own.state) {  // the daemon restarted
    case HandoverState::Migrating:
      return MigratePhase::Precopy;
    case HandoverState::Fenced:
      return MigratePhase::Switchover;
    case HandoverState::GoSent:
      return MigratePhase::Handover;
    default:
      return MigratePhase::Idle;
  }
}

MigrateProgress CoordinatorImpl::progress() const {
  MigrateProgress progress;
  if (!source || source->phase == MigratePhase::Idle) return progress;
  const RoundProgress disks = parts.replication.progress();
  const MemoryFigures memory = source->memory_started ? parts.memory.figures() : MemoryFigures{};
  const Nanoseconds now = parts.executor.now();
  progress.phase = source->phase;
  progress.attempt = source->attempt_open ? own.attempt : Id128{};
  progress.elapsed_s = to_seconds(now - source->started_at);
  progress.phase_s = to_seconds(now - source->phase_at);
  progress.rounds = source->rounds;
  progress.disk_remaining_bytes = disks.remaining_bytes;
  const bool counted = source->qemu_state.ram_total > 0;
  progress.memory_remaining_bytes = counted ? source->qemu_state.ram_remaining : source->request.memory_bytes;
  progress.memory_total_bytes = counted ? source->qemu_state.ram_total : source->request.memory_bytes;
  progress.wire_bytes_disk = above(disks.wire_bytes, source->base.wire_bytes);
  progress.raw_bytes_disk = above(disks.raw_bytes, source->base.raw_bytes);
  progress.wire_bytes_memory = source->earlier_attempts.wire_bytes + memory.wire_bytes;
  progress.raw_bytes_memory = source->earlier_attempts.raw_bytes + memory.raw_bytes;
  progress.predicted_last_round_ms = to_seconds(predicted_last_round_now()) * 1000;
  progress.brake_held = source->held;
  progress.error = source->error;
  return progress;
}

void CoordinatorImpl::finish(MigrateOutcome outcome, std::string error) {
  if (!source || !source->done) return;
  const MigrateProgress progress_now = progress();
  MigrateResult result;
  result.outcome = outcome;
  result.owner = owner_word(own);
  switch (outcome) {
    case MigrateOutcome::Done:
      result.guest = GuestPlace::RunningPeer;
      break;
    case MigrateOutcome::RolledBack:
    case MigrateOutcome::Failed: {
      const bool runs = source->guest_running && own.state != HandoverState::Fenced && !source_qemu_dead();
      result.guest = own.owner != Owner::Self || !source->guest_seen ? GuestPlace::Unknown
                     : runs                                          ? GuestPlace::RunningSource
                                                                     : GuestPlace::PausedSource;
      break;
    }
  }
  result.total_s = to_seconds(parts.executor.now() - source->started_at);
  result.downtime_ms = source->downtime_ms;
  result.rounds = source->rounds;
  result.wire_bytes_disk = progress_now.wire_bytes_disk;
  result.wire_bytes_memory = progress_now.wire_bytes_memory;
  result.raw_bytes_disk = progress_now.raw_bytes_disk;
  result.raw_bytes_memory = progress_now.raw_bytes_memory;
  result.error = std::move(error);
  explain_unknown(result);
  source->poll.cancel();
  source->round.cancel();
  source->deadline.cancel();
  source->limit.cancel();
  enter(result.outcome == MigrateOutcome::Done         ? MigratePhase::Done
        : result.outcome == MigrateOutcome::RolledBack ? MigratePhase::RolledBack
                                                       : MigratePhase::Failed);
  last_result = result;
  const MigrateDone done = std::move(source->done);
  source->done = nullptr;
  done(result);
}

}  // namespace vmferry
