// SPDX-License-Identifier: Apache-2.0
//
// What a fuzz target demands of its subject: a violation ends the process, which the fuzzer reports as a finding.
#pragma once

#include <cstdlib>

namespace vmferry {

inline void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace vmferry
