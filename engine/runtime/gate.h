// SPDX-License-Identifier: Apache-2.0
//
// Stopping, after Seastar's gate: operations enter while they run; close() refuses new ones and tells when the last
// one has left. An object that owns a gate may be destroyed once it is closed and empty.
// Threads: one executor.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "engine/base/assert.h"

namespace vmferry {

class Gate {
 public:
  Gate() = default;
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  ~Gate() { VF_ASSERT(count_ == 0); }  // destroyed with operations inside: they would touch freed memory

  // False once closing: the operation must not start.
  [[nodiscard]] bool enter() {
    if (closing_) return false;
    ++count_;
    return true;
  }
  void leave() {
    VF_ASSERT(count_ > 0);
    if (--count_ == 0 && closing_ && closed_) std::exchange(closed_, nullptr)();
  }
  // `closed` runs when the last operation has left: at once when none is inside, otherwise from its leave(). It may
  // destroy the gate.
  void close(std::function<void()> closed) {
    VF_ASSERT(!closing_);
    closing_ = true;
    if (count_ == 0) return closed();
    closed_ = std::move(closed);
  }
  bool closing() const { return closing_; }
  uint64_t count() const { return count_; }

 private:
  uint64_t count_ = 0;
  bool closing_ = false;
  std::function<void()> closed_;
};

}  // namespace vmferry
