// SPDX-License-Identifier: Apache-2.0
//
// How a peer is reached: the one thing about the network that the link does not do itself, so that tests and the
// simulator can stand in for it. Real: SocketDialer.
// Threads: the executor's thread.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "engine/base/result.h"
#include "engine/runtime/stream.h"

namespace vmferry {

class Dialer {
 public:
  using Done = std::function<void(Result<std::unique_ptr<ByteStream>>)>;
  virtual ~Dialer() = default;
  // `address` is "HOST:PORT". `done` runs once, never inline; a caller that is gone by then drops the stream.
  virtual void connect(const std::string& address, Done done) = 0;
};

}  // namespace vmferry
