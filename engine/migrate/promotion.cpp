// SPDX-License-Identifier: Apache-2.0
//
// Change of the primary without a migration, and the operator's decisions.
#include <algorithm>

#include "engine/migrate/coordinator_impl.h"

namespace vmferry {

namespace {

Status to_status(const Transition& transition) {
  if (transition.refused()) return tl::unexpected<Error>(Error{ErrorKind::Fenced, transition.refusal});
  return {};
}

}  // namespace

void CoordinatorImpl::promote(const PromoteOptions& asked, Done done) {
  if (promoting) return done(fail(ErrorKind::Busy, "a promotion is under way"));
  const bool owner = own.state == HandoverState::Own || own.state == HandoverState::Running;
  if (owner && !own.split_brain) return done({});  // asked again
  accept_inconsistent = asked.accept_inconsistent;
  if (asked.alone && !asked.force) {
    return apply(event::FenceConfirmed{.attempt = parts.executor.new_id(),
                                       .term = own.term + 1,
                                       .consistent = parts.replication.copy_is_consistent(),
                                       .accept_inconsistent = asked.accept_inconsistent},
                 [done = std::move(done)](const Transition& transition) { done(to_status(transition)); });
  }
  if (!asked.force && !connected())
    return done(fail(ErrorKind::Unavailable,
                     "the peer is not connected and cannot confirm that it is fenced; make sure that its guest is "
                     "stopped, then add --force"));
  const Id128 attempt = parts.executor.new_id();
  // The peer's last epoch, taken with its writes parked, makes a whole copy consistent.
  apply(event::PromoteAsked{.attempt = attempt,
                            .force = asked.force,
                            .consistent = asked.force ? parts.replication.copy_is_consistent()
                                                      : parts.replication.copy_is_whole(),
                            .accept_inconsistent = asked.accept_inconsistent,
                            .peer_term = peer_seen ? peer_seen->term : 0},
        [this, asked, attempt, done = std::move(done)](const Transition& transition) {
          if (transition.refused() || !transition.has(ActionKind::SendPromoteRequest))
            return done(to_status(transition));
          const uint64_t term = std::max({own.term, peer_seen ? peer_seen->term : 0, promote_term}) + 1;
          promote_term = term;
          promoting = PendingPromote{.attempt = attempt, .term = term, .options = asked, .done = done};
          promote_timer.start(options.promote_limit, [this] {
            end_promote(fail(ErrorKind::Timeout, "the peer did not confirm its fence; repeat the command"));
          });
          send(MessageType::PromoteRequest, PromoteRequestMessage{.attempt = attempt, .term = term});
        });
}

void CoordinatorImpl::end_promote(const Status& status) {
  promote_timer.cancel();
  if (!promoting) return;
  const Done done = std::move(promoting->done);
  promoting.reset();
  done(status);
}

void CoordinatorImpl::on_promote_reply(const PromoteReplyMessage& message) {
  if (!promoting || promoting->attempt != message.attempt || promoting->term != message.term) return;
  if (!message.confirmed) return end_promote(fail(ErrorKind::Fenced, "the peer refused: {}", message.reason));
  apply(event::FenceConfirmed{.attempt = message.attempt,
                              .term = message.term,
                              .consistent = parts.replication.copy_is_consistent(),
                              .accept_inconsistent = promoting->options.accept_inconsistent},
        [this](const Transition& transition) { end_promote(to_status(transition)); });
}

// Whether a guest runs here: only a QEMU that answers can.
void CoordinatorImpl::with_guest_state(std::function<void(bool running)> then) {
  Qemu* qemu = qemu_for(own.qmp_path);
  if (!qemu) return then(false);
  connect_if_needed(qemu, [token = alive.token(), qemu, then = std::move(then)](const Status& ok) {
    if (!token()) return;
    if (!ok) return then(false);
    qemu->query([token, then](const Result<QemuState>& state) {
      // A QEMU that answers with an error may well be running.
      if (token()) then(!state || state->run == RunState::Running);
    });
  });
}

void CoordinatorImpl::on_promote_request(const PromoteRequestMessage& message) {
  const bool owner = own.state == HandoverState::Own || own.state == HandoverState::Running;
  const auto decide = [this, message](bool guest_running, bool replicated, bool held = false) {
    apply(
        event::PromoteRequestReceived{
            .attempt = message.attempt, .term = message.term, .guest_running = guest_running, .replicated = replicated},
        [this, message, held](const Transition& transition) {
          if (held) --writes_held;
          reply_to_promote(message, transition);
        });
  };
  if (!owner) return decide(false, !parts.replication.holds_unsent_writes());
  with_guest_state([this, decide](bool running) {
    if (running) return decide(true, false);
    replicate_all([decide](bool replicated) { decide(false, replicated, true); });
  });
}

// Everything acknowledged so far goes to the peer, with new writes parked from here on: also when another record, of
// the first write, becomes durable meanwhile. Whoever decides gives writes_held back.
void CoordinatorImpl::replicate_all(std::function<void(bool replicated)> then) {
  ++writes_held;
  parts.devices.park_writes();
  gate = Gate::Parked;
  const auto decided = std::make_shared<bool>(false);
  const auto once = [decided, then = std::move(then)](bool replicated) {
    if (*decided) return;
    *decided = true;
    then(replicated);
  };
  later(options.promote_limit / 2, [once] { once(false); });
  parts.devices.quiesce([token = alive.token(), this, once](const Status& ok) {
    if (!token()) return;
    if (!ok) return once(false);
    parts.replication.run_round_now({.urgent = true, .consistent = true}, [token, once](const Status& sent) {
      if (token()) once(sent.has_value());
    });
  });
}

void CoordinatorImpl::reply_to_promote(const PromoteRequestMessage& message, const Transition& transition) {
  sync_gate();  // a refusal opens the gate again
  const bool confirmed = transition.has(ActionKind::SendPromoteConfirmed);
  if (!confirmed && own.role == Role::Primary && message.term <= own.term) {
    // Our term grew since the hellos, by a decision of the operator: without ours, every question would be refused.
    send(MessageType::Aborted,
         AbortedMessage{.attempt = message.attempt, .term = own.term, .from_source = true, .reason = own.reason});
  }
  send(MessageType::PromoteReply,
       PromoteReplyMessage{
           .attempt = message.attempt, .term = message.term, .confirmed = confirmed, .reason = transition.refusal});
}

void CoordinatorImpl::demote(Done done) {
  const auto decide = [this, done = std::move(done)](bool running, bool held = false) {
    apply(event::DemoteAsked{.guest_running = running}, [this, done, held](const Transition& transition) {
      if (held) --writes_held;
      sync_gate();
      done(to_status(transition));
    });
  };
  with_guest_state([this, decide](bool running) {
    const bool owner = own.state == HandoverState::Own || own.state == HandoverState::Running;
    if (running || !owner || own.split_brain || !parts.replication.progress().connected) return decide(running);
    // So that the peer can be promoted without losing anything. Without the peer's word it is demoted all the same;
    // what the peer lacks is kept, and a promotion there is refused.
    replicate_all([decide](bool) { decide(false, true); });
  });
}

void CoordinatorImpl::resolve(ResolveChoice choice, bool force, Done done) {
  accept_inconsistent = false;
  Qemu* qemu = qemu_for(own.qmp_path);
  const bool dead = !own.qemu.is_none() && qemu && qemu->fate(own.qemu) == ProcessFate::Dead;
  const bool loaded = peer && peer->attempt == own.attempt && peer->stream_hash_equal && peer->qemu_loaded;
  apply(event::ResolveAsked{.choice = choice,
                            .force = force,
                            .new_attempt = parts.executor.new_id(),
                            .qemu_dead = dead,
                            .memory_complete = loaded,
                            .peer_term = peer_seen ? peer_seen->term : 0},
        [done = std::move(done)](const Transition& transition) { done(to_status(transition)); });
}

}  // namespace vmferry
