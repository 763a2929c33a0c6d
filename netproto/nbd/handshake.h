// SPDX-License-Identifier: Apache-2.0
//
// The server's side of the NBD handshake (fixed newstyle): bytes in, bytes out, and at the end a Session.
//
// Flow: blockdev/nbd/NbdConnection feeds what the socket delivers and sends what is appended to `out`; when state()
// becomes Transmission, the bytes that were not consumed belong to transmission.h.
// Source of truth: proto.md "Handshake phase" and "Option types"; docs/nbd.md. Every byte fed here is hostile (I11).
// Threads: none of its own; one owner.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "netproto/nbd/wire.h"

namespace vmferry::nbd {

inline constexpr uint32_t kBaseAllocationId = 1;  // the others are numbered from 2, in the order of the export's list
inline constexpr std::string_view kBaseAllocation = "base:allocation";
inline constexpr size_t kExtraContextsMax = 15;

// What the handshake has to know about one export.
struct ExportInfo {
  std::string name{};
  std::string description{};
  uint64_t size = 0;  // bytes
  bool read_only = false;
  uint32_t block_size_min = 1;  // enforced only when the client asked for block sizes
  uint32_t block_size_preferred = 4096;
  uint32_t payload_size_max = kPayloadSizeMax;
  std::vector<std::string> contexts{};  // meta contexts beside base:allocation, at most kExtraContextsMax
  // Not empty: only for clients that have proved one of these names through TLS.
  std::vector<std::string> tls_allow{};
};

// proto.md "TLS support": NOTLS, SELECTIVETLS, FORCEDTLS.
enum class TlsPolicy : uint8_t { Off, Allow, Require };

// Where the handshake looks exports up. The empty name stands for the default export.
class ExportCatalog {
 public:
  virtual std::optional<ExportInfo> find_export(std::string_view name) const = 0;
  virtual std::vector<ExportInfo> list_exports() const = 0;

 protected:
  ~ExportCatalog() = default;
};

struct HandshakeLimits {
  size_t option_size_max = 16U << 10;  // longer option data is skipped and answered with ERR_TOO_BIG
  uint32_t option_count_max = 1000;    // a client that haggles longer is dropped
};

// What was agreed. Valid once state() is Transmission.
struct Session {
  ExportInfo export_info;
  bool structured_replies = false;  // also with extended headers
  bool extended_headers = false;
  bool block_sizes_agreed = false;            // the client asked GO for NBD_INFO_BLOCK_SIZE
  bool base_allocation = false;               // the context is set for this export
  std::vector<std::string> extra_contexts{};  // likewise; their ids are 2, 3, ...
};

uint16_t transmission_flags(const ExportInfo& info, HeaderStyle style) noexcept;

class Handshake {
 public:
  enum class State : uint8_t {
    ClientFlags,   // greeting sent
    OptionHeader,  // haggling
    OptionData,
    SkipData,      // option data over the limit
    StartTls,      // STARTTLS was acknowledged: everything from here on is TLS; see tls_started()
    Transmission,  // agreed
    Finished,      // the client said ABORT: send what is queued, then close
    Rejected,      // a violation after which the stream makes no sense: close; reason() says what
  };

  Handshake(const ExportCatalog& catalog, HandshakeLimits limits, TlsPolicy tls = TlsPolicy::Off);

  // Appends the server's greeting; call once, first.
  void greet(Bytes& out) const;
  // Consumes bytes and appends answers. Returns how many were consumed: all, unless the state became final or StartTls.
  // What is left at StartTls came before the client could know our answer. It must not be taken for what the client
  // says through TLS, nor be skipped: whoever put it there tries to inject options. Close, without sending `out`.
  size_t feed(ByteSpan bytes, Bytes& out);
  // In state StartTls, after the TLS handshake. What the client said before does not count any more, because anybody
  // may have said it; the options go on with what TLS delivers.
  void tls_started(std::string client_name);
  // From now on every option but ABORT is answered with ERR_SHUTDOWN.
  void shut_down() { shutting_down_ = true; }

  State state() const { return state_; }
  const Session& session() const { return session_; }
  std::string_view reason() const { return reason_; }
  // For the log: which client was denied which export since the last call; empty when none was.
  std::string take_denial() { return std::exchange(denial_, {}); }

 private:
  void on_client_flags(Bytes& out);
  void on_option_header(Bytes& out);
  void on_option(ByteSpan data, Bytes& out);

  void on_export_name(ByteSpan data, Bytes& out);
  void on_list(ByteSpan data, Bytes& out);
  void on_info_or_go(ByteSpan data, Bytes& out);
  void on_structured_reply(ByteSpan data, Bytes& out);
  void on_extended_headers(ByteSpan data, Bytes& out);
  void on_meta_context(ByteSpan data, Bytes& out);
  void on_start_tls(ByteSpan data, Bytes& out);

  enum class Access : uint8_t { Granted, TlsRequired, Denied };
  Access access_to(const ExportInfo& info) const;
  // The export, when this client may use it; otherwise the error is sent.
  std::optional<ExportInfo> open_export(std::string_view name, Bytes& out);
  bool needs_tls_first() const;
  void enter_transmission(const ExportInfo& info, bool block_sizes_agreed);
  void reject(std::string_view reason);
  void reply(OptionReply type, ByteSpan data, Bytes& out) const;
  void reply_error(OptionReply type, std::string_view text, Bytes& out) const;
  bool is_final() const;

  const ExportCatalog& catalog_;
  const HandshakeLimits limits_;
  const TlsPolicy tls_policy_;
  bool tls_active_ = false;
  std::string client_name_;  // proved through TLS
  State state_ = State::ClientFlags;
  Bytes pending_;           // an incomplete element, at most option_size_max bytes
  size_t wanted_ = 4;       // size of the element being collected
  uint64_t skip_left_ = 0;  // bytes of SkipData
  uint32_t option_ = 0;
  uint32_t option_count_ = 0;
  bool fixed_newstyle_ = false;
  bool no_zeroes_ = false;
  bool shutting_down_ = false;
  HeaderStyle style_ = HeaderStyle::Simple;
  std::optional<std::string> contexts_for_;  // export for which contexts are set
  bool base_allocation_ = false;             // of these
  std::vector<std::string> extra_contexts_;  // of these
  Session session_;
  std::string_view reason_;
  std::string denial_;
};

}  // namespace vmferry::nbd
