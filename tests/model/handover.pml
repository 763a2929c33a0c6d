// SPDX-License-Identifier: Apache-2.0
//
// The handover of one group between two daemons, as engine/migrate implements it, for spin: every interleaving of two
// daemons with durable and volatile state, two QEMUs and a link, with up to FAULTS faults and ATTEMPTS migrations.
//
// States have the names of HandoverState and messages those of MessageType; tests/model/check compares them with the
// code. What is durable is a record (s.., p..); what a restart forgets is reset in S_FORGETS and P_FORGETS. A record and
// the actions that follow from it are two steps, so that a daemon can die between them; so are looking at QEMU and
// acting on what was seen. Limits (timers) may run out at any moment, which only adds behaviours.
//
// The whole is one process whose alternatives are the steps: the interleaving is all there is. ACK() states I1 and I5
// at each acknowledged write, INVARIANT is checked in every state by the process Monitor, SETTLED where nothing is left
// to happen. -DPLANT_... puts in one of the mistakes that the check has to find.

#ifndef FAULTS
#define FAULTS 2
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#define WRITES 2
#define FORCED_ATTEMPT 7

mtype:state = { Own, Migrating, Fenced, GoSent, AbortedResumeOwed, Secondary, Prepared, Primary, Started, Running,
                Aborted, Superseded };
mtype:message = { MsgGroupHello, MsgPrepare, MsgPrepared, MsgRefused, MsgFenceNotice, MsgGo, MsgPrimary, MsgStarted,
                  MsgRunning, MsgAborted, MsgUnknownAttempt };
// Source: Runs, Precopy, PreSwitchover, Device, PostMigrate, Dead. Destination: Fresh, Loading, Loaded, Runs, Dead.
mtype:qemu = { Runs, Precopy, PreSwitchover, Device, PostMigrate, Fresh, Loading, Loaded, Dead };
// What a daemon still has to do after its record became durable.
mtype:pending = { Idle, AfterMigrating, AfterFenced, AfterGoSent, AfterTakenBack, AfterPrepared, AfterPrimary,
                  AfterStarted, AfterRunning, AfterAborted, AfterSuperseded };

// --- durable
mtype:state s = Own;
byte s_term = 1, s_att = 0;
bit s_forced = 0;
mtype:state p = Secondary;
byte p_term = 1, p_att = 0;
bit p_forced = 0, p_wrote = 0;
byte s_data = 0, p_data = 0;  // how many of the acknowledged writes the volumes of each side hold
byte p_epoch = 0;             // attempt whose last epoch is applied at the peer

// --- volatile: source daemon
mtype:pending s_act = Idle;
byte s_migrate_asked;  // attempt whose `migrate` is on its way to QEMU
bit s_hello, s_memory, s_pre_seen, s_post_seen, s_epoch_held, s_tail_held, s_parked, s_parked_failed;
// --- volatile: peer daemon
mtype:pending p_act = Idle;
bit p_hello, p_sink, p_hash, p_go, p_paused_seen, p_cont_error, p_quit_asked;
bit p_write_unnoticed;  // acknowledged, but not yet in the record

// --- the world
mtype:qemu qs = Runs, qd = Fresh;
bit link_up = 1;
chan to_p = [8] of { mtype:message, byte, byte, mtype:state };
chan to_s = [8] of { mtype:message, byte, byte, mtype:state };
byte faults = FAULTS, attempts = 0, acknowledged = 0;

#ifdef PLANT_LATE_MIGRATE_NOT_CANCELLED
#define CANCEL_LATE Precopy
#else
#define CANCEL_LATE Runs
#endif

#define FORCED (s_forced || p_forced)
#define S_RUNS (qs == Runs || qs == Precopy)
#define P_RUNS (qd == Runs)
#define S_MAY (s == Own || s == Migrating || s == AbortedResumeOwed)
#define P_MAY (p == Started || p == Running)
#define S_PRIMARY (s != Secondary && s != Superseded)
#define P_PRIMARY (p == Primary || p == Started || p == Running)

#define INVARIANT \
  (!(S_RUNS && P_RUNS) && (FORCED || !(S_MAY && P_MAY)) && \
   (!P_RUNS || P_MAY || p == Superseded) && \
   (FORCED || p != Primary || (s == GoSent && s_att == p_att && (qs == PostMigrate || qs == Dead))))

// One more acknowledged write: whoever acknowledges it holds all earlier ones, and nobody else may acknowledge any.
#define ACK(data) assert(FORCED || data == acknowledged); data++; acknowledged++

