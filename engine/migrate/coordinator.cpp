// SPDX-License-Identifier: Apache-2.0
//
// The core of the coordinator: one event at a time, durable before it acts, and the routing of messages.
#include "engine/migrate/coordinator.h"

#include "engine/migrate/coordinator_impl.h"

namespace vmferry {

HandoverCoordinator::HandoverCoordinator(Parts parts, Ownership ownership, CoordinatorOptions options,
                                         CoordinatorEvents events)
    : impl_(std::make_unique<CoordinatorImpl>(std::move(parts), std::move(ownership), std::move(options),
                                              std::move(events))) {}
HandoverCoordinator::~HandoverCoordinator() = default;

void HandoverCoordinator::resume() {
  impl_->resume();
}
const Ownership& HandoverCoordinator::ownership() const {
  return impl_->own;
}
PeerOwnership HandoverCoordinator::hello() const {
  return to_peer_ownership(impl_->own);
}
Status HandoverCoordinator::on_hello(const PeerOwnership& peer) {
  return impl_->on_hello(peer);
}
void HandoverCoordinator::on_disconnected() {
  impl_->on_disconnected();
}
Status HandoverCoordinator::on_message(MessageType type, ByteSpan payload) {
  return impl_->on_message(type, payload);
}
Status HandoverCoordinator::migrate(const MigrateRequest& request, MigrateDone done) {
  return impl_->migrate(request, std::move(done));
}
Status HandoverCoordinator::cancel() {
  return impl_->cancel("cancelled by the operator");
}
bool HandoverCoordinator::migrating() const {
  return impl_->source != nullptr && impl_->source->done != nullptr;
}
MigratePhase HandoverCoordinator::phase() const {
  return impl_->phase();
}
MigrateProgress HandoverCoordinator::progress() const {
  return impl_->progress();
}
std::optional<MigrateResult> HandoverCoordinator::last_result() const {
  return impl_->last_result;
}
void HandoverCoordinator::promote(const PromoteOptions& options, Done done) {
  impl_->promote(options, std::move(done));
}
void HandoverCoordinator::demote(Done done) {
  impl_->demote(std::move(done));
}
void HandoverCoordinator::resolve(ResolveChoice choice, bool force, Done done) {
  impl_->resolve(choice, force, std::move(done));
}
void HandoverCoordinator::rejoined() {
  impl_->apply(event::Rejoined{});
}

CoordinatorImpl::CoordinatorImpl(Parts parts_in, Ownership ownership_in, CoordinatorOptions options_in,
                                 CoordinatorEvents events_in)
    : parts(std::move(parts_in)),
      options(std::move(options_in)),
      events(std::move(events_in)),
      own(std::move(ownership_in)),
      promote_timer(parts.executor) {
  parts.replication.set_final_epoch_listener([token = alive.token(), this](const Id128& attempt, uint64_t epoch) {
    if (token()) note_final_epoch(attempt, epoch);
  });
}

void CoordinatorImpl::apply(HandoverEvent event, After after) {
  queue.push_back({std::move(event), std::move(after)});
  if (!busy) run_queue();
}

void CoordinatorImpl::run_queue() {
  while (!busy && !queue.empty()) {
    QueuedEvent next = std::move(queue.front());
    queue.pop_front();
    busy = true;
    commit(step(own, next.event), std::move(next.after));
  }
}

void CoordinatorImpl::commit(Transition transition, After after) {
  if (!transition.next) {
    saved(transition, after);
    return;
  }
  // What is about to lose the right to write stops writing now; the record follows.
  if (accepts_writes(own) && !accepts_writes(*transition.next)) {
    parts.devices.park_writes();
    gate = Gate::Parked;
  }
  auto shared = std::make_shared<Transition>(std::move(transition));
  if (options.faults.cont_before_primary_durable && shared->next->state == HandoverState::Primary && peer && peer->qemu)
    peer->qemu->cont([](const Status&) {});
  const auto prepared = [this, shared, after = std::move(after)](const Status& ready) {
    if (ready) return save(shared, after);
    Transition refused;
    refused.refusal = ready.error().text;
    saved(refused, after);
    run_queue();
  };
  prepare_commit(prepared, *shared->next);
}

// What has to be so before the record says it; after a crash in between, the event comes again and so does this.
void CoordinatorImpl::prepare_commit(std::function<void(const Status&)> ready, const Ownership& next) {
  const auto then = [token = alive.token(), this, ready](const Status& ok) {
    if (!token()) return;
    if (!ok) log::warn("group={} change of role: {}", options.group, ok.error().text);
    ready({});
  };
  if (own.role == Role::Primary && next.state == HandoverState::Secondary) {
    // A source turns its files into a copy.
    parts.devices.refuse_writes();
    gate = Gate::Refused;
    // Only a handover tells the epoch; what an earlier one told is no longer true.
    const uint64_t epoch = parks_writes(own) && source ? source->peer_epoch : 0;
    return parts.replication.prepare_to_follow(epoch, then);
  }
  const bool takes_over = next.state == HandoverState::Own || next.state == HandoverState::Running;
  if (own.role == Role::Secondary && takes_over) {
    return parts.replication.prepare_to_own({.accept_inconsistent = accept_inconsistent},
                                            [token = alive.token(), ready](const Status& ok) {
                                              if (token()) ready(ok);
                                            });
  }
  ready({});
}

void CoordinatorImpl::save(std::shared_ptr<Transition> transition, After after) {
  parts.store.save(*transition->next, [token = alive.token(), this, transition,
                                       after = std::move(after)](const Status& ok) {
    if (!token()) return;
    if (!ok) {
      // Nothing may act on a state that is not durable; the volumes keep what the last record allows.
      log::error("group={} handover record: {}; trying again", options.group, ok.error().text);
      later(options.retry_interval, [this, transition, after] { save(transition, after); });
      return;
    }
    const HandoverState before = own.state;
    own = *transition->next;
    log::info("group={} state={} from={} role={} term={} attempt={} reason='{}'", options.group, to_string(own.state),
              to_string(before), to_string(own.role), own.term, own.attempt.to_string(), own.reason);
    sync_gate();
    if (events.ownership_changed) events.ownership_changed(own);
    saved(*transition, after);
    run_queue();
  });
}

void CoordinatorImpl::saved(const Transition& transition, const After& after) {
  // Actions may raise events: they wait in the queue until all actions of this one are under way.
  if (transition.refused())
    log::info("group={} state={} refused: {}", options.group, to_string(own.state), transition.refusal);
  for (const Action& action : transition.actions) perform(action);
  if (after) after(transition);
  busy = false;
}

// The gate follows the durable state, whatever way led to it.
void CoordinatorImpl::sync_gate() {
  const Gate wanted = accepts_writes(own) ? Gate::Open : parks_writes(own) ? Gate::Parked : Gate::Refused;
  if (wanted == gate || (wanted == Gate::Open && writes_held > 0)) return;
  gate = wanted;
  switch (wanted) {
    case Gate::Open:
      parts.devices.accept_writes();
      if (!own.wrote) {
        parts.devices.notice_first_write([token = alive.token(), this] {
          if (token()) apply(event::FirstWrite{});
        });
      }
      break;
    case Gate::Parked:
      parts.devices.park_writes();
      break;
    case Gate::Refused:
      parts.devices.refuse_writes();
      break;
    case Gate::Unset:
      break;
  }
}

void CoordinatorImpl::perform(const Action& action) {
  log::debug("group={} action={}", options.group, to_string(action.kind));
  switch (action.kind) {
    case ActionKind::SendPrepare:
    case ActionKind::SendFenceNotice:
    case ActionKind::SendGo:
    case ActionKind::SendAborted:
    case ActionKind::SendPrimary:
    case ActionKind::SendStarted:
    case ActionKind::SendUnknownAttempt:
    case ActionKind::SendDemoteNotice:
      send_about(action.kind, action.attempt);
      break;
    case ActionKind::SendPrepared:
      send_prepared_if_ready();
      break;
    case ActionKind::SendRunning:
      send_running();
      announce_guest();
      break;

    case ActionKind::StartMemory:
      start_memory();
      break;
    case ActionKind::SendLastEpoch:
      send_last_epoch();
      break;
    case ActionKind::MigrateContinue:
      continue_migration();
      break;
    case ActionKind::ResendLastEpochAndTail:
      break;  // replication and memory repeat what is not acknowledged
    case ActionKind::QuitSourceQemu:
      if (Qemu* qemu = qemu_for(own.qmp_path)) qemu->quit([](const Status&) {});
      break;
    case ActionKind::ResumeGuest:
      // Before QEMU is asked anything: while it writes a stream that nobody takes any more, it holds its big lock, and
      // neither answers nor obeys a cancel.
      end_source_memory();
      owed_resume(0);
      break;
    case ActionKind::MigrateCancel:
      cancel_owed();
      break;
    case ActionKind::Cont:
      cont_owed();
      break;
    case ActionKind::ReportRolledBack:
      rolled_back();
      break;
    case ActionKind::ReportHandedOver:
      handed_over();
      break;

    case ActionKind::StartIncoming:
      start_incoming();
      break;
    case ActionKind::CheckStillPaused:
      check_still_paused();
      break;
    case ActionKind::ContGuest:
      continue_guest();
      break;
    case ActionKind::QuitDestinationQemu:
      quit_destination();
      break;
    case ActionKind::KillQemu:
      kill_destination();
      break;
    case ActionKind::DiscardIncoming:
      discard_incoming();
      break;

    // The gate already follows the record.
    case ActionKind::UnfenceApplyParked:
    case ActionKind::FailParked:
    case ActionKind::AcceptWrites:
    case ActionKind::FenceVolumes:
      break;

    case ActionKind::StopQemu:
      stop_qemu();
      break;
    case ActionKind::ReportSplitBrain:
    case ActionKind::ReportSuperseded:
      alert(explain(own));
      lost_to_peer();
      break;
    case ActionKind::AskOperator:
      alert(explain(own));
      if (parks_writes(own)) start_doubt_limit();
      break;
    case ActionKind::SendPromoteRequest:
    case ActionKind::SendPromoteConfirmed:
      break;  // promotion.cpp sends them with what it knows
    case ActionKind::RoleChanged:
      if (events.role_changed) events.role_changed(own.role);
      break;
  }
}

void CoordinatorImpl::send_about(ActionKind kind, const Id128& attempt) {
  switch (kind) {
    case ActionKind::SendPrepare:
      return send(
          MessageType::Prepare,
          PrepareMessage{
              .attempt = attempt, .term = own.term, .guest_was_running = own.guest_was_running, .detach = own.detach});
    case ActionKind::SendFenceNotice:
      return send(MessageType::FenceNotice, FenceNoticeMessage{.attempt = attempt, .term = own.term});
    case ActionKind::SendGo:
      entered_go_sent();
      return send(MessageType::Go, GoMessage{.attempt = attempt,
                                             .term = own.term,
                                             .guest_was_running = own.guest_was_running,
                                             .stream_lost = !source || !source->memory_started});
    case ActionKind::SendAborted:
      return send(MessageType::Aborted, AbortedMessage{.attempt = attempt,
                                                       .term = own.term,
                                                       .from_source = own.state == HandoverState::AbortedResumeOwed,
                                                       .reason = own.reason});
    case ActionKind::SendPrimary:
      return send(MessageType::Primary, PrimaryMessage{.attempt = attempt, .term = own.term});
    case ActionKind::SendStarted:
      return send(MessageType::Started, StartedMessage{.attempt = attempt, .term = own.term});
    case ActionKind::SendUnknownAttempt:
      return send(MessageType::UnknownAttempt, UnknownAttemptMessage{.attempt = attempt, .term = own.term});
    case ActionKind::SendDemoteNotice:
      if (!attempt.is_none())
        send(MessageType::DemoteNotice, DemoteNoticeMessage{.attempt = attempt, .term = own.term});
      return;
    default:
      return;
  }
}

Status CoordinatorImpl::on_hello(const PeerOwnership& seen) {
  hello_seen = hello_heard = true;
  peer_seen = seen;
  const Transition now = step(own, event::HelloReceived{seen});
  apply(event::HelloReceived{seen});
  if (now.refused()) {
    hello_seen = false;
    return tl::unexpected<Error>(Error{ErrorKind::Fenced, now.refusal});
  }
  apply(event::Reconnected{});
  if (peer && !peer->fence_noticed) peer->limit.cancel();
  // Our hello may have been older than the record that gave the attempt up, and its ABORTED came before the hellos. Nor
  // has a side that was just promoted by force heard of a term that was taken since.
  const bool unaware = seen.state == HandoverState::Prepared || seen.role == Role::Primary;
  if (own.role == Role::Primary && unaware && seen.term < own.term && !seen.attempt.is_none()) {
    send(MessageType::Aborted,
         AbortedMessage{.attempt = seen.attempt, .term = own.term, .from_source = true, .reason = own.reason});
  }
  return {};
}

void CoordinatorImpl::on_disconnected() {
  hello_seen = hello_heard = false;
  start_disconnect_limit();
}

template <typename Message>
static Status route(Result<Message> message, const std::function<void(const Message&)>& to) {
  if (!message) return tl::unexpected<Error>(message.error());
  to(*message);
  return {};
}

Status CoordinatorImpl::on_message(MessageType type, ByteSpan payload) {
  if (!hello_seen) return fail(ErrorKind::Corrupt, "handover message {} before the hello", static_cast<int>(type));
  switch (type) {
    case MessageType::Prepare:
      return route<PrepareMessage>(decode_prepare(payload), [this](const PrepareMessage& m) { on_prepare(m); });
    case MessageType::Prepared:
      return route<PreparedMessage>(decode_prepared(payload), [this](const PreparedMessage& m) { on_prepared(m); });
    case MessageType::FenceNotice:
      return route<FenceNoticeMessage>(decode_fence_notice(payload),
                                       [this](const FenceNoticeMessage& m) { on_fence_notice(m); });
    case MessageType::Go:
      return route<GoMessage>(decode_go(payload), [this](const GoMessage& m) { on_go(m); });
    case MessageType::Primary:
      return route<PrimaryMessage>(decode_primary(payload), [this](const PrimaryMessage& m) {
        on_answer(event::Answer::Primary, m.attempt, m.term, "");
      });
    case MessageType::Started:
      return route<StartedMessage>(decode_started(payload), [this](const StartedMessage& m) {
        on_answer(event::Answer::Started, m.attempt, m.term, "");
      });
    case MessageType::Running:
      return route<RunningMessage>(decode_running(payload), [this](const RunningMessage& m) { on_running(m); });
    case MessageType::Aborted:
      return route<AbortedMessage>(decode_aborted(payload), [this](const AbortedMessage& m) {
        if (!m.from_source) return on_answer(event::Answer::Aborted, m.attempt, m.term, m.reason);
        apply(event::HigherTermSeen{m.term});
      });
    case MessageType::UnknownAttempt:
      return route<UnknownAttemptMessage>(decode_unknown_attempt(payload), [this](const UnknownAttemptMessage& m) {
        on_answer(event::Answer::UnknownAttempt, m.attempt, m.term, "");
      });
    case MessageType::PromoteRequest:
      return route<PromoteRequestMessage>(decode_promote_request(payload),
                                          [this](const PromoteRequestMessage& m) { on_promote_request(m); });
    case MessageType::PromoteReply:
      return route<PromoteReplyMessage>(decode_promote_reply(payload),
                                        [this](const PromoteReplyMessage& m) { on_promote_reply(m); });
    case MessageType::DemoteNotice:
      return route<DemoteNoticeMessage>(decode_demote_notice(payload), [this](const DemoteNoticeMessage&) {
        alert("the peer was demoted: no side owns the volumes; `vmferry promote VOLUME` makes one of them primary");
      });
    default:
      return fail(ErrorKind::Corrupt, "message {} is no handover message", static_cast<int>(type));
  }
}

Qemu* CoordinatorImpl::qemu_for(const std::string& path) {
  return parts.qemu_at(path.empty() ? parts.default_qmp_path : path);
}

void CoordinatorImpl::connect_if_needed(Qemu* qemu, Qemu::Done done) {
  if (!qemu->connected()) return qemu->connect(std::move(done));
  parts.executor.post([done = std::move(done)] { done({}); });
}

void CoordinatorImpl::later(Nanoseconds delay, Task task) {
  parts.executor.start_timer(delay, [token = alive.token(), task = std::move(task)] {
    if (token()) task();
  });
}

void CoordinatorImpl::alert(const std::string& text) {
  log::warn("group={} {}", options.group, text);
  if (events.alert) events.alert(text);
}

}  // namespace vmferry
