// SPDX-License-Identifier: Apache-2.0
//
// The part of NbdConnection that stands between stream and phases once STARTTLS was acknowledged.
#include <utility>

#include "blockdev/nbd/nbd_connection.h"
#include "engine/base/log.h"
#include "engine/base/text.h"

namespace vmferry {

namespace {

constexpr size_t kTlsHandOverMin = 16_KiB;

}  // namespace

// The acknowledgement is queued already; whatever comes next is TLS.
void NbdConnection::start_tls() {
  auto session = TlsSession::create(server_.tls_.credentials);
  if (!session) return close(session.error().text);
  tls_ = std::move(*session);
}

void NbdConnection::decrypt(ByteSpan bytes) {
  const bool was_established = tls_->established();
  Bytes plaintext = std::exchange(plaintext_, {});
  plaintext.clear();
  const Status fed = tls_->feed(bytes, plaintext);
  flush_tls();
  if (!was_established && tls_->established()) {
    log::debug("nbd connection={} peer={} tls={} cipher={} client=\"{}\"", id_, stream_->peer_text(), tls_->version(),
               tls_->cipher(), printable(tls_->client_name()));
    handshake_->tls_started(tls_->client_name());
  }
  // What was decrypted before an error is authentic.
  consume(plaintext);
  plaintext_ = std::move(plaintext);
  if (phase_ == Phase::Closed) return;
  if (!fed) {
    log_refusal(fed.error().text);
    return finish("TLS failed");  // the alert that tells the client goes out before the end
  }
  if (tls_->closed_by_peer()) close("client closed the connection");
}

void NbdConnection::flush_tls() {
  Bytes output = tls_->take_output();
  if (output.empty()) return;
  // Replies of one round share a buffer of the stream; only large ones are worth handing over whole.
  if (output.size() < kTlsHandOverMin) return stream_->write(ByteSpan(output));
  stream_->write(std::move(output));
}

void NbdConnection::log_refusal(std::string_view why) {
  ++server_.totals_.refused_total;
  if (const auto suppressed = server_.refusals_.allow(server_.executor_.now())) {
    log::warn("nbd connection={} peer={} refused=\"{}\" suppressed={}", id_, stream_->peer_text(), why, *suppressed);
  }
}

void NbdConnection::end_tls() {
  if (tls_ == nullptr || std::exchange(tls_ended_, true)) return;
  tls_->write_close();
  flush_tls();
}

}  // namespace vmferry
