// SPDX-License-Identifier: Apache-2.0
//
// The daemon's own key: an Ed25519 pair and a self-signed certificate around it, because TLS wants one.
//
// Peers pin the SHA-256 of the public key (SubjectPublicKeyInfo, DER); names and dates in the certificate mean nothing.
// Flow: engine/replicate/peer_identity stores it as PEM; TlsSession presents it.
// Threads: immutable after creation; may be shared.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "engine/base/hash.h"
#include "engine/base/result.h"

namespace vmferry {

// SHA-256 over the DER form of a SubjectPublicKeyInfo: what is pinned.
using KeyHash = Sha256Digest;

struct TlsIdentityKeys;  // OpenSSL objects, only for the sources of this folder

class TlsIdentity {
 public:
  static Result<TlsIdentity> generate();
  // PEM of the private key (PKCS#8); the certificate is made anew, since nobody looks at more than its key.
  static Result<TlsIdentity> from_pem(std::string_view pem);

  std::string to_pem() const;  // the private key: only for a file with mode 0600
  const KeyHash& key_hash() const { return key_hash_; }
  const TlsIdentityKeys& keys() const { return *keys_; }

 private:
  TlsIdentity(std::shared_ptr<const TlsIdentityKeys> keys, const KeyHash& key_hash)
      : keys_(std::move(keys)), key_hash_(key_hash) {}

  std::shared_ptr<const TlsIdentityKeys> keys_;
  KeyHash key_hash_;
};

}  // namespace vmferry
