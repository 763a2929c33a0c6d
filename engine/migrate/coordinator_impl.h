// SPDX-License-Identifier: Apache-2.0
//
// Inside of HandoverCoordinator, shared by coordinator.cpp, source_side.cpp, peer_side.cpp, recovery.cpp and
// promotion.cpp; nobody else includes it.
// Threads: the group's executor.
#pragma once

#include "engine/base/log.h"
#include "engine/migrate/coordinator.h"
#include "engine/migrate/estimator.h"
#include "netproto/repl/handover_messages.h"

namespace vmferry {

struct CoordinatorImpl {
  using Parts = HandoverCoordinator::Parts;
  using MigrateDone = HandoverCoordinator::MigrateDone;
  using Done = HandoverCoordinator::Done;

  CoordinatorImpl(Parts parts_in, Ownership ownership_in, CoordinatorOptions options_in, CoordinatorEvents events_in);

  // --- coordinator.cpp: one event at a time, durable before it acts
  using After = std::function<void(const Transition&)>;
  void apply(HandoverEvent event, After after = {});
  void run_queue();
  void commit(Transition transition, After after);
  void prepare_commit(std::function<void(const Status&)> ready, const Ownership& next);
  void save(std::shared_ptr<Transition> transition, After after);
  void saved(const Transition& transition, const After& after);
  void perform(const Action& action);
  void sync_gate();
  void alert(const std::string& text);
  bool connected() const { return hello_seen && parts.channel.connected(); }
  template <typename Message>
  void send(MessageType type, const Message& message) {
    // Before the hellos the peer cannot judge it; what matters is said again from the state after them.
    if (hello_heard) parts.channel.send(TrafficClass::Control, type, encode(message));
  }
  void send_about(ActionKind kind, const Id128& attempt);
  Status on_hello(const PeerOwnership& peer);
  void on_disconnected();
  Status on_message(MessageType type, ByteSpan payload);
  Qemu* qemu_for(const std::string& path);
  // Connecting again would drop a connection that works, and with it whoever watches it.
  void connect_if_needed(Qemu* qemu, Qemu::Done done);
  // Runs `task` after `delay`, unless this is gone or stop_retries() came.
  void later(Nanoseconds delay, Task task);

  // --- source_side.cpp
  struct SourceRun;
  Status migrate(const MigrateRequest& request, MigrateDone done);
  Status cancel(const std::string& reason);
  MigrateProgress progress() const;
  MigratePhase phase() const;
  void enter(MigratePhase phase);
  void check_source_qemu();
  void ask_capabilities();
  void start_rounds();
  void poll_bulk();
  void run_converge_round();
  void begin_attempt();
  void on_prepared(const PreparedMessage& message);
  void start_memory();
  void run_precopy_round();
  void poll_precopy();
  void update_brake();
  uint64_t link_rate_now() const;
  void widen_switchover(Nanoseconds now);
  void on_source_migration_state(MigrationState state);
  void on_source_run_state(RunState run);
  void reached_pre_switchover();
  void send_last_epoch();
  void continue_migration();
  void poll_fenced();
  void source_failed(const std::string& reason);
  void entered_go_sent();
  void start_doubt_limit();
  void lost_to_peer();
  void on_answer(event::Answer answer, const Id128& attempt, uint64_t term, const std::string& reason);
  void on_running(const RunningMessage& message);
  void handed_over();
  void rolled_back();
  void finish(MigrateOutcome outcome, std::string error);
  Nanoseconds predicted_last_round_now() const;
  void note_throughput();
  bool source_qemu_dead() const;
  void end_source_memory();

  // --- peer_side.cpp
  struct PeerRun;
  void on_prepare(const PrepareMessage& message);
  void prepare_with(const PrepareMessage& message, Qemu* qemu, bool fresh, const std::string& capabilities = "");
  void start_incoming();
  void send_prepared_if_ready();
  void on_fence_notice(const FenceNoticeMessage& message);
  void start_fence_limit();
  void on_go(const GoMessage& message);
  void note_final_epoch(const Id128& attempt, uint64_t epoch);
  void on_destination_migration_state(MigrationState state);
  void check_destination_loaded();
  void check_conditions();
  void start_disconnect_limit();
  void peer_abort(const std::string& reason);
  void check_still_paused();
  void check_still_paused_again();
  void query_primary();
  void look_at_started(Nanoseconds delay);
  void continue_guest();
  void watch_destination();
  void destination_dead();
  void kill_destination();
  void quit_destination();
  void end_destination(const ProcessIdentity& identity);
  void discard_incoming();
  void announce_guest();
  void send_running();

