// SPDX-License-Identifier: Apache-2.0
//
// Shared by the files of the transition function; nobody else includes it.
// Threads: pure.
#pragma once

#include <fmt/format.h>

#include "engine/migrate/handover.h"

namespace vmferry::handover_detail {

// A copy in a new state. Role and owner follow from the state, so that no two fields can disagree.
Ownership moved(const Ownership& current, HandoverState state, std::string reason);

inline Transition nothing() {
  return {};
}

template <typename... Args>
Transition refuse(fmt::format_string<Args...> format, Args&&... args) {
  Transition transition;
  transition.refusal = fmt::format(format, std::forward<Args>(args)...);
  return transition;
}

inline Transition go_to(Ownership next, std::initializer_list<ActionKind> actions) {
  Transition transition;
  for (const ActionKind kind : actions) transition.actions.push_back({kind, next.attempt});
  transition.next = std::move(next);
  return transition;
}

inline Transition stay(const Ownership& current, std::initializer_list<ActionKind> actions) {
  Transition transition;
  for (const ActionKind kind : actions) transition.actions.push_back({kind, current.attempt});
  return transition;
}

// An answer about an attempt that is not the state's own.
inline Transition answer(ActionKind kind, const Id128& attempt) {
  Transition transition;
  transition.actions.push_back({kind, attempt});
  return transition;
}

Transition on(const Ownership& current, const event::Start& event);
Transition on(const Ownership& current, const event::SwitchoverReached& event);
Transition on(const Ownership& current, const event::SourceAbort& event);
Transition on(const Ownership& current, const event::SourceQemuState& event);
Transition on(const Ownership& current, const event::Reconnected& event);
Transition on(const Ownership& current, const event::PeerAnswered& event);
Transition on(const Ownership& current, const event::ResumeObserved& event);
Transition on(const Ownership& current, const event::PrepareReceived& event);
Transition on(const Ownership& current, const event::GoReceived& event);
Transition on(const Ownership& current, const event::Conditions& event);
Transition on(const Ownership& current, const event::QemuStillPaused& event);
Transition on(const Ownership& current, const event::ContSucceeded& event);
Transition on(const Ownership& current, const event::ContFailed& event);
Transition on(const Ownership& current, const event::QemuHung& event);
Transition on(const Ownership& current, const event::QemuDead& event);
Transition on(const Ownership& current, const event::PeerAbort& event);
Transition on(const Ownership& current, const event::HelloReceived& event);
Transition on(const Ownership& current, const event::HigherTermSeen& event);
Transition on(const Ownership& current, const event::PromoteAsked& event);
Transition on(const Ownership& current, const event::FenceConfirmed& event);
Transition on(const Ownership& current, const event::PromoteRequestReceived& event);
Transition on(const Ownership& current, const event::DemoteAsked& event);
Transition on(const Ownership& current, const event::ResolveAsked& event);
Transition on(const Ownership& current, const event::FirstWrite& event);
Transition on(const Ownership& current, const event::Rejoined& event);

}  // namespace vmferry::handover_detail
