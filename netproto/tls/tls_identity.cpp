// SPDX-License-Identifier: Apache-2.0
#include "netproto/tls/tls_identity.h"

#include <openssl/pem.h>

#include "engine/base/assert.h"
#include "netproto/tls/openssl_handles.h"

namespace vmferry {

namespace {

// A certificate that never matters: TLS needs one as the carrier of the key.
Result<CertificateHandle> make_certificate(EVP_PKEY* key) {
  CertificateHandle certificate(X509_new());
  if (!certificate) return fail(ErrorKind::Internal, "certificate: {}", openssl_error());
  X509* const x = certificate.get();
  constexpr long kValidSeconds = 100L * 365 * 24 * 3600;  // dates are not checked; a clock that is off must not matter
  X509_NAME* const name = X509_get_subject_name(x);
  const bool made = X509_set_version(x, X509_VERSION_3) == 1 && ASN1_INTEGER_set(X509_get_serialNumber(x), 1) == 1 &&
                    X509_gmtime_adj(X509_getm_notBefore(x), 0) != nullptr &&
                    X509_gmtime_adj(X509_getm_notAfter(x), kValidSeconds) != nullptr &&
                    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
                                               reinterpret_cast<const unsigned char*>("vmferry"), -1, -1, 0) == 1 &&
                    X509_set_issuer_name(x, name) == 1 && X509_set_pubkey(x, key) == 1 &&
                    X509_sign(x, key, nullptr) > 0;  // Ed25519 brings its own digest
  if (!made) return fail(ErrorKind::Internal, "certificate: {}", openssl_error());
  return certificate;
}

Result<std::shared_ptr<const TlsIdentityKeys>> make_keys(KeyHandle key) {
  auto certificate = make_certificate(key.get());
  if (!certificate) return tl::unexpected(certificate.error());
  auto keys = std::make_shared<TlsIdentityKeys>();
  keys->key = std::move(key);
  keys->certificate = std::move(*certificate);
  return std::shared_ptr<const TlsIdentityKeys>(std::move(keys));
}

}  // namespace

Result<KeyHash> hash_of_public_key(EVP_PKEY* key) {
  unsigned char* der = nullptr;
  const int size = i2d_PUBKEY(key, &der);
  if (size <= 0) return fail(ErrorKind::Corrupt, "public key: {}", openssl_error());
  const KeyHash hash = sha256(ByteSpan(der, static_cast<size_t>(size)));
  OPENSSL_free(der);
  return hash;
}

Result<TlsIdentity> TlsIdentity::generate() {
  KeyHandle key(EVP_PKEY_Q_keygen(nullptr, nullptr, "ED25519"));
  if (!key) return fail(ErrorKind::Internal, "generate identity key: {}", openssl_error());
  auto hash = hash_of_public_key(key.get());
  if (!hash) return tl::unexpected(hash.error());
  auto keys = make_keys(std::move(key));
  if (!keys) return tl::unexpected(keys.error());
  return TlsIdentity(std::move(*keys), *hash);
}

Result<TlsIdentity> TlsIdentity::from_pem(std::string_view pem) {
  constexpr size_t kPemSizeMax = 16384;
  if (pem.size() > kPemSizeMax) return fail(ErrorKind::Corrupt, "identity key: {} bytes are no key", pem.size());
  const BioHandle bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  // The callback answers "no passphrase": the default would ask on the terminal.
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };
  KeyHandle key(bio ? PEM_read_bio_PrivateKey(bio.get(), nullptr, no_passphrase, nullptr) : nullptr);
  if (!key) return fail(ErrorKind::Corrupt, "identity key: {}", openssl_error());
  if (EVP_PKEY_get_base_id(key.get()) != EVP_PKEY_ED25519) {
    return fail(ErrorKind::Corrupt, "identity key: not an Ed25519 key");
  }
  auto hash = hash_of_public_key(key.get());
  if (!hash) return tl::unexpected(hash.error());
  auto keys = make_keys(std::move(key));
  if (!keys) return tl::unexpected(keys.error());
  return TlsIdentity(std::move(*keys), *hash);
}

std::string TlsIdentity::to_pem() const {
  const BioHandle bio(BIO_new(BIO_s_mem()));
  VF_ASSERT(bio != nullptr);
  VF_ASSERT(PEM_write_bio_PKCS8PrivateKey(bio.get(), keys_->key.get(), nullptr, nullptr, 0, nullptr, nullptr) == 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  VF_ASSERT(size > 0);
  return std::string(data, static_cast<size_t>(size));
}

}  // namespace vmferry
