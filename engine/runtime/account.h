// SPDX-License-Identifier: Apache-2.0
//
// Who may connect to a unix socket that we make: its owner and mode, by the names of the system's accounts.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>

#include "engine/base/result.h"

namespace vmferry {

struct SocketAccess {
  std::string owner{};  // as given: USER, USER:GROUP or :GROUP, names or numbers; "" is our own
  mode_t mode = 0600;
};

struct SocketOwner {
  std::optional<uid_t> user;
  std::optional<gid_t> group;
};

// Reads the databases of accounts, which may block where they are not files. A name that does not exist is NotFound.
Result<SocketOwner> find_owner(std::string_view text);

// Octal, 0600 and more of 0777: the daemon's own access is never taken away.
Result<mode_t> parse_socket_mode(std::string_view text);

}  // namespace vmferry
