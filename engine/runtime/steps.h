// SPDX-License-Identifier: Apache-2.0
//
// Runs asynchronous steps one after the other until one fails. For start-up and shut-down sequences, which read top to
// bottom this way instead of drifting to the right.
// Threads: those of the steps' callbacks; one sequence is never in two.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "engine/base/result.h"

namespace vmferry {

using StepDone = std::function<void(Status)>;
using AsyncStep = std::function<void(StepDone)>;

// `done` runs once: with the error of the first step that fails, or with success after the last. Steps may complete
// inline. Whoever a step belongs to has to outlive the sequence or guard itself (Alive).
inline void run_steps(std::vector<AsyncStep> steps, StepDone done) {
  struct Run : std::enable_shared_from_this<Run> {
    std::vector<AsyncStep> steps;
    StepDone done;
    size_t next = 0;
    void advance(const Status& status) {
      if (!status || next == steps.size()) return done(status);
      AsyncStep& step = steps[next++];
      step([self = this->shared_from_this()](const Status& result) { self->advance(result); });
    }
  };
  auto run = std::make_shared<Run>();
  run->steps = std::move(steps);
  run->done = std::move(done);
  run->advance({});
}

// The same for steps that all have to be tried, as at shutdown: `done` gets the first error.
inline void run_all_steps(std::vector<AsyncStep> steps, StepDone done) {
  auto first = std::make_shared<Status>();
  for (AsyncStep& step : steps) {
    step = [step = std::move(step), first](const StepDone& next) {
      step([first, next](const Status& status) {
        if (*first && !status) *first = status;
        next({});
      });
    };
  }
  run_steps(std::move(steps), [first, done = std::move(done)](const Status&) { done(*first); });
}

// Runs `step` for each item, in order, until one fails.
template <typename Items, typename Step>
void run_each(const Items& items, Step step, StepDone done) {
  std::vector<AsyncStep> steps;
  for (auto* item : items) {
    steps.push_back([item, step](StepDone next) { step(*item, std::move(next)); });
  }
  run_steps(std::move(steps), std::move(done));
}

}  // namespace vmferry
