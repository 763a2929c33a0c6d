// SPDX-License-Identifier: Apache-2.0
//
// Phases, limits and back-pressure of a connection; single requests are in nbd_requests.cpp.
#include "blockdev/nbd/nbd_connection.h"

#include <algorithm>

#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

// A client that haggles without reading the answers: no real one leaves this much behind.
constexpr size_t kHandshakeUnsentMax = 256_KiB;
constexpr std::string_view kGoneReason = "client is gone; what it left is not carried out";
constexpr size_t kHandshakeSlice = 4_KiB;  // between two looks at that limit

}  // namespace

NbdConnection::NbdConnection(NbdServer& server, std::unique_ptr<ByteStream> stream, uint64_t id)
    : server_(server),
      stream_(std::move(stream)),
      id_(id),
      accepted_at_(server.executor_.now()),
      timer_(server.executor_) {
  handshake_.emplace(server, server.limits_.handshake, server.tls_.policy);
}

NbdConnection::~NbdConnection() {
  VF_ASSERT(phase_ == Phase::Closed && operation_count_ == 0);
}

void NbdConnection::start() {
  handshake_->greet(out_);
  stream_->set_handler(this);
  send(out_);
  timer_.start(server_.limits_.handshake_time_max, [this] { close("handshake took too long"); });
}

void NbdConnection::send(ByteSpan bytes) {
  sent_bytes_ += bytes.size();
  if (tls_ == nullptr) return stream_->write(bytes);
  // A session that failed is being closed by whoever saw it fail.
  if (tls_->write(bytes)) flush_tls();
}

void NbdConnection::stream_readable(ByteSpan bytes) {
  received_bytes_ += bytes.size();
  if (requests_are_stale()) return close(kGoneReason);
  if (tls_ != nullptr) return decrypt(bytes);
  consume(bytes);
}

void NbdConnection::stream_writable() {
  settle();
}

void NbdConnection::stream_closed(Errno error) {
  if (tls_ != nullptr && !tls_->established()) log_refusal(tls_->unfinished_because());
  close_without_stream(error == 0 ? "client closed the connection" : "connection failed");
}

void NbdConnection::consume(ByteSpan bytes) {
  if (phase_ == Phase::Handshake) bytes = bytes.subspan(consume_handshake(bytes));
  if (phase_ == Phase::Transmission) {
    VF_ASSERT(held_ == Held::Nothing);  // reading is paused while something is held
    consume_requests(bytes);
    if (held_ != Held::Nothing) {
      pending_.assign(bytes.begin(), bytes.end());
      pending_used_ = 0;
      stream_->pause_reading(true);
    }
  }
  settle();
}

size_t NbdConnection::consume_handshake(ByteSpan bytes) {
  using State = nbd::Handshake::State;
  size_t used = 0;
  while (used < bytes.size()) {
    out_.clear();
    used += handshake_->feed(bytes.subspan(used, std::min(kHandshakeSlice, bytes.size() - used)), out_);
    if (handshake_->state() == State::StartTls && used < bytes.size()) {
      close("data behind STARTTLS before it was acknowledged: somebody injects options");
      return used;
    }
    if (!out_.empty()) send(out_);
    if (const std::string denial = handshake_->take_denial(); !denial.empty()) log_refusal(denial);
    switch (handshake_->state()) {
      case State::Transmission:
        enter_transmission();
        return used;
      case State::Finished:
        finish("client aborted the handshake");
        return used;
      case State::Rejected:
        close(handshake_->reason());
        return used;
      case State::StartTls:
        start_tls();
        return used;
      default:
        break;
    }
    if (stream_->unsent_bytes() > kHandshakeUnsentMax) {
      close("client does not read its answers");
      return used;
    }
  }
  return used;
}

void NbdConnection::enter_transmission() {
  const nbd::Session& session = handshake_->session();
  if (!draining_) timer_.cancel();
  export_ = server_.bind(session.export_info.name);
  if (export_ == nullptr) return close("export was removed");
  if (export_->config.clients != nullptr) client_ = export_->config.clients->next_client();
  rules_ = nbd::RequestRules::from(session);
  extra_contexts_ = session.extra_contexts;
  parser_.set_style(rules_.style());
  log::info(
      "nbd connection={} state=transmission export={} peer={} structured_replies={} extended_headers={} "
      "base_allocation={} other_contexts={}",
      id_, export_->config.name, stream_->peer_text(), session.structured_replies, session.extended_headers,
      session.base_allocation, session.extra_contexts.size());
  phase_ = Phase::Transmission;
  handshake_.reset();
}

void NbdConnection::consume_requests(ByteSpan& bytes) {
  using Event = nbd::RequestParser::Event;
  while (phase_ == Phase::Transmission && held_ == Held::Nothing) {
    switch (parser_.next(bytes)) {
      case Event::NeedBytes:
        return;
      case Event::Header:
        on_header();
        break;
      case Event::PayloadDone:
        on_payload_done();
        break;
      case Event::Broken:
        return close("wrong request magic");
    }
  }
}

