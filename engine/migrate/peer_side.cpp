// SPDX-License-Identifier: Apache-2.0
//
// The destination's part of a handover: PREPARE, the incoming stream, the conditions, and the first `cont`.
#include "engine/migrate/coordinator_impl.h"

namespace vmferry {

void CoordinatorImpl::on_prepare(const PrepareMessage& message) {
  const bool repeated = own.attempt == message.attempt && own.term == message.term;
  Qemu* qemu = qemu_for("");
  if (repeated || !qemu || own.role == Role::Primary) return prepare_with(message, qemu, false);
  const auto connected_to = [token = alive.token(), this, message, qemu](const Status& ok) {
    if (!token()) return;
    if (!ok) {
      log::warn("group={} destination QEMU: {}", options.group, ok.error().text);
      return prepare_with(message, qemu, false);
    }
    qemu->query([t = alive.token(), this, message, qemu](const Result<QemuState>& state) {
      if (!t()) return;
      const bool fresh = state && state->run == RunState::InMigrate && state->migration == MigrationState::None;
      if (!fresh) return prepare_with(message, qemu, false);
      qemu->capabilities([t, this, message, qemu](const Result<std::string>& on) {
        if (t()) prepare_with(message, qemu, on.has_value(), on.value_or(""));
      });
    });
  };
  // Anew, because a fresh QEMU may have taken the socket's path; but never away from one that is being watched.
  if (own.state == HandoverState::Prepared) return connect_if_needed(qemu, connected_to);
  qemu->connect(connected_to);
}

void CoordinatorImpl::prepare_with(const PrepareMessage& message, Qemu* qemu, bool fresh,
                                   const std::string& capabilities) {
  apply(event::PrepareReceived{.attempt = message.attempt,
                               .term = message.term,
                               .qemu_fresh = fresh,
                               .qemu = fresh ? qemu->identity() : ProcessIdentity{},
                               .qmp_path = parts.default_qmp_path,
                               .guest_was_running = message.guest_was_running,
                               .detach = message.detach,
                               .capabilities = capabilities},
        [this, message](const Transition& transition) {
          if (!transition.refused()) return;
          send(MessageType::Prepared,
               PreparedMessage{
                   .attempt = message.attempt, .term = message.term, .accepted = false, .reason = transition.refusal});
        });
}

void CoordinatorImpl::start_incoming() {
  peer = std::make_unique<PeerRun>(parts.executor);
  peer->attempt = own.attempt;
  peer->guest_was_running = own.guest_was_running;
  peer->qemu = qemu_for(own.qmp_path);
  const Id128 attempt = own.attempt;
  if (!peer->qemu) return peer_abort("the destination QEMU is gone");
  watch_destination();
  if (!connected()) start_disconnect_limit();
  peer->qemu->migrate_in([token = alive.token(), this, attempt](Result<std::unique_ptr<ByteStream>> stream) {
    if (!token() || !peer || peer->attempt != attempt || own.state != HandoverState::Prepared) return;
    if (!stream) return peer_abort(stream.error().text);
    parts.memory.start_sink(std::move(*stream), attempt,
                            {.complete =
                                 [t = alive.token(), this, attempt](bool equal) {
                                   if (!t() || !peer || peer->attempt != attempt) return;
                                   if (!equal) return peer_abort("the memory stream arrived with a wrong hash");
                                   peer->stream_hash_equal = true;
                                   check_destination_loaded();
                                   check_conditions();
                                 },
                             .failed =
                                 [t = alive.token(), this, attempt](const Error& error) {
                                   if (t() && peer && peer->attempt == attempt) peer_abort(error.text);
                                 }});
    peer->sink_started = true;
    send_prepared_if_ready();
  });
}

void CoordinatorImpl::send_prepared_if_ready() {
  if (!peer || !peer->sink_started || own.state != HandoverState::Prepared) return;
  send(MessageType::Prepared,
       PreparedMessage{.attempt = own.attempt, .term = own.term, .accepted = true, .reason = ""});
}

void CoordinatorImpl::watch_destination() {
  const Id128 attempt = own.attempt;
  const auto current = [token = alive.token(), this, attempt] { return token() && peer && peer->attempt == attempt; };
  peer->qemu->set_events({.run_state =
                              [current, this](RunState run) {
                                if (!current()) return;
                                if (run == RunState::Running && peer->cont_asked && peer->resumed_at == 0)
                                  peer->resumed_at = parts.executor.now();
                              },
                          .migration_state =
                              [current, this](MigrationState state) {
                                if (current()) on_destination_migration_state(state);
                              },
                          .connection_lost =
                              [current, this] {
                                // No proof of death; but in Prepared a QEMU that is not watched is no destination.
                                if (current() &&
                                    (own.state == HandoverState::Prepared || own.state == HandoverState::Primary))
                                  apply(event::QemuDead{.proved = false, .cont_error_seen = false});
                              },
                          .process_dead =
                              [current, this] {
                                if (current()) destination_dead();
                              }});
}

void CoordinatorImpl::destination_dead() {
  const bool refused_cont = peer && peer->cont_error_seen;
  if (own.state == HandoverState::Started && refused_cont) {
    // The guest may go back now, unless a client was answered a write here: held and looked for before the decision.
    parts.devices.park_writes();
    gate = Gate::Parked;
    if (parts.devices.wrote()) apply(event::FirstWrite{});
  }
  apply(event::QemuDead{.proved = true, .cont_error_seen = refused_cont}, [this](const Transition&) { sync_gate(); });
}

void CoordinatorImpl::on_fence_notice(const FenceNoticeMessage& message) {
  // The answer was lost with the connection: a fenced source must not wait for its own limit.
  if (own.state == HandoverState::Aborted && message.attempt == own.attempt)
    return send_about(ActionKind::SendAborted, own.attempt);
  if (message.attempt == own.attempt) start_fence_limit();
}

// H10: from here on a guest waits.
void CoordinatorImpl::start_fence_limit() {
  if (!peer || own.state != HandoverState::Prepared || peer->fence_noticed) return;
  peer->fence_noticed = true;
  peer->limit.start(options.peer_fence_limit, [this] {
    peer_abort(fmt::format("not everything arrived within {} s of the stop: epoch {}, memory {}, GO {}, QEMU {}",
                           options.peer_fence_limit / kSecond, peer->epoch_durable ? "here" : "missing",
                           peer->stream_hash_equal ? "here" : "missing", peer->go ? "here" : "missing",
                           peer->qemu_loaded ? "loaded" : "not loaded"));
  });
}

void CoordinatorImpl::start_disconnect_limit() {
  if (!peer || own.state != HandoverState::Prepared || peer->fence_noticed || peer->limit.running()) return;
  peer->limit.start(options.peer_disconnect_limit,
                    [this] { peer_abort("the connection to the source was lost for too long"); });
}

void CoordinatorImpl::on_go(const GoMessage& message) {
  if (peer && peer->attempt == message.attempt && own.attempt == message.attempt) {
    peer->go = true;
    peer->guest_was_running = message.guest_was_running;
    start_fence_limit();  // the notice may have been lost with a connection
    // Waiting for the limit would only keep a guest stopped that can go on at the source.
    if (own.state == HandoverState::Prepared && message.stream_lost && !peer->stream_hash_equal)
      return peer_abort("the source restarted before the whole memory stream was here");
  }
  apply(event::GoReceived{.attempt = message.attempt, .term = message.term});
  check_conditions();
}

void CoordinatorImpl::note_final_epoch(const Id128& attempt, uint64_t epoch) {
  if (!peer || peer->attempt != attempt) return;
  peer->epoch_durable = true;
  peer->last_epoch = epoch;
  check_conditions();
}

void CoordinatorImpl::on_destination_migration_state(MigrationState state) {
  if (own.state != HandoverState::Prepared) return;
  if (state == MigrationState::Completed) check_destination_loaded();
  if (state == MigrationState::Failed) peer_abort("the destination QEMU could not load the memory stream");
}

// `completed` and paused, asked until both are seen: QEMU announces one before the other.
void CoordinatorImpl::check_destination_loaded() {
  if (!peer || own.state != HandoverState::Prepared || peer->qemu_loaded) return;
  const Id128 attempt = own.attempt;
  peer->qemu->query([token = alive.token(), this, attempt](const Result<QemuState>& state) {
    if (!token() || !peer || peer->attempt != attempt || own.state != HandoverState::Prepared || peer->qemu_loaded)
      return;
    if (state && state->migration == MigrationState::Failed)
      return peer_abort("the destination QEMU could not load the memory stream: " + state->migration_error);
    if (state && state->migration == MigrationState::Completed && state->run == RunState::Paused) {
      peer->qemu_loaded = true;
      return check_conditions();
    }
    peer->poll.start(5 * kMillisecond, [this] { check_destination_loaded(); });
  });
}

void CoordinatorImpl::check_conditions() {
  if (!peer || own.state != HandoverState::Prepared || peer->attempt != own.attempt) return;
  uint64_t epoch = 0;
  if (!peer->epoch_durable && parts.replication.durable_final_attempt(epoch) == own.attempt) {
    peer->epoch_durable = true;
    peer->last_epoch = epoch;
  }
  if (!peer->epoch_durable || !peer->stream_hash_equal || !peer->go || !peer->qemu_loaded) return;
  peer->limit.cancel();
  apply(event::Conditions{.attempt = own.attempt,
                          .epoch_durable = true,
                          .stream_hash_equal = true,
                          .go = true,
                          .qemu_completed_paused = true,
                          .guest_was_running = peer->guest_was_running});
}

void CoordinatorImpl::peer_abort(const std::string& reason) {
  apply(event::PeerAbort{reason});
}

void CoordinatorImpl::check_still_paused() {
  if (!peer || !peer->qemu) return;
  const Id128 attempt = own.attempt;
  peer->answer.start(options.qemu_answer_limit, [this] { apply(event::QemuHung{}); });
  peer->qemu->query([token = alive.token(), this, attempt](const Result<QemuState>& state) {
    if (!token() || !peer || peer->attempt != attempt || own.state != HandoverState::Primary) return;
    if (state && (state->run == RunState::Paused || state->run == RunState::Running)) {
      peer->answer.cancel();
      return apply(event::QemuStillPaused{});
    }
    peer->poll.start(options.retry_interval, [this] {
      if (own.state == HandoverState::Primary) check_still_paused_again();
    });
  });
}

// As above, without a new limit: a QEMU that does not answer is hung at the first one.
void CoordinatorImpl::check_still_paused_again() {
  Qemu* qemu = peer ? peer->qemu : nullptr;
  if (!qemu) return;
  if (qemu->fate(own.qemu) == ProcessFate::Dead) return destination_dead();
  if (!qemu->connected()) {
    qemu->connect([token = alive.token(), this](const Status&) {
      if (!token() || !peer || own.state != HandoverState::Primary) return;
      peer->poll.start(options.retry_interval, [this] { check_still_paused_again(); });
      query_primary();
    });
    return;
  }
  peer->poll.start(options.retry_interval, [this] { check_still_paused_again(); });
  query_primary();
}

void CoordinatorImpl::query_primary() {
  const Id128 attempt = own.attempt;
  peer->qemu->query([token = alive.token(), this, attempt](const Result<QemuState>& state) {
    if (!token() || !peer || peer->attempt != attempt || own.state != HandoverState::Primary || !state) return;
    if (state->run != RunState::Paused && state->run != RunState::Running) return;
    peer->answer.cancel();
    peer->poll.cancel();
    apply(event::QemuStillPaused{});
  });
}

void CoordinatorImpl::continue_guest() {
  if (!peer || !peer->qemu) return;
  if (!own.guest_was_running) {  // it was paused at the source and stays so
    if (own.state == HandoverState::Started) apply(event::ContSucceeded{});
    return;
  }
  const Id128 attempt = own.attempt;
  peer->cont_asked = true;
  peer->qemu->cont([token = alive.token(), this, attempt](const Status& ok) {
    if (!token() || !peer || own.attempt != attempt) return;
    if (own.state != HandoverState::Started) {  // forced by the operator: Running already
      if (!ok) alert("the guest could not be started here: " + ok.error().text);
      return;
    }
    if (ok) {
      if (peer->resumed_at == 0) peer->resumed_at = parts.executor.now();
      return apply(event::ContSucceeded{});
    }
    // Unavailable and Timeout: no reply came, so the guest may run (H2).
    const bool reply_seen = ok.error().kind != ErrorKind::Unavailable && ok.error().kind != ErrorKind::Timeout;
    log::error("group={} cont: {}", options.group, ok.error().text);
    peer->cont_error_seen = reply_seen;
    apply(event::ContFailed{.reply_seen = reply_seen});
    if (!reply_seen) look_at_started(options.retry_interval);
  });
}

// Started without knowing whether the guest runs: QEMU is asked until it says so, or is proved dead.
void CoordinatorImpl::look_at_started(Nanoseconds delay) {
  if (!peer) return;
  peer->poll.start(delay, [this] {
    if (own.state != HandoverState::Started || !peer || !peer->qemu) return;
    if (peer->qemu->fate(own.qemu) == ProcessFate::Dead) return destination_dead();
    connect_if_needed(peer->qemu, [token = alive.token(), this](const Status& ok) {
      if (!token() || !peer || own.state != HandoverState::Started) return;
      if (!ok) return look_at_started(options.retry_interval);
      peer->qemu->query([t = alive.token(), this](const Result<QemuState>& state) {
        if (!t() || !peer || own.state != HandoverState::Started) return;
        if (state && state->run == RunState::Running) return apply(event::ContSucceeded{});
        if (state && (state->run == RunState::Paused || state->run == RunState::InMigrate))
          return apply(event::QemuStillPaused{});
        look_at_started(options.retry_interval);
      });
    });
  });
}

void CoordinatorImpl::kill_destination() {
  if (!peer || !peer->qemu) return;
  const Id128 attempt = own.attempt;
  peer->qemu->kill([token = alive.token(), this, attempt](const Status& ok) {
    if (!token() || !peer || own.attempt != attempt) return;
    if (ok || peer->qemu->fate(own.qemu) == ProcessFate::Dead) return destination_dead();
    log::error("group={} kill of the destination QEMU: {}", options.group, ok.error().text);
    peer->poll.start(options.retry_interval, [this] { kill_destination(); });
  });
}

void CoordinatorImpl::discard_incoming() {
  if (!peer) return;
  if (peer->sink_started) parts.memory.stop();
  peer.reset();
}

// H12: the QEMU of a failed attempt is one `cont` away from being a second guest. Its identity stays in the Aborted
// record until a new attempt, so that a restarted daemon ends it too.
void CoordinatorImpl::quit_destination() {
  end_destination(own.qemu);
}

void CoordinatorImpl::end_destination(const ProcessIdentity& identity) {
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu || identity.is_none() || qemu->fate(identity) == ProcessFate::Dead) return;
  // Until it is gone, the guest runs here after all, or another process is at the socket: somebody's fresh QEMU.
  const auto owed = [this, qemu, identity] {
    return qemu->fate(identity) != ProcessFate::Dead && own.role == Role::Secondary &&
           same_process(own.qemu, identity) && same_process(qemu->identity(), identity);
  };
  connect_if_needed(qemu, [token = alive.token(), this, qemu, owed](const Status&) {
    if (!token() || !owed()) return;
    qemu->quit([](const Status&) {});
    later(options.qemu_answer_limit / 4, [qemu, owed] {
      if (owed()) qemu->kill([](const Status&) {});
    });
  });
}

void CoordinatorImpl::announce_guest() {
  if (!peer || !peer->qemu || peer->announced || own.state != HandoverState::Running) return;
  peer->announced = true;
  if (own.guest_was_running) peer->qemu->announce_self([](const Status&) {});
  restore_capabilities();
}

void CoordinatorImpl::send_running() {
  const bool mine = peer && peer->attempt == own.attempt;
  const Nanoseconds resumed = mine && peer->resumed_at != 0 ? parts.executor.now() - peer->resumed_at : 0;
  uint64_t epoch = mine ? peer->last_epoch : 0;
  if (epoch == 0 && parts.replication.durable_final_attempt(epoch) != own.attempt) epoch = 0;
  send(MessageType::Running, RunningMessage{.attempt = own.attempt,
                                            .term = own.term,
                                            .last_epoch = epoch,
                                            .resumed_ago_ns = static_cast<uint64_t>(resumed)});
}

}  // namespace vmferry
