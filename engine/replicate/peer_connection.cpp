// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/peer_connection.h"

#include <utility>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

// Keeps a stream until its last bytes are out. Owned by its own timer, so it cannot outlive the executor.
class ClosingStream final : public StreamHandler {
 public:
  static void keep(Executor& executor, std::unique_ptr<ByteStream> stream) {
    constexpr Nanoseconds kLinger = 5 * kSecond;
    auto closing = std::make_shared<ClosingStream>(executor, std::move(stream));
    closing->timer_ = executor.start_timer(kLinger, [closing] { closing->stream_->close(); });
    closing->stream_->set_handler(closing.get());
    closing->self_ = closing;
    closing->stream_->close_after_writing();
  }
  ClosingStream(Executor& executor, std::unique_ptr<ByteStream> stream)
      : executor_(executor), stream_(std::move(stream)) {}

  void stream_readable(ByteSpan) override {}
  void stream_writable() override {}
  void stream_closed(Errno) override {
    // The timer holds the last reference; giving it up is left to a task, because this is the stream's own callback.
    if (auto self = self_.lock()) {
      executor_.post([self] {});
      executor_.cancel_timer(timer_);
    }
  }

 private:
  Executor& executor_;
  std::unique_ptr<ByteStream> stream_;
  TimerId timer_ = 0;
  std::weak_ptr<ClosingStream> self_;
};

}  // namespace

PeerConnection::PeerConnection(Executor& executor, std::unique_ptr<ByteStream> stream, std::unique_ptr<TlsSession> tls)
    : executor_(executor),
      stream_(std::move(stream)),
      tls_(std::move(tls)),
      peer_text_(stream_->peer_text()),
      received_at_(executor.now()) {}

PeerConnection::~PeerConnection() {
  close();
}

void PeerConnection::set_handler(PeerConnectionHandler& handler) {
  const bool first = handler_ == nullptr;
  handler_ = &handler;
  if (!first || !stream_) return;
  stream_->set_handler(this);
  flush();  // a client's first flight
}

void PeerConnection::close() {
  if (!stream_) return;
  stream_->close();
  // Not destroyed here: this may be one of the stream's own callbacks, deep in a protocol handler.
  executor_.post([stream = std::shared_ptr<ByteStream>(std::move(stream_))] {});
}

size_t PeerConnection::flush() {
  Bytes output = tls_->take_output();
  const size_t size = output.size();
  if (size > 0 && stream_) stream_->write(std::move(output));
  return size;
}

void PeerConnection::send(MessageType type, ByteSpan payload) {
  Bytes frame;
  append_frame({.type = type}, payload, frame);
  send_frames(frame);
}

size_t PeerConnection::send_frames(ByteSpan frames) {
  if (!stream_) return 0;
  if (auto written = tls_->write(frames); !written) {
    // Reported from a task: the caller is in the middle of its own work.
    executor_.post([this, alive = alive_.token(), error = written.error()] {
      if (alive()) fail_with_error(error);
    });
    return 0;
  }
  return flush();
}

void PeerConnection::send_and_close(MessageType type, ByteSpan payload) {
  if (!stream_) return;
  send(type, payload);
  tls_->write_close();
  flush();
  ClosingStream::keep(executor_, std::move(stream_));
}

void PeerConnection::fail_with_error(const Error& error) {
  if (!stream_) return;
  flush();  // an alert may tell the other side
  close();
  handler_->connection_closed(error);
}

void PeerConnection::stream_readable(ByteSpan bytes) {
  received_bytes_ += bytes.size();
  received_at_ = executor_.now();
  const bool was_established = tls_->established();
  Bytes plaintext = std::exchange(plaintext_, {});
  const Status fed = tls_->feed(bytes, plaintext);
  flush();
  const auto alive = alive_.token();
  if (!was_established && tls_->established()) {
    handler_->connection_established();
    if (!alive() || !stream_) return;
  }
  decode(plaintext);
  if (!alive()) return;
  plaintext.clear();
  plaintext_ = std::move(plaintext);
  if (!fed) return fail_with_error(fed.error());
  if (tls_->closed_by_peer()) {
    fail_with_error({ErrorKind::Unavailable, "connection closed by the peer"});
  }
}

void PeerConnection::decode(ByteSpan plaintext) {
  const auto alive = alive_.token();
  const Status decoded = decoder_.feed(plaintext, [this, &alive](MessageType type, ByteSpan payload) {
    handler_->connection_message(type, payload);
    return alive() && stream_ != nullptr;
  });
  if (!decoded && alive()) fail_with_error(decoded.error());
}

void PeerConnection::stream_writable() {
  if (tls_->established()) handler_->connection_writable();
}

void PeerConnection::stream_closed(Errno error) {
  if (!stream_) return;
  std::string text = error == 0 ? "connection closed by the peer" : "connection lost: " + errno_text(error);
  if (error == 0 && !tls_->established()) text += " during the TLS handshake";
  if (!decoder_.at_boundary()) text += " in the middle of a message";
  close();
  handler_->connection_closed({ErrorKind::Unavailable, std::move(text)});
}

}  // namespace vmferry
