// SPDX-License-Identifier: Apache-2.0
//
// What tls_credentials.cpp (whom to let in) and tls_session.cpp (the conversation) share. Only for this folder.
#pragma once

#include <map>
#include <string>

#include "engine/base/bytes.h"
#include "netproto/tls/openssl_handles.h"
#include "netproto/tls/tls_credentials.h"

namespace vmferry {

struct TlsCredentials::Impl {
  TlsContextHandle context;
  bool has_certificate = false;
  std::map<std::string, Bytes, std::less<>> psk_users;
};

// One client's attempt to prove who it is; the callbacks find it as the application data of its SSL object.
struct TlsAttempt {
  const TlsCredentials::Impl* credentials = nullptr;
  std::string psk_user{};  // whose key was handed to the handshake
  std::string problem{};   // why the client is refused, with what to do; better than the library's own words
};

// After a complete handshake: the client's name. Mismatch when it proved nothing.
Result<std::string> name_of_client(SSL* tls, const TlsAttempt& attempt);

// After a failed handshake: the library's oldest error in an operator's words.
std::string handshake_problem(const TlsAttempt& attempt);

}  // namespace vmferry
