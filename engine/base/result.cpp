// SPDX-License-Identifier: Apache-2.0
#include "engine/base/result.h"

#include <cstring>

namespace vmferry {

std::string_view to_string(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::InvalidArgument:
      return "invalid-argument";
    case ErrorKind::NotFound:
      return "not-found";
    case ErrorKind::Exists:
      return "exists";
    case ErrorKind::Mismatch:
      return "mismatch";
    case ErrorKind::Fenced:
      return "fenced";
    case ErrorKind::Denied:
      return "denied";
    case ErrorKind::Busy:
      return "busy";
    case ErrorKind::Unavailable:
      return "unavailable";
    case ErrorKind::Io:
      return "io";
    case ErrorKind::Corrupt:
      return "corrupt";
    case ErrorKind::LimitExceeded:
      return "limit-exceeded";
    case ErrorKind::Timeout:
      return "timeout";
    case ErrorKind::Internal:
      return "internal";
  }
  return "unknown";
}

std::string errno_text(Errno error) {
  const char* name = strerrorname_np(error);
  const char* text = strerrordesc_np(error);
  return fmt::format("{} ({})", text != nullptr ? text : "unknown error", name != nullptr ? name : "?");
}

}  // namespace vmferry
