// SPDX-License-Identifier: Apache-2.0
//
// JSON-RPC on the control socket: requests in, a method each, results out, progress in between.
//
// A connection that sends garbage is told so and closed; one that does not read its progress is closed at a limit, so
// that a stopped terminal never grows the daemon (I9, I12).
// Threads: the daemon's reactor.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "engine/runtime/executor.h"
#include "engine/runtime/stream.h"
#include "netproto/rpc/json_rpc.h"

namespace vmferry {

// One call in progress. Exactly one of result() and error() is called, once; after the client left both do nothing.
class RpcCall {
 public:
  virtual ~RpcCall() = default;
  virtual const Json& params() const = 0;
  virtual void progress(const Json& value) = 0;
  virtual void result(const Json& value) = 0;
  virtual void error(const Error& error) = 0;
  virtual bool client_present() const = 0;
  // Called once when the client leaves before the answer; for calls that follow something.
  virtual void on_client_left(std::function<void()> left) = 0;

  // Parameter access: the text of the error names the parameter. The result of optional_* is empty when absent.
  Result<std::string> text(const std::string& key) const;
  Result<std::string> optional_text(const std::string& key, const std::string& otherwise = "") const;
  Result<bool> flag(const std::string& key) const;                       // absent: false
  Result<std::vector<std::string>> names(const std::string& key) const;  // one or more valid names, none twice
};
using RpcCallPtr = std::shared_ptr<RpcCall>;
using RpcMethod = std::function<void(RpcCallPtr)>;

struct RpcLimits {
  size_t connections_max = 64;
  size_t calls_per_connection_max = 32;
  size_t unsent_bytes_max = 4U << 20;
};

class RpcServer {
 public:
  explicit RpcServer(Executor& executor, RpcLimits limits = {});
  ~RpcServer();

  void add_method(const std::string& name, RpcMethod method);
  void accept(std::unique_ptr<ByteStream> stream);
  // Refuses further connections and closes those that are open, after what is queued for them was sent.
  void shut_down();
  size_t connection_count() const { return connections_.size(); }

 private:
  class Connection;
  class Call;
  void remove(Connection* connection);

  Executor& executor_;
  RpcLimits limits_;
  std::map<std::string, RpcMethod> methods_;
  std::map<Connection*, std::shared_ptr<Connection>> connections_;
  bool shut_down_ = false;
  Alive alive_;
};

}  // namespace vmferry
