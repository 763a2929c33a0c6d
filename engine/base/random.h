// SPDX-License-Identifier: Apache-2.0
//
// A small seeded generator (SplitMix64, Steele, Lea, Flood, OOPSLA 2014) for the simulator, jitter and sampling.
// Never for secrets: those come from getrandom (random_id, netproto/tls).
#pragma once

#include <cstdint>

namespace vmferry {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  // Uniform in [0, bound); bound > 0. The modulo bias of 64 bits does not matter for tests and jitter.
  uint64_t below(uint64_t bound) { return next() % bound; }
  // True in `numerator` of `denominator` cases.
  bool chance(uint64_t numerator, uint64_t denominator) { return below(denominator) < numerator; }

 private:
  uint64_t state_;
};

}  // namespace vmferry
