// SPDX-License-Identifier: Apache-2.0
#include "engine/base/assert.h"

#include <cstdio>
#include <cstdlib>

namespace vmferry {

void assertion_failed(const char* expression, const char* file, int line) noexcept {
  std::fprintf(stderr, "vmferry: broken invariant: %s (%s:%d)\n", expression, file, line);
  std::abort();
}

}  // namespace vmferry
