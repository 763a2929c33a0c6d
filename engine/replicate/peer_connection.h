// SPDX-License-Identifier: Apache-2.0
//
// One connection to another daemon: a byte stream with TLS and frames on it. Lives and dies with the stream; what
// outlives it is PeerLink.
//
// Flow: SocketStream -> TlsSession -> FrameDecoder -> handler, and the other way round.
// Threads: the executor's thread. It may be destroyed inside any of its callbacks.
#pragma once

#include <memory>

#include "engine/runtime/executor.h"
#include "engine/runtime/stream.h"
#include "netproto/repl/frame.h"
#include "netproto/tls/tls_session.h"

namespace vmferry {

class PeerConnectionHandler {
 public:
  virtual void connection_established() = 0;  // TLS is up: peer_key_hash() is proved, but not yet known to be a peer's
  virtual void connection_message(MessageType type, ByteSpan payload) = 0;
  virtual void connection_writable() = 0;                  // little is left unsent
  virtual void connection_closed(const Error& error) = 0;  // last; not after close() or reject()

 protected:
  ~PeerConnectionHandler() = default;
};

class PeerConnection final : private StreamHandler {
 public:
  PeerConnection(Executor& executor, std::unique_ptr<ByteStream> stream, std::unique_ptr<TlsSession> tls);
  ~PeerConnection();
  PeerConnection(const PeerConnection&) = delete;
  PeerConnection& operator=(const PeerConnection&) = delete;

  // The first call starts the conversation; later ones hand the connection on, with the bytes already received.
  void set_handler(PeerConnectionHandler& handler);

  // Sends one message now, ahead of anything queued elsewhere. For small ones: hello, pairing.
  void send(MessageType type, ByteSpan payload);
  // Sends whole frames; returns how many TLS bytes they became. A failure arrives as connection_closed().
  size_t send_frames(ByteSpan frames);
  size_t unsent_bytes() const { return stream_ ? stream_->unsent_bytes() : 0; }

  void close();
  // Sends one last message, says the TLS end, and closes when both are out (5 s at most). The connection may be
  // destroyed at once; the stream lives on until then.
  void send_and_close(MessageType type, ByteSpan payload);

  const KeyHash& peer_key_hash() const { return tls_->peer_key_hash(); }
  Result<TlsSession::Exporter> export_secret(std::string_view label) const { return tls_->export_secret(label); }
  const std::string& peer_text() const { return peer_text_; }
  uint64_t received_bytes() const { return received_bytes_; }
  Nanoseconds received_at() const { return received_at_; }  // when bytes came last

 private:
  void stream_readable(ByteSpan bytes) override;
  void stream_writable() override;
  void stream_closed(Errno error) override;
  size_t flush();
  void decode(ByteSpan plaintext);
  void fail_with_error(const Error& error);

  Executor& executor_;
  std::unique_ptr<ByteStream> stream_;  // null once closed
  std::unique_ptr<TlsSession> tls_;
  std::string peer_text_;
  PeerConnectionHandler* handler_ = nullptr;
  FrameDecoder decoder_;
  Bytes plaintext_;
  uint64_t received_bytes_ = 0;
  Nanoseconds received_at_ = 0;
  Alive alive_;
};

}  // namespace vmferry
