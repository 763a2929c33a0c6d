// SPDX-License-Identifier: Apache-2.0
#include "netproto/tls/token_key.h"

#include <sys/random.h>

#include "engine/base/assert.h"
#include "netproto/tls/openssl_handles.h"

namespace vmferry {

namespace {

Result<KeyHandle> token_key(const TokenSecret& secret) {
  KeyHandle key(EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, nullptr, secret.data(), secret.size()));
  if (!key) return fail(ErrorKind::Internal, "token key: {}", openssl_error());
  return key;
}

}  // namespace

TokenSecret random_token_secret() {
  TokenSecret secret{};
  VF_ASSERT(getrandom(secret.data(), secret.size(), 0) == static_cast<ssize_t>(secret.size()));
  return secret;
}

Result<TokenVerifier> token_verifier(const TokenSecret& secret) {
  auto key = token_key(secret);
  if (!key) return tl::unexpected(key.error());
  TokenVerifier verifier{};
  size_t size = verifier.size();
  if (EVP_PKEY_get_raw_public_key(key->get(), verifier.data(), &size) != 1 || size != verifier.size()) {
    return fail(ErrorKind::Internal, "token key: {}", openssl_error());
  }
  return verifier;
}

Result<TokenProof> sign_with_token(const TokenSecret& secret, ByteSpan statement) {
  auto key = token_key(secret);
  if (!key) return tl::unexpected(key.error());
  const DigestContextHandle context(EVP_MD_CTX_new());
  TokenProof proof{};
  size_t size = proof.size();
  if (!context || EVP_DigestSignInit(context.get(), nullptr, nullptr, nullptr, key->get()) != 1 ||
      EVP_DigestSign(context.get(), proof.data(), &size, statement.data(), statement.size()) != 1 ||
      size != proof.size()) {
    return fail(ErrorKind::Internal, "token proof: {}", openssl_error());
  }
  return proof;
}

bool verify_token_proof(const TokenVerifier& verifier, ByteSpan statement, const TokenProof& proof) {
  const KeyHandle key(EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, nullptr, verifier.data(), verifier.size()));
  const DigestContextHandle context(EVP_MD_CTX_new());
  const bool valid =
      key && context && EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key.get()) == 1 &&
      EVP_DigestVerify(context.get(), proof.data(), proof.size(), statement.data(), statement.size()) == 1;
  ERR_clear_error();
  return valid;
}

}  // namespace vmferry