// Before the hellos the peer cannot judge a message: it is not sent, and said again from the state after them.
#define TO_P(kind) if :: link_up && s_hello -> assert(nfull(to_p)); to_p!kind(s_att, s_term, s) :: else fi
#define TO_S(kind, att) if :: link_up && p_hello -> assert(nfull(to_s)); to_s!kind(att, p_term, p) :: else fi

#define S_FORGETS \
  s_act = Idle; s_hello = 0; s_migrate_asked = 0; s_memory = 0; s_pre_seen = 0; s_post_seen = 0; s_epoch_held = 0; s_tail_held = 0
#define P_FORGETS p_act = Idle; p_hello = 0; p_sink = 0; p_hash = 0; p_go = 0; p_paused_seen = 0; p_cont_error = 0; \
  p_quit_asked = 0; p_write_unnoticed = 0
#define LINK_CUT \
  link_up = 0; s_hello = 0; p_hello = 0; \
  do :: nempty(to_p) -> to_p?k, a, t, st :: empty(to_p) -> break od; \
  do :: nempty(to_s) -> to_s?k, a, t, st :: empty(to_s) -> break od

// A term above everything that the attempt used; parked writes are applied and acknowledged.
#define TAKE_BACK(above) \
  assert(!s_parked_failed); \
  s_term = (above > s_term -> above : s_term) + 1; s = AbortedResumeOwed; s_act = AfterTakenBack; \
  if :: s_parked -> ACK(s_data); s_parked = 0 :: else fi
#define P_ABORT p = Aborted; p_act = AfterAborted
#define S_SUPERSEDED(term) s = Superseded; s_term = term; s_parked = 0; s_act = AfterSuperseded

// handover_contact.cpp, yield_to: the other side claims the group with a higher term.
#define P_YIELDS(term, state) \
  if \
  :: p == Prepared -> P_ABORT \
  :: p == Secondary || p == Aborted || p == Superseded -> \
       if :: state == Migrating || state == Fenced || state == GoSent \
          :: else -> p = (p == Superseded -> Superseded : Secondary); p_term = term fi \
  :: else -> p = Superseded; p_term = term; p_act = AfterSuperseded \
  fi

