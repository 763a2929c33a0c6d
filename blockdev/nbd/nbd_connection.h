// SPDX-License-Identifier: Apache-2.0
//
// One NBD client: feeds the codec with what the stream delivers, turns requests into BlockRequests, sends replies.
//
// Flow: Handshake (options) -> Transmission (requests) -> Finishing (DISC, drain: no new requests, the outstanding ones
// are answered) -> Closed (the stream is gone; waits for the device) -> retired by the server.
// After STARTTLS everything goes through a TlsSession; the phases see plaintext.
// Back-pressure: a request that does not fit the limits is held, the bytes behind it are kept (at most what one read
// delivered), and reading stops until memory is free.
// Threads: the server's executor.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "blockdev/nbd/nbd_server.h"
#include "netproto/nbd/handshake.h"
#include "netproto/nbd/transmission.h"
#include "netproto/tls/tls_session.h"

namespace vmferry {

class NbdConnection final : private StreamHandler {
 public:
  enum class Phase : uint8_t { Handshake, Transmission, Finishing, Closed };

  NbdConnection(NbdServer& server, std::unique_ptr<ByteStream> stream, uint64_t id);
  ~NbdConnection();
  NbdConnection(const NbdConnection&) = delete;
  NbdConnection& operator=(const NbdConnection&) = delete;

  void start();
  // Answers new options and requests with ESHUTDOWN for the grace time, then finishes.
  void begin_drain();
  // Drops the stream at once; operations under way end silently.
  void abandon(std::string_view reason);

  Phase phase() const { return phase_; }
  const NbdServer::Export* target() const { return export_; }
  Nanoseconds accepted_at() const { return accepted_at_; }

  // From the server's memory limit.
  uint64_t bytes_wanted() const { return bytes_wanted_; }
  void grant(uint64_t bytes);
  // True when it holds memory, waits for its client and has moved nothing since the last call.
  bool stalled_since_last_call();

  // From operations.
  void operation_done(NbdOperation& operation, Errno error) noexcept;

 private:
  enum class Held : uint8_t { Nothing, OverOwnLimit, AwaitsGrant };

  void stream_readable(ByteSpan bytes) override;
  void stream_writable() override;
  void stream_closed(Errno error) override;

  // nbd_connection.cpp: phases, limits, back-pressure.
  void consume(ByteSpan bytes);
  size_t consume_handshake(ByteSpan bytes);
  void consume_requests(ByteSpan& bytes);
  void enter_transmission();
  void resume();
  void hold(Held why, uint64_t bytes);
  void drop_unfinished_input();
  void finish(std::string_view reason);
  void close(std::string_view reason);
  void close_without_stream(std::string_view reason);
  void retire_if_idle();
  void settle();  // accounts for what the stream still holds, and goes on when there is room again
  void send(ByteSpan bytes);
  uint64_t client_progress() const;  // bytes taken from the client and by the client
  bool fits_own_limit(uint64_t bytes) const;
  bool requests_are_stale() const;  // NbdLimits::drop_requests_of_gone_clients

  // nbd_connection_tls.cpp: between the stream and the phases, once STARTTLS was acknowledged.
  void start_tls();
  void decrypt(ByteSpan bytes);
  void flush_tls();
  void log_refusal(std::string_view why);  // one line in ten seconds: anybody may cause it
  void end_tls();                          // says the end to the client, once

  // nbd_requests.cpp: what happens to one request.
  void on_header();
  void admit_request();
  void start_request(uint64_t charge);
  void on_payload_done();
  void on_limited_status();
  void submit(NbdOperation& operation);
  void submit_cache_step(NbdOperation& operation);
  // nbd_status.cpp: BLOCK_STATUS, one chunk per context.
  uint32_t contexts_of(const nbd::Request& request) const;
  void ask_status(NbdOperation& operation);
  void status_done(NbdOperation& operation, const Result<std::vector<Extent>>& extents);
  Status append_status(const NbdOperation& operation, const std::vector<Extent>& extents);
  std::vector<nbd::StatusDescriptor> allocation_of(const nbd::Request& request,
                                                   const std::vector<Extent>& extents) const;
  size_t extents_max(const nbd::Request& request) const;

  // nbd_requests.cpp again.
  void send_error(const nbd::Request& request, nbd::WireError error);
  void send_success(const NbdOperation& operation);
  void end_operation(NbdOperation& operation);
  nbd::WireError verdict(const nbd::Request& request) const;
  bool may_be_served() const;
  uint64_t cost(const nbd::Request& request) const;

  NbdServer& server_;
  const std::unique_ptr<ByteStream> stream_;
  const uint64_t id_;
  const Nanoseconds accepted_at_;
  Phase phase_ = Phase::Handshake;
  std::string_view close_reason_;
  bool retired_ = false;

  std::unique_ptr<TlsSession> tls_;
  Bytes plaintext_;  // reused between reads
  bool tls_ended_ = false;

  std::optional<nbd::Handshake> handshake_;
  nbd::RequestParser parser_;
  nbd::RequestRules rules_;
  std::vector<std::string> extra_contexts_;  // agreed ones beside base:allocation; their ids are 2, 3, ...
  NbdServer::Export* export_ = nullptr;
  uint64_t client_ = 0;  // of the device's ClientEras
  bool draining_ = false;

  NbdOperation* receiving_ = nullptr;                 // the write whose payload is coming
  nbd::WireError skip_error_ = nbd::WireError::None;  // answer to the write whose payload is skipped

  std::array<uint8_t, nbd::kLimitedStatusSizeMax> status_payload_{};

  Held held_ = Held::Nothing;
  uint64_t bytes_wanted_ = 0;  // of the held request
  Bytes pending_;              // received behind the held request
  size_t pending_used_ = 0;

  size_t operation_count_ = 0;
  uint64_t operation_bytes_ = 0;  // charged for operations
  uint64_t unsent_bytes_ = 0;     // charged for replies that the stream holds

  uint64_t received_bytes_ = 0;
  uint64_t sent_bytes_ = 0;  // given to the stream
  uint64_t progress_seen_ = 0;
  uint64_t request_count_ = 0;
  uint64_t error_count_ = 0;
  Bytes out_;    // reused for small replies
  Timer timer_;  // of the handshake, then of the drain
};

}  // namespace vmferry