void NbdConnection::hold(Held why, uint64_t bytes) {
  held_ = why;
  bytes_wanted_ = bytes;
}

bool NbdConnection::fits_own_limit(uint64_t bytes) const {
  return operation_bytes_ + stream_->unsent_bytes() + bytes <= server_.limits_.connection_inflight_bytes_max;
}

bool NbdConnection::requests_are_stale() const {
  return server_.limits_.drop_requests_of_gone_clients && stream_->peer_gone();
}

void NbdConnection::grant(uint64_t bytes) {
  VF_ASSERT(held_ == Held::AwaitsGrant && phase_ == Phase::Transmission);
  held_ = Held::Nothing;
  if (requests_are_stale()) {
    server_.release(bytes);
    return close(kGoneReason);
  }
  start_request(bytes);
  resume();
  settle();
}

// The held request is on its way; now what came behind it.
void NbdConnection::resume() {
  if (held_ != Held::Nothing || phase_ != Phase::Transmission) return;
  ByteSpan rest = ByteSpan(pending_).subspan(pending_used_);
  consume_requests(rest);
  pending_used_ = pending_.size() - rest.size();
  if (held_ != Held::Nothing || phase_ != Phase::Transmission) return;
  Bytes().swap(pending_);  // a held request is rare: no reason to keep the memory on each connection
  pending_used_ = 0;
  stream_->pause_reading(false);
}

void NbdConnection::settle() {
  if (phase_ == Phase::Closed) return;
  const uint64_t unsent = stream_->unsent_bytes();
  if (unsent > unsent_bytes_) server_.charge(unsent - unsent_bytes_);
  if (unsent < unsent_bytes_) server_.release(unsent_bytes_ - unsent);
  unsent_bytes_ = unsent;
  if (held_ == Held::OverOwnLimit && fits_own_limit(bytes_wanted_)) {
    if (requests_are_stale()) return close(kGoneReason);
    held_ = Held::Nothing;
    admit_request();
    resume();
  }
  if (phase_ != Phase::Finishing || operation_count_ > 0) return;
  end_tls();
  if (stream_->unsent_bytes() == 0) close(close_reason_);
}

uint64_t NbdConnection::client_progress() const {
  return received_bytes_ + sent_bytes_ - (phase_ == Phase::Closed ? 0 : stream_->unsent_bytes());
}

bool NbdConnection::stalled_since_last_call() {
  const bool waits_for_client = (receiving_ != nullptr && held_ == Held::Nothing) || unsent_bytes_ > 0;
  const uint64_t progress = client_progress();
  const bool stalled = phase_ != Phase::Closed && waits_for_client && progress == progress_seen_;
  progress_seen_ = progress;
  return stalled;
}

void NbdConnection::begin_drain() {
  if (phase_ != Phase::Handshake && phase_ != Phase::Transmission) return;
  draining_ = true;
  if (server_.limits_.drain_unanswered) return finish("server stops; the client is expected back");
  if (handshake_) handshake_->shut_down();
  timer_.start(server_.limits_.drain_grace, [this] { finish("server stops serving the export"); });
}

void NbdConnection::abandon(std::string_view reason) {
  close(reason);
}

void NbdConnection::drop_unfinished_input() {
  server_.stop_waiting(*this);
  held_ = Held::Nothing;
  Bytes().swap(pending_);
  pending_used_ = 0;
  if (receiving_ != nullptr) end_operation(*std::exchange(receiving_, nullptr));
}

void NbdConnection::finish(std::string_view reason) {
  if (phase_ == Phase::Finishing || phase_ == Phase::Closed) return;
  phase_ = Phase::Finishing;
  close_reason_ = reason;
  drop_unfinished_input();
  stream_->pause_reading(true);
  timer_.start(server_.limits_.drain_time_max, [this] { close("client does not take its replies"); });
  settle();
}

void NbdConnection::close(std::string_view reason) {
  if (phase_ == Phase::Closed) return;
  stream_->close();
  close_without_stream(reason);
}

void NbdConnection::close_without_stream(std::string_view reason) {
  if (phase_ == Phase::Closed) return;
  // Handshakes that come to nothing are for whoever looks closely: a port scanner must not fill the log.
  const log::Level level = export_ != nullptr ? log::Level::Info : log::Level::Debug;
  log::line(level, "nbd connection={} state=closed reason=\"{}\" requests={} errors={} in_flight={}", id_, reason,
            request_count_, error_count_, operation_count_);
  phase_ = Phase::Closed;
  timer_.cancel();
  drop_unfinished_input();
  server_.release(std::exchange(unsent_bytes_, 0));
  retire_if_idle();
}

void NbdConnection::retire_if_idle() {
  if (phase_ != Phase::Closed || operation_count_ > 0 || retired_) return;
  retired_ = true;
  if (export_ != nullptr) server_.unbind(*std::exchange(export_, nullptr));
  server_.retire(*this);
}

}  // namespace vmferry
