// SPDX-License-Identifier: Apache-2.0
//
// What a server shows to its TLS clients and demands from them: a certificate of its own with the CA that has to have
// signed theirs, pre-shared keys, or both.
//
// Flow: engine/daemon/nbd_tls reads the files; NbdServer hands this to TlsSession::create() for each client.
// Every client is authenticated: by a certificate (its common name is the client's name) or by a key (its user is).
// Threads: immutable after creation; may be shared.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "engine/base/result.h"

namespace vmferry {

// Contents of the files, empty when there is none. The names in errors are the usual ones (ca-cert.pem ...).
struct TlsCredentialTexts {
  std::string ca_certificate{};      // PEM, one or several
  std::string revocation_list{};     // PEM; optional
  std::string server_certificate{};  // PEM, with its chain behind it
  std::string server_key{};          // PEM, without a passphrase
  std::string psk_users{};           // lines of USER:HEXKEY, as psktool writes them
};

class TlsCredentials {
 public:
  static constexpr size_t kPskUsersMax = 10000;
  static constexpr size_t kPskKeySizeMin = 16;  // bytes; psktool makes 32
  static constexpr size_t kPskKeySizeMax = 64;

  // Certificates (the first, third and fourth text) or keys have to be there. Checked here: that key and certificate
  // belong together, that the certificate is valid now, that every line makes sense.
  static Result<std::shared_ptr<const TlsCredentials>> create(const TlsCredentialTexts& texts);
  ~TlsCredentials();
  TlsCredentials(const TlsCredentials&) = delete;
  TlsCredentials& operator=(const TlsCredentials&) = delete;

  bool has_certificate() const;
  bool has_psk() const;

  struct Impl;  // OpenSSL objects, only for the sources of this folder
  const Impl& impl() const { return *impl_; }

 private:
  explicit TlsCredentials(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace vmferry
