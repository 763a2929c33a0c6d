// SPDX-License-Identifier: Apache-2.0
#include "engine/control/rpc_server.h"

#include <algorithm>
#include <set>

#include "engine/base/log.h"

namespace vmferry {

Result<std::string> RpcCall::text(const std::string& key) const {
  const auto it = params().find(key);
  if (it == params().end()) return fail(ErrorKind::InvalidArgument, "parameter '{}' is missing", key);
  if (!it->is_string()) return fail(ErrorKind::InvalidArgument, "parameter '{}' has to be a string", key);
  return it->get<std::string>();
}

Result<std::string> RpcCall::optional_text(const std::string& key, const std::string& otherwise) const {
  const auto it = params().find(key);
  if (it == params().end() || it->is_null()) return otherwise;
  return text(key);
}

Result<bool> RpcCall::flag(const std::string& key) const {
  const auto it = params().find(key);
  if (it == params().end() || it->is_null()) return false;
  if (!it->is_boolean()) return fail(ErrorKind::InvalidArgument, "parameter '{}' has to be true or false", key);
  return it->get<bool>();
}

Result<std::vector<std::string>> RpcCall::names(const std::string& key) const {
  const auto it = params().find(key);
  if (it == params().end() || !it->is_array() || it->empty()) {
    return fail(ErrorKind::InvalidArgument, "parameter '{}' has to be a list of at least one name", key);
  }
  std::vector<std::string> result;
  for (const Json& item : *it) {
    if (!item.is_string()) return fail(ErrorKind::InvalidArgument, "parameter '{}' has to hold names", key);
    result.push_back(item.get<std::string>());
  }
  if (std::set<std::string>(result.begin(), result.end()).size() != result.size()) {
    return fail(ErrorKind::InvalidArgument, "parameter '{}' names something twice", key);
  }
  return result;
}

class RpcServer::Call final : public RpcCall {
 public:
  Call(std::weak_ptr<Connection> connection, rpc::Request request)
      : connection_(std::move(connection)), request_(std::move(request)) {}

  const Json& params() const override { return request_.params; }
  void progress(const Json& value) override { send(rpc::encode_progress(request_.id, value), false); }
  void result(const Json& value) override { send(rpc::encode_result(request_.id, value), true); }
  void error(const Error& error) override { send(rpc::encode_error(request_.id, error), true); }
  bool client_present() const override { return !connection_.expired() && !answered_; }
  void on_client_left(std::function<void()> left) override { left_ = std::move(left); }

  void client_left() {
    connection_.reset();
    if (const auto left = std::move(left_)) left();
  }
  bool answered() const { return answered_; }

 private:
  void send(const Json& message, bool last);

  std::weak_ptr<Connection> connection_;
  rpc::Request request_;
  std::function<void()> left_;
  bool answered_ = false;
};

class RpcServer::Connection final : public StreamHandler, public std::enable_shared_from_this<Connection> {
 public:
  Connection(RpcServer& server, std::unique_ptr<ByteStream> stream) : server_(server), stream_(std::move(stream)) {}

  void start() { stream_->set_handler(this); }

  void stream_readable(ByteSpan bytes) override {
    const auto self = shared_from_this();  // a method may end this connection
    std::vector<Json> values;
    const Status fed = reader_.feed(bytes, values);
    for (const Json& value : values) {
      if (closed_) return;
      dispatch(value);
    }
    if (!fed && !closed_) {
      send_line(rpc::encode_error(nullptr, rpc::kParseError, fed.error().text));
      finish();
    }
  }
  void stream_writable() override {}
  void stream_closed(Errno) override { leave(); }

  void send_line(const Json& message) {
    if (closed_) return;
    const std::string line = to_json_line(message);
    stream_->write(as_bytes(line));
    if (stream_->unsent_bytes() > server_.limits_.unsent_bytes_max) {
      log::warn("control client={} does not read its answers: closed", stream_->peer_text());
      leave();
    }
  }
  void finish() {
    if (closed_) return;
    stream_->close_after_writing();
    leave(false);
  }
  void call_answered() {
    std::erase_if(calls_, [](const std::shared_ptr<Call>& call) { return call->answered(); });
  }

 private:
  void dispatch(const Json& value) {
    auto request = rpc::decode_request(value);
    if (!request) return send_line(rpc::encode_error(nullptr, rpc::kInvalidRequest, request.error().text));
    const auto method = server_.methods_.find(request->method);
    if (request->notification && (method == server_.methods_.end() || request->params_refused)) return;
    if (method == server_.methods_.end()) {
      return send_line(rpc::encode_error(request->id, rpc::kMethodNotFound,
                                         fmt::format("this daemon has no method '{}'", request->method)));
    }
    if (request->params_refused) {
      return send_line(rpc::encode_error(request->id, rpc::kInvalidParams, "member 'params' has to be an object"));
    }
    if (calls_.size() >= server_.limits_.calls_per_connection_max) {
      return send_line(rpc::encode_error(request->id, Error{ErrorKind::Busy, "too many calls on one connection"}));
    }
    auto call = std::make_shared<Call>(weak_from_this(), std::move(*request));
    calls_.push_back(call);
    const RpcMethod run = method->second;
    run(call);
  }
  // The stream is kept until the server drops this object from a task of its own: we may be inside its callback.
  void leave(bool close = true) {
    if (closed_) return;
    closed_ = true;
    if (close) stream_->close();
    const auto calls = std::move(calls_);
    calls_.clear();
    for (const auto& call : calls) call->client_left();
    server_.remove(this);
  }

  RpcServer& server_;
  std::unique_ptr<ByteStream> stream_;
  JsonLineReader reader_;
  std::vector<std::shared_ptr<Call>> calls_;
  bool closed_ = false;
};

void RpcServer::Call::send(const Json& message, bool last) {
  if (answered_) return;
  answered_ = last;
  if (last) left_ = nullptr;
  if (request_.notification) return;
  if (const auto connection = connection_.lock()) {
    connection->send_line(message);
    if (last) connection->call_answered();
  }
}

RpcServer::RpcServer(Executor& executor, RpcLimits limits) : executor_(executor), limits_(limits) {}

RpcServer::~RpcServer() = default;

void RpcServer::add_method(const std::string& name, RpcMethod method) {
  methods_[name] = std::move(method);
}

void RpcServer::accept(std::unique_ptr<ByteStream> stream) {
  if (shut_down_ || connections_.size() >= limits_.connections_max) {
    log::warn("control client={} refused: {}", stream->peer_text(), shut_down_ ? "shutting down" : "too many clients");
    return;
  }
  auto connection = std::make_shared<Connection>(*this, std::move(stream));
  connections_.emplace(connection.get(), connection);
  connection->start();
}

void RpcServer::shut_down() {
  shut_down_ = true;
  const auto connections = connections_;
  for (const auto& [key, connection] : connections) connection->finish();
}

void RpcServer::remove(Connection* connection) {
  // Deferred: the connection, or its stream, may be on the stack. A short grace lets close_after_writing() finish.
  executor_.start_timer(200 * kMillisecond, [this, alive = alive_.token(), connection] {
    if (alive()) connections_.erase(connection);
  });
}

}  // namespace vmferry