  // --- recovery.cpp
  void resume();
  void resume_peer();
  static bool same_process(const ProcessIdentity& a, const ProcessIdentity& b);
  void owed_resume(Nanoseconds delay);
  void look_at_owed_resume();
  void observe_owed(const Result<QemuState>& state);
  void cancel_owed();
  void cont_owed();
  void cont_kept(uint64_t term, int tries);
  void restore_capabilities();
  void stop_qemu();

  // --- promotion.cpp
  void promote(const PromoteOptions& options, Done done);
  void replicate_all(std::function<void(bool replicated)> then);
  void demote(Done done);
  void resolve(ResolveChoice choice, bool force, Done done);
  void with_guest_state(std::function<void(bool running)> then);
  void on_promote_request(const PromoteRequestMessage& message);
  void on_promote_reply(const PromoteReplyMessage& message);
  void reply_to_promote(const PromoteRequestMessage& message, const Transition& transition);
  void end_promote(const Status& status);

  Parts parts;
  CoordinatorOptions options;
  CoordinatorEvents events;
  Ownership own;  // what is durable
  Alive alive;

  struct QueuedEvent {
    HandoverEvent event;
    After after;
  };
  std::deque<QueuedEvent> queue;
  bool busy = false;  // a record is being written, or an event is being decided
  enum class Gate : uint8_t { Unset, Open, Parked, Refused };
  Gate gate = Gate::Unset;
  uint32_t writes_held = 0;          // decisions about a fence under way: until then no record opens the gate
  bool accept_inconsistent = false;  // of the promotion asked for last

  bool hello_seen = false;   // and accepted
  bool hello_heard = false;  // on this connection, even if refused: a refused peer is told why
  std::optional<PeerOwnership> peer_seen;

  std::unique_ptr<SourceRun> source;
  std::unique_ptr<PeerRun> peer;
  std::optional<MigrateResult> last_result;
  bool resuming_owed = false;
  uint64_t runs = 0;

  struct PendingPromote {
    Id128 attempt{};
    uint64_t term = 0;
    PromoteOptions options;
    Done done;
  };
  std::optional<PendingPromote> promoting;
  uint64_t promote_term = 0;  // asked for last: the peer may have fenced itself with it
  Timer promote_timer;
};

// The migration that this daemon's operator asked for.
struct CoordinatorImpl::SourceRun {
  explicit SourceRun(Executor& executor) : poll(executor), round(executor), deadline(executor), limit(executor) {}

  MigrateRequest request;
  MigrateDone done;
  MigratePhase phase = MigratePhase::Idle;
  Qemu* qemu = nullptr;
  bool guest_seen = false;  // QEMU has answered: guest_running is true or false
  bool guest_running = false;
  Nanoseconds started_at = 0;
  Nanoseconds phase_at = 0;
  RoundProgress base;       // bytes of the disks before this migration
  uint64_t throughput = 0;  // bytes per second, of the best second so far
  uint64_t window_sent = 0;
  Nanoseconds window_at = 0;
  uint32_t rounds = 0;
  uint32_t attempts = 0;
  uint64_t run = 0;           // callbacks of an earlier migration or attempt name another one
  bool attempt_open = false;  // from Start to Own again or Secondary

  // of the attempt
  bool prepared = false;
  bool memory_started = false;
  bool switchover_asked = false;
  bool too_early = false;
  bool precopy_round_done = false;
  bool precopy_round_running = false;
  bool held = false;
  Nanoseconds stopped_at = 0;  // QEMU's STOP; 0: it runs
  QemuState qemu_state;
  uint64_t memory_bytes_seen = 0;
  Nanoseconds memory_seen_at = 0;
  uint64_t switchover_bandwidth = 0;  // bytes per second that QEMU was told to count on; 0: nothing is measured
  Nanoseconds widened_at = 0;
  uint64_t memory_rate = 0;
  MemoryFigures earlier_attempts;  // bytes of attempts before this one
  double downtime_ms = 0;
  uint64_t peer_epoch = 0;   // that the peer took over at
  std::string capabilities;  // of QEMU, before the first attempt
  std::string error;

  Timer poll;
  Timer round;
  Timer deadline;  // --timeout
  Timer limit;     // of the fence, then of the doubt
};

// The destination's part of an attempt, as far as it is not durable.
struct CoordinatorImpl::PeerRun {
  explicit PeerRun(Executor& executor) : limit(executor), poll(executor), answer(executor) {}

  Id128 attempt{};
  Qemu* qemu = nullptr;
  bool sink_started = false;
  bool epoch_durable = false;
  bool stream_hash_equal = false;
  bool go = false;
  bool qemu_loaded = false;
  bool guest_was_running = true;
  bool fence_noticed = false;
  bool cont_asked = false;
  bool cont_error_seen = false;
  bool announced = false;
  uint64_t last_epoch = 0;
  Nanoseconds resumed_at = 0;
  Timer limit;  // H10
  Timer poll;
  Timer answer;  // of QEMU
};

}  // namespace vmferry
