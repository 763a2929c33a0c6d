// SPDX-License-Identifier: Apache-2.0
//
// Control socket: one command per line in, one line of JSON out.
//
// Flow: Emulator polls the descriptors that append_polls() names and calls serve(); the commands are Emulator's.
// A client that sends long lines, or does not take its answers, is disconnected: the wire comes first (I9, I12).
// Threads: the emulator's only one. See docs/wan-emulator.md, "Control".
#pragma once

#include <poll.h>

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/base/result.h"
#include "perf/wan/netns.h"

namespace vmferry::wan {

class ControlServer {
 public:
  using Handler = std::function<std::string(std::string_view)>;  // command line -> answer, without line ends

  // Replaces a socket that is left at `path`, never a file of another kind. Owner only.
  static Result<ControlServer> listen(const std::string& path);
  ControlServer(ControlServer&&) noexcept;
  ControlServer& operator=(ControlServer&&) = delete;
  ~ControlServer();

  void append_polls(std::vector<pollfd>& polls) const;
  // Accepts and serves everybody who has something to say; cheap when nobody has.
  void serve(const Handler& handler);

 private:
  struct Client {
    Fd socket;
    std::string pending;
  };
  ControlServer(std::string path, Fd listener) : path_(std::move(path)), listener_(std::move(listener)) {}
  static bool serve_client(Client& client, const Handler& handler);

  std::string path_;
  Fd listener_;
  std::vector<Client> clients_;
};

// Sends one command and returns the answer.
Result<std::string> call_control(const std::string& path, std::string_view command);

}  // namespace vmferry::wan
