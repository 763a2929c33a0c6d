// SPDX-License-Identifier: Apache-2.0
//
// Control questions to a peer and their answers: matches replies to requests, times them out, and answers the peer's.
//
// Flow: PeerLink owns one and gives it the messages PeerRequest and PeerReply. Threads: the executor's thread.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "engine/runtime/executor.h"
#include "netproto/repl/hello.h"

namespace vmferry {

class PeerRequests {
 public:
  using Done = std::function<void(Result<std::string>)>;
  using Answer = std::function<void(Result<std::string>)>;
  using Serve = std::function<void(const std::string& method, const std::string& json, Answer answer)>;
  using Send = std::function<void(MessageType type, Bytes payload)>;

  static constexpr size_t kOutgoingMax = 256;
  static constexpr size_t kIncomingMax = 64;  // beyond: answered Busy

  PeerRequests(Executor& executor, Send send, Serve serve)
      : executor_(executor), send_(std::move(send)), serve_(std::move(serve)) {}

  // `done` runs once, never inline; not at all when this object dies first.
  void request(const std::string& method, std::string json, Nanoseconds timeout, Done done);
  // False: malformed, or an answer to nothing. The connection is then not to be trusted any further.
  Status take_request(ByteSpan payload);
  Status take_reply(ByteSpan payload);
  // The connection is gone: all questions fail, and answers to the peer's questions go nowhere.
  void disconnected(const Error& error);
  void refuse_later(Done done, Error error);  // runs `done` with the error from a task

 private:
  struct Waiting {
    std::string method;
    Done done;
    std::unique_ptr<Timer> timeout;
  };
  void answer(uint64_t generation, uint64_t id, const Result<std::string>& result);

  Executor& executor_;
  Send send_;
  Serve serve_;
  std::map<uint64_t, Waiting> outgoing_;
  std::set<uint64_t> timed_out_;  // their late answers are no violation; bounded by kOutgoingMax, oldest go
  std::set<uint64_t> incoming_;
  uint64_t next_id_ = 1;
  uint64_t generation_ = 0;  // of the connection
  Alive alive_;
};

}  // namespace vmferry
