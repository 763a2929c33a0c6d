// SPDX-License-Identifier: Apache-2.0
#include "engine/control/metrics_server.h"

#include "engine/base/bytes.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

std::string response(const char* status, const char* type, const std::string& body) {
  return fmt::format("HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}", status,
                     type, body.size(), body);
}

}  // namespace

class MetricsServer::Connection final : public StreamHandler {
 public:
  Connection(MetricsServer& server, std::unique_ptr<ByteStream> stream)
      : server_(server), stream_(std::move(stream)), limit_(server.executor_) {}

  void start() {
    limit_.start(server_.limits_.time_max, [this] { server_.remove(this); });
    stream_->set_handler(this);
  }

  void stream_readable(ByteSpan bytes) override {
    if (answered_) return;
    request_.append(as_text(bytes));
    if (request_.size() > server_.limits_.request_bytes_max) return answer("431 Request Header Fields Too Large", "");
    if (request_.find("\r\n\r\n") == std::string::npos) return;
    if (!request_.starts_with("GET ")) return answer("405 Method Not Allowed", "only GET\n");
    const std::string target = request_.substr(4, request_.find_first_of(" \r", 4) - 4);
    if (target != "/metrics") return answer("404 Not Found", "see /metrics\n");
    answer("200 OK", server_.collect_());
  }
  void stream_writable() override {}
  void stream_closed(Errno) override { server_.remove(this); }

 private:
  void answer(const char* status, const std::string& body) {
    answered_ = true;
    const std::string text = response(status, "text/plain; version=0.0.4; charset=utf-8", body);
    stream_->write(as_bytes(text));
    stream_->close_after_writing();
    // The time limit removes us when the client has had its time to take the answer.
    limit_.start(kSecond, [this] { server_.remove(this); });
  }

  MetricsServer& server_;
  std::unique_ptr<ByteStream> stream_;
  std::string request_;
  bool answered_ = false;
  Timer limit_;
};

MetricsServer::MetricsServer(Executor& executor, Collect collect, MetricsLimits limits)
    : executor_(executor), collect_(std::move(collect)), limits_(limits) {}

MetricsServer::~MetricsServer() = default;

void MetricsServer::accept(std::unique_ptr<ByteStream> stream) {
  if (connections_.size() >= limits_.connections_max) return;  // the stream closes as it dies
  auto connection = std::make_unique<Connection>(*this, std::move(stream));
  Connection& made = *connection;
  connections_.emplace(&made, std::move(connection));
  made.start();
}

// From a task: the connection or its stream may be on the stack.
void MetricsServer::remove(Connection* connection) {
  executor_.post([this, alive = alive_.token(), connection] {
    if (alive()) connections_.erase(connection);
  });
}

void MetricsText::add(const char* name, const char* help, const char* type, Labels labels, double value) {
  Family& family = families_[name];
  if (family.head.empty()) family.head = fmt::format("# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
  std::string text;
  for (const auto& [key, label] : labels) {
    text += fmt::format("{}{}=\"", text.empty() ? "" : ",", key);
    for (const char c : label) {
      if (c == '\n') {
        text += "\\n";
        continue;
      }
      if (c == '\\' || c == '"') text += '\\';
      text += c;
    }
    text += '"';
  }
  family.samples +=
      text.empty() ? fmt::format("{} {}\n", name, value) : fmt::format("{}{{{}}} {}\n", name, text, value);
}

std::string MetricsText::text() const {
  std::string out;
  for (const auto& [name, family] : families_) out += family.head + family.samples;
  return out;
}

}  // namespace vmferry
