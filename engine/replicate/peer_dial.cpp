// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/peer_dial.h"

#include <utility>

#include "netproto/repl/hello.h"

namespace vmferry {

PeerDial::PeerDial(Executor& executor, Dialer& dialer, const TlsIdentity& identity, PeerDialOptions options,
                   MakeFirst make_first, Done done)
    : executor_(executor),
      identity_(identity),
      options_(std::move(options)),
      make_first_(std::move(make_first)),
      done_(std::move(done)),
      timeout_(executor) {
  timeout_.start(options_.connect_timeout, [this] {
    finish({ErrorKind::Timeout, fmt::format("{} does not answer", options_.address)});
  });
  dialer.connect(options_.address, [this, alive = alive_.token()](Result<std::unique_ptr<ByteStream>> stream) {
    if (alive() && done_) connected(std::move(stream));
  });
}

PeerDial::~PeerDial() = default;

void PeerDial::connected(Result<std::unique_ptr<ByteStream>> stream) {
  if (!stream) return finish(stream.error());
  auto tls = TlsSession::create(identity_, TlsSession::Side::Client);
  if (!tls) return finish(tls.error());
  timeout_.start(options_.answer_timeout, [this] {
    finish({ErrorKind::Timeout, fmt::format("{} accepts connections but does not answer", options_.address)});
  });
  connection_ = std::make_unique<PeerConnection>(executor_, std::move(*stream), std::move(*tls));
  connection_->set_handler(*this);
}

void PeerDial::connection_established() {
  if (connection_->peer_key_hash() != options_.pinned_key) {
    // The other side cannot know what we expected, so it is told before the connection goes.
    const HelloReject reject{.reason = RejectReason::KeyNotPinned,
                             .text = "the dialling side expects another key at this address"};
    connection_->send_and_close(MessageType::HelloReject, encode(reject));
    return finish({ErrorKind::Mismatch,
                   fmt::format("{} presents key {}, but {} is pinned: it is another daemon, or its state directory "
                               "was replaced",
                               options_.address, to_hex(connection_->peer_key_hash()), to_hex(options_.pinned_key))});
  }
  auto first = make_first_(*connection_);
  if (!first) return finish(first.error());
  first_sent_ = true;
  connection_->send(first->type, first->payload);
}

void PeerDial::connection_message(MessageType type, ByteSpan payload) {
  timeout_.cancel();
  auto done = std::exchange(done_, nullptr);
  done(Answer{.connection = std::move(connection_), .type = type, .payload = payload});
}

void PeerDial::connection_closed(const Error& error) {
  finish({error.kind, fmt::format("{}: {}", options_.address, error.text)});
}

void PeerDial::finish(const Error& error) {
  timeout_.cancel();
  if (connection_) connection_->close();
  if (auto done = std::exchange(done_, nullptr)) done(tl::unexpected(error));
}

}  // namespace vmferry
