// SPDX-License-Identifier: Apache-2.0
//
// What a daemon does with the record that it finds at its start, and the resume of a guest that a failed migration
// left stopped.
#include "engine/migrate/coordinator_impl.h"

namespace vmferry {

namespace {

constexpr int kContTries = 60;

}  // namespace

bool CoordinatorImpl::same_process(const ProcessIdentity& a, const ProcessIdentity& b) {
  return a.pid == b.pid && a.start_time == b.start_time && a.boot_id == b.boot_id;
}

void CoordinatorImpl::resume() {
  if (options.faults.aborted_forgotten_on_restart && own.state == HandoverState::Aborted) {
    own.state = HandoverState::Secondary;
    own.attempt = {};
  }
  log::info("group={} state={} role={} term={} attempt={} restored", options.group, to_string(own.state),
            to_string(own.role), own.term, own.attempt.to_string());
  sync_gate();
  if (own.split_brain || own.state == HandoverState::Superseded) alert(explain(own));
  switch (own.state) {
    case HandoverState::Migrating:
    case HandoverState::Fenced: {
      // The stream died with the daemon that carried it.
      const bool dead = source_qemu_dead();
      apply(event::SourceAbort{
          .qemu_dead = dead, .operator_spoke = false, .reason = "the daemon at the source restarted"});
      break;
    }
    case HandoverState::AbortedResumeOwed:
      owed_resume(0);
      break;
    case HandoverState::GoSent:
      alert(explain(own));
      break;  // asked at the next hello
    case HandoverState::Prepared:
      peer_abort("the daemon at the destination restarted without the stream");
      break;
    case HandoverState::Aborted:
      quit_destination();
      break;
    case HandoverState::Primary:
    case HandoverState::Started:
      resume_peer();
      break;
    case HandoverState::Superseded:
      stop_qemu();  // the daemon before may have ended between the record and the guest's stop
      break;
    case HandoverState::Own:
    case HandoverState::Running:
    case HandoverState::Secondary:
      break;
  }
}

void CoordinatorImpl::resume_peer() {
  peer = std::make_unique<PeerRun>(parts.executor);
  peer->attempt = own.attempt;
  peer->guest_was_running = own.guest_was_running;
  peer->qemu = qemu_for(own.qmp_path);
  if (!peer->qemu) return alert(explain(own));
  watch_destination();
  if (own.state == HandoverState::Started) return look_at_started(0);
  peer->answer.start(options.qemu_answer_limit, [this] { apply(event::QemuHung{}); });
  check_still_paused_again();
}

void CoordinatorImpl::owed_resume(Nanoseconds delay) {
  if (resuming_owed) return;
  resuming_owed = true;
  later(delay, [this] {
    resuming_owed = false;
    look_at_owed_resume();
  });
}

void CoordinatorImpl::look_at_owed_resume() {
  if (own.state != HandoverState::AbortedResumeOwed) return;
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu) return alert("the guest has to be resumed, but no QEMU is known for this volume");
  if (!own.qemu.is_none() && qemu->fate(own.qemu) == ProcessFate::Dead) {
    event::ResumeObserved dead;
    dead.dead = true;
    return apply(dead);
  }
  connect_if_needed(qemu, [token = alive.token(), this, qemu](const Status& ok) {
    if (!token()) return;
    if (!ok) return owed_resume(options.retry_interval);
    qemu->query([t = alive.token(), this](const Result<QemuState>& state) {
      if (t()) observe_owed(state);
    });
  });
}

void CoordinatorImpl::observe_owed(const Result<QemuState>& state) {
  if (own.state != HandoverState::AbortedResumeOwed) return;
  if (!state) return owed_resume(options.retry_interval);
  event::ResumeObserved seen;
  seen.state = *state;
  apply(seen, [this](const Transition& transition) {
    // "Look again" is paced: QEMU needs a moment to end a migration.
    if (transition.actions.empty() && own.state == HandoverState::AbortedResumeOwed)
      owed_resume(options.retry_interval / 10);
  });
}

void CoordinatorImpl::cancel_owed() {
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu) return;
  qemu->migrate_cancel([token = alive.token(), this](const Status&) {
    if (token()) owed_resume(options.retry_interval / 10);
  });
}

void CoordinatorImpl::cont_owed() {
  if (own.state != HandoverState::AbortedResumeOwed) return cont_kept(own.term, kContTries);
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu) return;
  qemu->cont([token = alive.token(), this](const Status&) {
    if (token()) owed_resume(options.retry_interval / 10);
  });
}

// After --discard-peer: the guest that was stopped by the split brain, if it is still there. A daemon that was
// restarted since has no connection to its QEMU yet.
void CoordinatorImpl::cont_kept(uint64_t term, int tries) {
  if (own.term != term || !may_run(own) || tries == 0) return;
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu) return;
  const auto again = [token = alive.token(), this, term, tries] {
    if (token()) later(options.retry_interval, [this, term, tries] { cont_kept(term, tries - 1); });
  };
  connect_if_needed(qemu, [token = alive.token(), this, term, qemu, again](const Status& ok) {
    if (!token() || own.term != term || !may_run(own)) return;
    if (!ok) {
      if (!own.qemu.is_none() && qemu->fate(own.qemu) == ProcessFate::Alive) again();
      return;
    }
    qemu->cont([again, group = options.group](const Status& running) {
      if (running) return;
      log::warn("group={} the guest could not be continued: {}", group, running.error().text);
      again();
    });
  });
}

// At the end of an attempt, in whatever life of the daemon: the operator's own next migration must find its QEMU as it
// was. Another QEMU at the socket was never touched.
void CoordinatorImpl::restore_capabilities() {
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu) return;
  connect_if_needed(qemu, [token = alive.token(), this, qemu](const Status& ok) {
    if (!token() || !ok || !same_process(qemu->identity(), own.qemu)) return;
    qemu->restore_capabilities(own.capabilities, [group = options.group](const Status& restored) {
      if (!restored) log::warn("group={} capabilities of QEMU were not restored: {}", group, restored.error().text);
    });
  });
}

// H7: repeated until QEMU says that the guest is stopped or is dead; volumes that refuse writes do not stop a guest.
void CoordinatorImpl::stop_qemu() {
  if (may_run(own)) return;
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu) return;
  const auto again = [token = alive.token(), this] {
    if (token()) later(options.retry_interval, [this] { stop_qemu(); });
  };
  connect_if_needed(qemu, [token = alive.token(), this, qemu, again](const Status& ok) {
    if (!token() || may_run(own)) return;
    if (!ok) {
      if (!own.qemu.is_none() && qemu->fate(own.qemu) == ProcessFate::Alive) again();
      return;
    }
    qemu->stop([again](const Status& stopped) {
      if (!stopped) again();
    });
  });
}

}  // namespace vmferry
