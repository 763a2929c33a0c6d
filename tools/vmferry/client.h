// SPDX-License-Identifier: Apache-2.0
//
// One JSON-RPC call to vmferryd over its control socket, blocking: the command line has nothing else to do.
#pragma once

#include <functional>
#include <string>

#include "netproto/rpc/json_rpc.h"

namespace vmferry::cli {

// Exit status of every command (design section 9).
enum ExitStatus : int { kDone = 0, kFailed = 1, kUsage = 2 };

class Client {
 public:
  explicit Client(std::string control) : control_(std::move(control)) {}
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  using Progress = std::function<void(const Json&)>;
  // The result, or the daemon's error, or why it cannot be reached. `progress` sees notifications as they come.
  Result<Json> call(const std::string& method, const Json& params, const Progress& progress = {});

 private:
  Status connect();

  std::string control_;  // "unix:PATH"
  int fd_ = -1;
};

}  // namespace vmferry::cli
