// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/qmp_client.h"

#include "engine/base/log.h"

namespace vmferry {

namespace {
constexpr Nanoseconds kConnectTimeout = 5 * kSecond;
constexpr Nanoseconds kCommandTimeout = 60 * kSecond;
}  // namespace

void QmpClient::connect(const std::string& path, std::function<void(const PeerCredentials&)> reached,
                        std::function<void(Status)> done) {
  close();
  codec_ = {};
  connect_done_ = std::move(done);
  const Endpoint endpoint{.is_unix = true, .path = path};
  connector_.connect(endpoint, {.timeout = kConnectTimeout}, [this, path, reached = std::move(reached)](auto stream) {
    if (!stream) return finish_connect(tl::unexpected(stream.error()));
    stream_ = std::move(*stream);
    const auto alive = alive_.token();
    if (const auto credentials = stream_->credentials()) reached(*credentials);
    if (!alive() || !stream_) return;
    // A QMP socket serves one client at a time: a second one connects, but is not greeted.
    greeting_timeout_.start(kConnectTimeout, [this, path] {
      finish_connect(fail(ErrorKind::Timeout, "QMP at '{}' does not answer; is another client connected?", path));
    });
    stream_->set_handler(this);
  });
}

void QmpClient::finish_connect(Status status) {
  greeting_timeout_.cancel();
  const auto done = std::exchange(connect_done_, nullptr);
  if (!status) close();
  if (done) done(std::move(status));
}

void QmpClient::close() {
  connector_.cancel();
  greeting_timeout_.cancel();
  stream_.reset();
  ready_ = false;
  connect_done_ = nullptr;
  fail_all("the connection was given up");
}

void QmpClient::execute(std::string_view command, const Json& arguments, ReplyDone done, UniqueFd fd) {
  if (!stream_) {
    reactor_.post([alive = alive_.token(), done = std::move(done), name = std::string(command)] {
      if (alive()) done(fail(ErrorKind::Unavailable, "QMP '{}': not connected", name));
    });
    return;
  }
  uint64_t id = 0;
  const std::string line = codec_.encode(command, arguments, id);
  Pending pending{std::string(command), std::move(done), std::make_unique<Timer>(reactor_)};
  pending.timeout->start(kCommandTimeout, [this, id] {
    const auto node = pending_.extract(id);
    if (node.empty()) return;
    node.mapped().done(
        fail(ErrorKind::Timeout, "QMP '{}': no answer within {} s", node.mapped().command, kCommandTimeout / kSecond));
  });
  pending_.emplace(id, std::move(pending));
  if (fd.valid()) {
    stream_->write_with_fd(as_bytes(line), std::move(fd));
  } else {
    stream_->write(as_bytes(line));
  }
}

void QmpClient::stream_readable(ByteSpan bytes) {
  std::vector<qmp::Message> messages;
  const Status status = codec_.feed(bytes, messages);
  const auto alive = alive_.token();
  const SocketStream* stream = stream_.get();
  for (qmp::Message& message : messages) {
    take(message);
    if (!alive() || stream_.get() != stream) return;
  }
  if (status) return;
  log::warn("qmp={} error=\"{}\"", stream_->peer_text(), status.error().text);
  stream_.reset();
  stream_closed(EPROTO);
}

void QmpClient::take(qmp::Message& message) {
  if (const auto* greeting = std::get_if<qmp::Greeting>(&message)) {
    greeting_ = *greeting;
    return execute("qmp_capabilities", nullptr, [this](Result<Json> reply) {
      ready_ = reply.has_value();
      finish_connect(reply ? Status{} : Status(tl::unexpected(reply.error())));
    });
  }
  if (const auto* event = std::get_if<qmp::Event>(&message)) {
    if (event_) event_(*event);
    return;
  }
  auto& reply = std::get<qmp::Reply>(message);
  const auto node = pending_.extract(reply.id);
  if (node.empty()) return;  // timed out before
  const Pending& pending = node.mapped();
  if (!reply.value) {
    const Error& error = reply.value.error();
    return pending.done(fail(error.kind, "QEMU refused '{}': {}", pending.command, error.text));
  }
  pending.done(std::move(reply.value));
}

void QmpClient::stream_closed(Errno) {
  const auto alive = alive_.token();
  const bool was_ready = std::exchange(ready_, false);
  stream_.reset();
  fail_all("QEMU closed the connection");
  if (!alive()) return;
  if (connect_done_) return finish_connect(fail(ErrorKind::Unavailable, "QMP: the connection closed while connecting"));
  if (was_ready && closed_) closed_();
}

void QmpClient::fail_all(const std::string& reason) {
  std::map<uint64_t, Pending> pending;
  pending.swap(pending_);
  for (auto& [id, command] : pending) {
    // Posted: close() may be called from inside anything.
    reactor_.post([alive = alive_.token(), done = std::move(command.done), name = command.command, reason] {
      if (alive()) done(fail(ErrorKind::Unavailable, "QMP '{}': {}", name, reason));
    });
  }
}

}  // namespace vmferry
