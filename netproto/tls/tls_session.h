// SPDX-License-Identifier: Apache-2.0
//
// One TLS session without a socket: ciphertext in, plaintext out, and the other way round.
//
// Flow: PeerConnection and NbdConnection feed what a stream delivers and write what take_output() returns.
// Between daemons (TlsIdentity, TLS 1.3) both sides present a certificate. Any certificate passes the handshake, which
// proves that the other side holds its private key; whether that key is a peer's is the caller's question, answered
// with peer_key_hash() before anything else is read or written. So a refused side can be told why, in words, instead
// of by an alert. With TlsCredentials, for clients of other makes, the handshake itself lets in or refuses.
// Resumption, early data, compression and renegotiation are off.
// Threads: not shared.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "engine/base/bytes.h"
#include "engine/base/result.h"
#include "netproto/tls/tls_credentials.h"
#include "netproto/tls/tls_identity.h"

namespace vmferry {

class TlsSession {
 public:
  enum class Side : uint8_t { Client, Server };
  using Exporter = std::array<uint8_t, 32>;

  // Bytes of one feed() that are allowed before the handshake is complete, in total: certificates of both kinds of
  // key that we accept are below 2 KiB, so this is generous and bounds what a stranger can make us hold.
  static constexpr size_t kHandshakeBytesMax = 64 * 1024;

  static Result<std::unique_ptr<TlsSession>> create(const TlsIdentity& identity, Side side);
  // The server's side; only clients that these credentials admit get through the handshake.
  static Result<std::unique_ptr<TlsSession>> create(std::shared_ptr<const TlsCredentials> credentials);
  ~TlsSession();
  TlsSession(const TlsSession&) = delete;
  TlsSession& operator=(const TlsSession&) = delete;

  // Takes all of `ciphertext` and appends what it decrypts to `plaintext`. May produce output (handshake, key update).
  // After an error the session is dead; its output may still hold the alert that says so.
  Status feed(ByteSpan ciphertext, Bytes& plaintext);

  // Encrypts, in records of at most 16 KiB; only when established().
  Status write(ByteSpan plaintext);

  // Says the end to the other side, so that a cut can be told from a close.
  void write_close();

  // Ciphertext to be sent, empty when there is none.
  Bytes take_output();

  bool established() const;              // handshake complete on this side
  bool closed_by_peer() const;           // the other side said the end; nothing follows
  const KeyHash& peer_key_hash() const;  // with TlsIdentity, only when established()
  // With TlsCredentials, only when established(): the common name of the client's certificate, "" when it has not
  // exactly one, or the user of its pre-shared key. Hostile text: compare it, do not print it.
  const std::string& client_name() const;
  // Keying material of this session (RFC 8446, 7.5): equal on both sides, different in every session, so a proof over
  // it cannot be replayed elsewhere. Only when established().
  Result<Exporter> export_secret(std::string_view label) const;
  // With TlsCredentials, for a client that went away in the middle of the handshake: what stood against it.
  std::string unfinished_because() const;
  std::string_view cipher() const;   // "TLS_AES_128_GCM_SHA256"; empty before the handshake
  std::string_view version() const;  // "TLSv1.3"

 private:
  struct Impl;
  explicit TlsSession(std::unique_ptr<Impl> impl);
  static Result<std::unique_ptr<TlsSession>> start(std::unique_ptr<Impl> impl, Side side);
  Status advance_handshake();
  Status check_peer_key();
  std::unique_ptr<Impl> impl_;
};

}  // namespace vmferry
