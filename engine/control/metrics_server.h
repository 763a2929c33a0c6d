// SPDX-License-Identifier: Apache-2.0
//
// Answers `GET /metrics` with text in Prometheus's exposition format 0.0.4; everything else with an HTTP error.
//
// One request per connection, small and soon, or it is closed: whoever reaches the port may ask, and nothing of it may
// cost the data path (I9, I12).
// Threads: the daemon's reactor.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "engine/runtime/executor.h"
#include "engine/runtime/stream.h"

namespace vmferry {

struct MetricsLimits {
  size_t connections_max = 16;  // one more is closed at once
  size_t request_bytes_max = 8192;
  Nanoseconds time_max = 5 * kSecond;  // from the connection to the answer taken
};

class MetricsServer {
 public:
  using Collect = std::function<std::string()>;

  MetricsServer(Executor& executor, Collect collect, MetricsLimits limits = {});
  ~MetricsServer();

  void accept(std::unique_ptr<ByteStream> stream);

 private:
  class Connection;
  void remove(Connection* connection);

  Executor& executor_;
  const Collect collect_;
  const MetricsLimits limits_;
  std::map<Connection*, std::unique_ptr<Connection>> connections_;
  Alive alive_;
};

// name{key="value",...} number, with a HELP and a TYPE line before the first of each name; values escaped.
class MetricsText {
 public:
  using Labels = std::initializer_list<std::pair<const char*, std::string>>;
  void gauge(const char* name, const char* help, Labels labels, double value) {
    add(name, help, "gauge", labels, value);
  }
  void counter(const char* name, const char* help, Labels labels, double value) {
    add(name, help, "counter", labels, value);
  }
  std::string text() const;

 private:
  struct Family {
    std::string head;
    std::string samples;
  };
  void add(const char* name, const char* help, const char* type, Labels labels, double value);
  std::map<std::string, Family> families_;  // samples of a name have to stand together
};

}  // namespace vmferry