proctype World() {
  mtype:message k;
  byte a, t;
  mtype:state st;
  do
  // ---------------------------------------------------------------- source daemon: events
  :: d_step { s == Own && s_act == Idle && qs == Runs && link_up && s_hello && attempts < ATTEMPTS ->
       attempts++; s = Migrating; s_term++; s_att = attempts;
       s_memory = 0; s_pre_seen = 0; s_post_seen = 0; s_epoch_held = 0; s_tail_held = 0; s_act = AfterMigrating }
  :: d_step { s_act == AfterMigrating -> s_act = Idle; TO_P(MsgPrepare) }
  // QEMU carries out `migrate`. When the attempt was given up meanwhile, the stream closes and it is cancelled.
  :: d_step { s_migrate_asked != 0 && qs == Runs ->
       if :: s == Migrating && s_migrate_asked == s_att -> s_memory = 1; qs = Precopy :: else -> qs = CANCEL_LATE fi;
       s_migrate_asked = 0 }
  :: d_step { s == Migrating && s_act == Idle && s_memory && qs == PreSwitchover && !s_pre_seen -> s_pre_seen = 1 }
  :: d_step { s == Migrating && s_act == Idle && s_pre_seen -> s = Fenced; s_act = AfterFenced }
  :: d_step { s_act == AfterFenced ->
       s_act = Idle; s_epoch_held = 1; TO_P(MsgFenceNotice);
       if :: qs == PreSwitchover -> qs = Device :: else fi }
#ifdef PLANT_GO_BEFORE_POSTMIGRATE
  :: d_step { s == Fenced && s_act == Idle && qs == Device -> s = GoSent; s_act = AfterGoSent }
#endif
  :: d_step { s == Fenced && s_act == Idle && s_memory && qs == PostMigrate && !s_post_seen -> s_post_seen = 1 }
  :: d_step { s == Fenced && s_act == Idle && s_post_seen -> s = GoSent; s_act = AfterGoSent }
  :: d_step { s_act == AfterGoSent -> s_act = Idle; TO_P(MsgGo) }
  // limit, cancel, failure of QEMU
  :: d_step { s_act == Idle && (s == Migrating || (s == Fenced && qs != Dead)) -> TAKE_BACK(0) }
#ifdef PLANT_UNFENCE_AFTER_GO
  :: d_step { s_act == Idle && s == GoSent -> TAKE_BACK(0) }
#endif
  :: d_step { s_act == AfterTakenBack -> s_act = Idle; TO_P(MsgAborted) }
  :: d_step { s == AbortedResumeOwed && s_act == Idle && (qs == Precopy || qs == PreSwitchover || qs == Device) ->
       qs = Runs }
  :: d_step { s == AbortedResumeOwed && s_act == Idle && qs == PostMigrate -> qs = Runs }
  :: d_step { s == AbortedResumeOwed && s_act == Idle && (qs == Runs || qs == Dead) -> s = Own }
  :: d_step { s_act == AfterSuperseded -> s_act = Idle; if :: S_RUNS -> qs = PostMigrate :: else fi }
  // a client other than the guest writes while the guest is stopped: parked, not acknowledged
  :: d_step { (s == Fenced || s == GoSent) && !s_parked && acknowledged < WRITES -> s_parked = 1 }
  :: d_step { S_MAY && S_RUNS && acknowledged < WRITES -> ACK(s_data) }

  // ---------------------------------------------------------------- source daemon: messages
  :: d_step { s_act == Idle && nempty(to_s) ->
       to_s?k, a, t, st;
       if
       :: k == MsgGroupHello ->
            s_hello = 1;
            if
            :: t > s_term && (st == Primary || st == Started || st == Running) ->
                 if
                 :: s == Secondary || s == Superseded -> s_term = t
                 :: s == GoSent && a == s_att
                 :: else -> S_SUPERSEDED(t)
                 fi
            // a secondary that has seen a term above ours: this side would have lost its state
            :: t > s_term && !(st == Primary || st == Started || st == Running) && S_PRIMARY -> assert(FORCED)
            :: t == s_term && S_PRIMARY && (st == Primary || st == Started || st == Running) &&
               !(a == s_att && (s == Fenced || s == GoSent)) -> assert(FORCED); S_SUPERSEDED(t)
            :: else
            fi;
            if  // Reconnected
            :: s_act != Idle
            :: s_act == Idle && s == Migrating -> TO_P(MsgPrepare)
            :: s_act == Idle && s == Fenced -> TO_P(MsgFenceNotice)
            :: s_act == Idle && s == GoSent -> TO_P(MsgGo)
            :: s_act == Idle && s == AbortedResumeOwed -> TO_P(MsgAborted)
            :: s_act == Idle && s == Own && st == Prepared && t < s_term -> TO_P(MsgAborted)
            :: else
            fi
       :: k == MsgPrepared && s == Migrating && a == s_att && !s_memory -> s_migrate_asked = a
       :: k == MsgRefused && s == Migrating && a == s_att -> TAKE_BACK(0)
       :: k == MsgAborted && a == s_att && (s == Migrating || s == Fenced || s == GoSent) -> TAKE_BACK(t)
#ifdef PLANT_FAIL_PARKED_ON_PRIMARY
       :: k == MsgPrimary && s == GoSent && a == s_att && s_parked -> s_parked = 0; s_parked_failed = 1
#endif
       :: k == MsgRunning && s == GoSent && a == s_att ->
            s = Secondary; s_term = (t > s_term -> t : s_term); s_parked = 0
       :: else
       fi; k = 0; a = 0; t = 0; st = 0 }

  // ---------------------------------------------------------------- peer daemon: events
  :: d_step { p_act == AfterPrepared ->
       p_act = Idle;
       if :: qd == Fresh -> qd = Loading; p_sink = 1; TO_S(MsgPrepared, p_att) :: else fi }
  :: d_step { p == Prepared && p_act == Idle && p_epoch == p_att && p_hash && p_go && qd != Fresh ->
       p = Primary; p_wrote = 0; p_act = AfterPrimary }
#ifdef PLANT_CONT_BEFORE_PRIMARY
  :: d_step { p == Prepared && p_act == Idle && p_epoch == p_att && p_hash && p_go && qd == Loaded -> qd = Runs }
#endif
  :: d_step { p_act == AfterPrimary -> p_act = Idle; TO_S(MsgPrimary, p_att) }
  :: d_step { p == Primary && p_act == Idle && qd == Loaded && !p_paused_seen -> p_paused_seen = 1 }
  :: d_step { p == Primary && p_act == Idle && p_paused_seen -> p = Started; p_paused_seen = 0; p_act = AfterStarted }
  :: d_step { p_act == AfterStarted ->
       p_act = Idle; TO_S(MsgStarted, p_att);
       if :: qd == Loaded -> qd = Runs :: else fi }
  // QEMU answers `cont` with an error and is killed for it
  :: d_step { p_act == AfterStarted && faults > 0 && qd == Loaded ->
       faults--; p_act = Idle; TO_S(MsgStarted, p_att); p_cont_error = 1; qd = Dead }
  // after a restart, or when no reply to `cont` came: asked until it is clear
  :: d_step { p == Started && p_act == Idle && qd == Loaded -> qd = Runs }
  :: d_step { p == Started && p_act == Idle && qd == Runs -> p = Running; p_act = AfterRunning }
  :: d_step { p_act == AfterRunning -> p_act = Idle; TO_S(MsgRunning, p_att) }
  :: d_step { p_act == Idle && qd == Dead && (p == Prepared || p == Primary) -> P_ABORT }
#ifdef PLANT_WRITE_NOT_NOTICED
  :: d_step { p_act == Idle && qd == Dead && p == Started && p_cont_error && !p_wrote -> P_ABORT }
#else
  // a write that was acknowledged has no way back: looked for once more, with writes held, before the decision
  :: d_step { p_act == Idle && qd == Dead && p == Started && p_cont_error && !p_wrote && !p_write_unnoticed -> P_ABORT }
#endif
  :: d_step { p_write_unnoticed && p_act == Idle -> p_write_unnoticed = 0; if :: P_MAY -> p_wrote = 1 :: else fi }
  :: d_step { p == Prepared && p_act == Idle -> P_ABORT }  // limit, failed load, wrong hash
  :: d_step { p_act == AfterAborted ->
       p_act = Idle; TO_S(MsgAborted, p_att); p_sink = 0; p_hash = 0; p_go = 0; p_quit_asked = 1 }
  // H12: its QEMU is quit, also by a restarted daemon
  :: d_step { (p == Aborted || (p == Secondary && p_quit_asked)) && p_act == Idle && (qd == Loading || qd == Loaded) ->
       p_quit_asked = 0; qd = Dead }
  :: d_step { p_act == AfterSuperseded -> p_act = Idle; if :: P_RUNS -> qd = Loaded :: else fi }
  :: d_step { P_MAY && p_act != AfterStarted && acknowledged < WRITES ->
       if :: !p_wrote -> p_write_unnoticed = 1 :: else fi; ACK(p_data) }

  // ---------------------------------------------------------------- peer daemon: messages
  :: d_step { p_act == Idle && nempty(to_p) ->
       to_p?k, a, t, st;
       if
       :: k == MsgGroupHello ->
            p_hello = 1;
            if
            :: t > p_term && st != Secondary && st != Superseded -> P_YIELDS(t, st)
            :: t > p_term && (st == Secondary || st == Superseded) -> assert(FORCED || !P_PRIMARY)
            :: t == p_term && P_PRIMARY && st != Secondary && st != Superseded &&
               !(a == p_att && (st == Fenced || st == GoSent)) ->
                 assert(FORCED); p = Superseded; p_act = AfterSuperseded
            :: else
            fi
       :: k == MsgPrepare ->
            if
            :: a == p_att && t == p_term && p == Prepared && p_sink -> TO_S(MsgPrepared, p_att)
            :: a == p_att && t == p_term && p == Prepared && !p_sink
            :: a == p_att && t == p_term && p == Aborted -> TO_S(MsgAborted, p_att)
            :: !(a == p_att && t == p_term && (p == Prepared || p == Aborted)) ->
                 if
                 :: (p == Secondary || p == Prepared || p == Aborted) && t > p_term && qd == Fresh ->
                      p = Prepared; p_term = t; p_att = a; p_wrote = 0;
                      p_sink = 0; p_hash = 0; p_go = 0; p_cont_error = 0; p_quit_asked = 0; p_act = AfterPrepared
                 :: else -> TO_S(MsgRefused, a)
                 fi
            fi
       :: k == MsgFenceNotice && p == Aborted && a == p_att -> TO_S(MsgAborted, p_att)
       :: k == MsgGo ->
            if
            :: a != p_att -> TO_S(MsgUnknownAttempt, a)
            :: a == p_att && p == Prepared -> p_go = 1
            :: a == p_att && p == Primary -> TO_S(MsgPrimary, a)
            :: a == p_att && p == Started -> TO_S(MsgStarted, a)
            :: a == p_att && p == Running -> TO_S(MsgRunning, a)
            :: a == p_att && p == Aborted -> TO_S(MsgAborted, a)
            :: else -> TO_S(MsgUnknownAttempt, a)
            fi
       :: k == MsgAborted && t > p_term -> P_YIELDS(t, AbortedResumeOwed)
       :: else
       fi; k = 0; a = 0; t = 0; st = 0 }

  // ---------------------------------------------------------------- data and memory on their way
  :: d_step { link_up && s_hello && p_hello && s_epoch_held && (s == Fenced || s == GoSent) && p_epoch != s_att &&
              (p == Secondary || p == Prepared || p == Aborted) -> p_data = s_data; p_epoch = s_att }
  :: d_step { link_up && s_hello && p_hello && s_tail_held && p == Prepared && p_sink && p_att == s_att &&
              qd == Loading && (s == Fenced || s == GoSent) -> qd = Loaded; p_hash = 1 }

  // ---------------------------------------------------------------- QEMU at the source
  :: d_step { qs == Precopy -> qs = PreSwitchover }
  :: d_step { qs == Precopy || qs == Device -> qs = Runs }  // it failed: runs the guest again by itself
  // the whole tail can be here before QEMU has decided how its migration ended
  :: d_step { qs == Device && s_memory && !s_tail_held -> s_tail_held = 1 }
  :: d_step { qs == Device && (s_tail_held || !s_memory) -> qs = PostMigrate }
  // ---------------------------------------------------------------- the operator starts a fresh destination QEMU
  :: d_step { qd == Dead && p_act == Idle && (p == Secondary || p == Aborted) && attempts < ATTEMPTS -> qd = Fresh }
  // ---------------------------------------------------------------- the link comes back: hellos first
  :: d_step { !link_up -> link_up = 1; to_p!MsgGroupHello(s_att, s_term, s); to_s!MsgGroupHello(p_att, p_term, p) }

  // ---------------------------------------------------------------- faults
  :: d_step { faults > 0 && link_up -> faults--; LINK_CUT; k = 0; a = 0; t = 0; st = 0 }
  :: d_step { faults > 0 ->  // the source daemon dies and comes back
       faults--; S_FORGETS; LINK_CUT; k = 0; a = 0; t = 0; st = 0;
       if :: s == Migrating || (s == Fenced && qs != Dead) -> TAKE_BACK(0)
          :: s == Superseded -> s_act = AfterSuperseded
          :: else fi }
  :: d_step { faults > 0 ->  // the peer daemon
       faults--; P_FORGETS; LINK_CUT; k = 0; a = 0; t = 0; st = 0;
#ifdef PLANT_ABORTED_FORGOTTEN
       if :: p == Aborted -> p = Secondary; p_att = 0 :: else fi;
#endif
       if :: p == Prepared -> P_ABORT :: p == Superseded -> p_act = AfterSuperseded :: else fi }
  :: d_step { faults > 0 && qs != Dead -> faults--; qs = Dead }
  :: d_step { faults > 0 && qd != Dead -> faults--; qd = Dead }
  :: d_step { faults > 0 && nempty(to_p) && len(to_p) < 4 ->  // a message twice, the second late
       faults--; to_p?<k, a, t, st>; if :: k != MsgGroupHello -> to_p!k, a, t, st :: else fi;
       k = 0; a = 0; t = 0; st = 0 }
  :: d_step { faults > 0 && nempty(to_s) && len(to_s) < 4 ->
       faults--; to_s?<k, a, t, st>; if :: k != MsgGroupHello -> to_s!k, a, t, st :: else fi;
       k = 0; a = 0; t = 0; st = 0 }
  // The operator's --run-here --force: said only when the other side's guest is dead.
  :: d_step { faults > 0 && s == GoSent && s_act == Idle && qd == Dead ->
       faults--; s_forced = 1; TAKE_BACK(0); s_att = FORCED_ATTEMPT }
  :: d_step { faults > 0 && (p == Prepared || p == Primary) && p_act == Idle && qs == Dead && qd == Loaded ->
       faults--; p_forced = 1; p = Running; p_term++; p_wrote = 0; qd = Runs; p_act = AfterRunning }

  // ---------------------------------------------------------------- nothing is left to happen
  :: else -> break
  od;
  // Exactly one guest runs, where it may; or the state says which operator's decision it waits for.
  assert((S_MAY && S_RUNS && !P_RUNS) ||
         (P_MAY && P_RUNS && !S_RUNS && s != GoSent) ||
         (s == Own && qs == Dead && !P_RUNS) ||
         (s == Fenced && qs == Dead && !P_RUNS) ||
         (s == GoSent && qd == Dead && p == Started) ||
         (s == GoSent && qd == Dead && p == Running) ||
         (s == Secondary && qd == Dead && p == Running) ||
         FORCED)
}

active proctype Monitor() {
end:
  atomic { !(INVARIANT) -> assert(INVARIANT) }
}

init { s_hello = 1; p_hello = 1; run World() }
