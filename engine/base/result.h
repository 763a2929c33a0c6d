// SPDX-License-Identifier: Apache-2.0
//
// Results and errors of control paths. The data path uses Errno (a plain errno value, 0 = success) instead.
//
// An ErrorKind says what the caller can do next, not where the error came from; the text says what failed, on what.
// Threads: values, no shared state.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <tl/expected.hpp>

namespace vmferry {

enum class ErrorKind : uint8_t {
  InvalidArgument,  // the request is wrong; repeating it does not help
  NotFound,         // a named thing does not exist
  Exists,           // a named thing exists already
  Mismatch,         // two sides disagree (size, key, version); an operator has to look
  Fenced,           // refused because of role, term or attempt
  Denied,           // a right is missing
  Busy,             // may be repeated later
  Unavailable,      // connection or process is gone; may come back by itself
  Io,               // the store failed; errno in the text
  Corrupt,          // bytes from disk or wire failed a check
  LimitExceeded,    // a configured or built-in limit
  Timeout,
  Internal,
};

std::string_view to_string(ErrorKind kind) noexcept;

struct Error {
  ErrorKind kind = ErrorKind::Internal;
  std::string text;
};

template <typename T>
using Result = tl::expected<T, Error>;
using Status = Result<void>;

template <typename... Args>
tl::unexpected<Error> fail(ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
  return tl::unexpected<Error>(Error{kind, fmt::format(format, std::forward<Args>(args)...)});
}

// The same error with a prefix that names the operation, so that a chain reads "start: open 'x': No such file".
inline tl::unexpected<Error> fail_with(const Error& cause, std::string_view operation) {
  return tl::unexpected<Error>(Error{cause.kind, fmt::format("{}: {}", operation, cause.text)});
}

// errno of the data path; 0 is success. Positive values as in <cerrno>.
using Errno = int;

// "Input/output error (EIO)"-like text for an errno.
std::string errno_text(Errno error);

}  // namespace vmferry
