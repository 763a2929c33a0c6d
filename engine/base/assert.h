// SPDX-License-Identifier: Apache-2.0
//
// VF_ASSERT is on in every build: a broken invariant stops the daemon before it can corrupt the only copy of the data.
// For bugs of ours only; whatever comes from outside is checked with Result or Errno.
#pragma once

namespace vmferry {
[[noreturn]] void assertion_failed(const char* expression, const char* file, int line) noexcept;
}

#define VF_ASSERT(expression)                                       \
  do {                                                              \
    if (!(expression)) [[unlikely]]                                 \
      ::vmferry::assertion_failed(#expression, __FILE__, __LINE__); \
  } while (false)
