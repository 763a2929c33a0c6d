// SPDX-License-Identifier: Apache-2.0
//
// One QMP conversation: connects, negotiates, pairs commands with replies, hands out events.
//
// Flow: QmpQemu -> QmpClient -> netproto/qemu/qmp.h codec -> SocketStream. Commands may overlap; QEMU answers in order.
// Threads: the reactor's. Callbacks never come inline; the client may be destroyed in any of them.
#pragma once

#include <map>

#include "engine/runtime/connector.h"
#include "netproto/qemu/qmp.h"

namespace vmferry {

class QmpClient final : private StreamHandler {
 public:
  using ReplyDone = std::function<void(Result<Json>)>;

  explicit QmpClient(Reactor& reactor) : reactor_(reactor), connector_(reactor), greeting_timeout_(reactor) {}
  ~QmpClient() = default;  // drops commands under way without a callback

  // `reached` runs as soon as the socket is connected, before QEMU has said anything: the process behind it is known
  // even when it hangs. `done` after capabilities are negotiated.
  void connect(const std::string& path, std::function<void(const PeerCredentials&)> reached,
               std::function<void(Status)> done);
  bool connected() const { return ready_; }
  const qmp::Greeting& greeting() const { return greeting_; }

  void set_events(std::function<void(const qmp::Event&)> event, std::function<void()> closed) {
    event_ = std::move(event);
    closed_ = std::move(closed);
  }
  // Unavailable without connection or when it ends; Timeout after 60 s (a late reply is ignored); otherwise QEMU's
  // answer. `fd` travels with the command (getfd).
  void execute(std::string_view command, const Json& arguments, ReplyDone done, UniqueFd fd = {});
  void close();

 private:
  struct Pending {
    std::string command;
    ReplyDone done;
    std::unique_ptr<Timer> timeout;
  };
  void stream_readable(ByteSpan bytes) override;
  void stream_writable() override {}
  void stream_closed(Errno error) override;
  void take(qmp::Message& message);
  void fail_all(const std::string& reason);
  void finish_connect(Status status);

  Reactor& reactor_;
  Connector connector_;
  Timer greeting_timeout_;
  std::unique_ptr<SocketStream> stream_;
  qmp::Codec codec_;
  qmp::Greeting greeting_;
  bool ready_ = false;
  std::function<void(Status)> connect_done_;
  std::map<uint64_t, Pending> pending_;
  std::function<void(const qmp::Event&)> event_;
  std::function<void()> closed_;
  Alive alive_;
};

}  // namespace vmferry
