// SPDX-License-Identifier: Apache-2.0
//
// Ownerships in every state, as the transition function's tests need them. Attempt 1 with term 8 is under way;
// the group was owned with term 7 before.
#pragma once

#include <gtest/gtest.h>

#include <array>

#include "engine/migrate/handover.h"

namespace vmferry {

inline constexpr std::array kAllStates = {
    HandoverState::Own,      HandoverState::Migrating,         HandoverState::Fenced,
    HandoverState::GoSent,   HandoverState::AbortedResumeOwed, HandoverState::Secondary,
    HandoverState::Prepared, HandoverState::Primary,           HandoverState::Started,
    HandoverState::Running,  HandoverState::Aborted,           HandoverState::Superseded};

inline Id128 attempt_id(uint8_t number) {
  Id128 id;
  id.bytes[15] = number;
  return id;
}

inline constexpr uint64_t kOwnTerm = 7;
inline constexpr uint64_t kAttemptTerm = 8;

inline Ownership in_state(HandoverState state) {
  Ownership ownership;
  ownership.state = state;
  ownership.term = kAttemptTerm;
  ownership.attempt = attempt_id(1);
  switch (state) {
    case HandoverState::Own:
      ownership.term = kOwnTerm;
      ownership.attempt = {};
      break;
    case HandoverState::GoSent:
      ownership.owner = Owner::Unknown;
      break;
    case HandoverState::AbortedResumeOwed:
      ownership.term = kAttemptTerm + 1;
      break;
    case HandoverState::Secondary:
      ownership.term = kOwnTerm;
      ownership.attempt = {};
      [[fallthrough]];
    case HandoverState::Prepared:
    case HandoverState::Aborted:
    case HandoverState::Superseded:
      ownership.role = Role::Secondary;
      ownership.owner = Owner::Peer;
      break;
    default:
      break;
  }
  return ownership;
}

inline std::vector<ActionKind> kinds(const Transition& transition) {
  std::vector<ActionKind> result;
  for (const Action& action : transition.actions) result.push_back(action.kind);
  return result;
}

// Nothing changes and nothing is done; a refusal is allowed.
inline bool is_inert(const Transition& transition) {
  return !transition.next && transition.actions.empty();
}

inline std::string name_of(const HandoverState& state) {
  return std::string(to_string(state));
}

}  // namespace vmferry
