// SPDX-License-Identifier: Apache-2.0
//
// Owning handles and error texts for the OpenSSL objects used in netproto/tls. Only for the sources of this folder.
#pragma once

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <memory>
#include <string>

#include "netproto/tls/tls_identity.h"

namespace vmferry {

template <auto kFree>
struct OpensslFree {
  template <typename T>
  void operator()(T* object) const noexcept {
    kFree(object);
  }
};

using BioHandle = std::unique_ptr<BIO, OpensslFree<BIO_free_all>>;
using KeyHandle = std::unique_ptr<EVP_PKEY, OpensslFree<EVP_PKEY_free>>;
using KeyContextHandle = std::unique_ptr<EVP_PKEY_CTX, OpensslFree<EVP_PKEY_CTX_free>>;
using DigestContextHandle = std::unique_ptr<EVP_MD_CTX, OpensslFree<EVP_MD_CTX_free>>;
using CertificateHandle = std::unique_ptr<X509, OpensslFree<X509_free>>;
using TlsContextHandle = std::unique_ptr<SSL_CTX, OpensslFree<SSL_CTX_free>>;
using TlsHandle = std::unique_ptr<SSL, OpensslFree<SSL_free>>;

struct TlsIdentityKeys {
  KeyHandle key;
  CertificateHandle certificate;
};

// Takes the oldest error from this thread's OpenSSL queue, which holds the cause, and empties the queue.
inline std::string openssl_error() {
  const unsigned long code = ERR_get_error();
  ERR_clear_error();
  if (code == 0) return "no reason given";
  const char* reason = ERR_reason_error_string(code);
  return reason != nullptr ? reason : "error " + std::to_string(code);
}

// Empty on failure of the library, which the caller treats as an unusable key.
Result<KeyHash> hash_of_public_key(EVP_PKEY* key);

}  // namespace vmferry
