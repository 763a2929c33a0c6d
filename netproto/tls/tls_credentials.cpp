// SPDX-License-Identifier: Apache-2.0
#include "netproto/tls/tls_credentials.h"

#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <cstring>

#include "engine/base/hash.h"
#include "engine/base/text.h"
#include "netproto/tls/tls_credentials_impl.h"

namespace vmferry {

namespace {

using CrlHandle = std::unique_ptr<X509_CRL, OpensslFree<X509_CRL_free>>;

constexpr size_t kTextSizeMax = 4U << 20;
constexpr size_t kCertificatesMax = 1000;  // of one file

// The one common name of a subject; empty when there is none, several, or one that is no plain string.
std::string common_name(const X509* certificate) {
  const X509_NAME* const subject = X509_get_subject_name(certificate);
  const int index = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
  if (index < 0 || X509_NAME_get_index_by_NID(subject, NID_commonName, index) >= 0) return {};
  unsigned char* text = nullptr;
  const int size = ASN1_STRING_to_UTF8(&text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, index)));
  if (size < 0) {
    ERR_clear_error();
    return {};
  }
  std::string name(reinterpret_cast<const char*>(text), static_cast<size_t>(size));
  OPENSSL_free(text);
  // "trusted\0.evil" must not pass for "trusted" anywhere.
  return name.find('\0') == std::string::npos ? name : std::string{};
}

// Called for each certificate of a client's chain; keeps the first reason in words.
int verify_client(int ok, X509_STORE_CTX* store) {
  if (ok == 1) return 1;
  const auto* tls = static_cast<const SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
  auto* attempt = static_cast<TlsAttempt*>(SSL_get_app_data(tls));
  const X509* const certificate = X509_STORE_CTX_get_current_cert(store);
  const int error = X509_STORE_CTX_get_error(store);
  if (attempt == nullptr || !attempt->problem.empty()) return 0;
  std::string_view hint;
  switch (error) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
    case X509_V_ERR_CERT_NOT_YET_VALID:
      hint = ": issue a new one, or set the clock";
      break;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
      hint = ": it has to be signed by the server's ca-cert.pem";
      break;
    case X509_V_ERR_INVALID_PURPOSE:
      hint = ": it is not for TLS clients";
      break;
    default:
      break;
  }
  attempt->problem = fmt::format("certificate '{}' of the client is refused: {}{}",
                                 certificate != nullptr ? printable(common_name(certificate)) : "",
                                 X509_verify_cert_error_string(error), hint);
  return 0;
}

// For TLS 1.2 and, with SHA-256 as the key's hash, 1.3. Answering 0 lets a TLS 1.3 client go on with a certificate.
unsigned int find_psk(SSL* tls, const char* identity, unsigned char* key, unsigned int size_max) {
  auto* attempt = static_cast<TlsAttempt*>(SSL_get_app_data(tls));
  if (attempt == nullptr || identity == nullptr) return 0;
  const auto& users = attempt->credentials->psk_users;
  const auto found = users.find(std::string_view(identity));
  if (found == users.end() || found->second.size() > size_max) {
    attempt->problem = fmt::format("the client's user '{}' is not in the file of pre-shared keys", printable(identity));
    return 0;
  }
  attempt->psk_user = found->first;
  std::memcpy(key, found->second.data(), found->second.size());
  return static_cast<unsigned int>(found->second.size());
}

BioHandle memory_of(const std::string& text) {
  return BioHandle(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// The callback answers "no passphrase": the default would ask on the terminal.
int no_passphrase(char*, int, int, void*) {
  return -1;
}

Result<std::vector<CertificateHandle>> read_certificates(const std::string& text, std::string_view file) {
  const BioHandle bio = memory_of(text);
  std::vector<CertificateHandle> certificates;
  while (bio != nullptr && certificates.size() < kCertificatesMax) {
    CertificateHandle one(PEM_read_bio_X509(bio.get(), nullptr, no_passphrase, nullptr));
    if (!one) break;
    certificates.push_back(std::move(one));
  }
  const unsigned long error = ERR_peek_last_error();
  const bool at_end = ERR_GET_LIB(error) == ERR_LIB_PEM && ERR_GET_REASON(error) == PEM_R_NO_START_LINE;
  if (certificates.empty() || !at_end) {
    return fail(ErrorKind::InvalidArgument, "{} holds no readable PEM certificate: {}", file, openssl_error());
  }
  ERR_clear_error();
  return certificates;
}

Status check_dates(const X509* certificate, std::string_view file) {
  if (X509_cmp_current_time(X509_get0_notBefore(certificate)) > 0) {
    return fail(ErrorKind::InvalidArgument, "{} is not valid yet: set the clock, or issue a new one", file);
  }
  if (X509_cmp_current_time(X509_get0_notAfter(certificate)) < 0) {
    return fail(ErrorKind::InvalidArgument, "{} has expired: issue a new one", file);
  }
  return {};
}

Status trust_ca(SSL_CTX* context, const TlsCredentialTexts& texts) {
  auto authorities = read_certificates(texts.ca_certificate, "ca-cert.pem");
  if (!authorities) return tl::unexpected(authorities.error());
  X509_STORE* const store = SSL_CTX_get_cert_store(context);
  for (const CertificateHandle& authority : *authorities) {
    if (auto valid = check_dates(authority.get(), "ca-cert.pem"); !valid) return valid;
    if (X509_STORE_add_cert(store, authority.get()) != 1) {
      return fail(ErrorKind::InvalidArgument, "ca-cert.pem: {}", openssl_error());
    }
  }
  if (texts.revocation_list.empty()) return {};
  const BioHandle bio = memory_of(texts.revocation_list);
  const CrlHandle list(bio ? PEM_read_bio_X509_CRL(bio.get(), nullptr, no_passphrase, nullptr) : nullptr);
  if (!list || X509_STORE_add_crl(store, list.get()) != 1) {
    return fail(ErrorKind::InvalidArgument, "ca-crl.pem holds no readable PEM revocation list: {}", openssl_error());
  }
  X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
  return {};
}

Status use_certificates(SSL_CTX* context, const TlsCredentialTexts& texts) {
  auto chain = read_certificates(texts.server_certificate, "server-cert.pem");
  if (!chain) return tl::unexpected(chain.error());
  if (auto valid = check_dates(chain->front().get(), "server-cert.pem"); !valid) return valid;
  const BioHandle bio = memory_of(texts.server_key);
  const KeyHandle key(bio ? PEM_read_bio_PrivateKey(bio.get(), nullptr, no_passphrase, nullptr) : nullptr);
  if (!key) {
    return fail(ErrorKind::InvalidArgument, "server-key.pem holds no PEM key without a passphrase: {}",
                openssl_error());
  }
  if (X509_check_private_key(chain->front().get(), key.get()) != 1) {
    ERR_clear_error();
    return fail(ErrorKind::InvalidArgument, "server-key.pem is not the key of server-cert.pem");
  }
  if (SSL_CTX_use_certificate(context, chain->front().get()) != 1 || SSL_CTX_use_PrivateKey(context, key.get()) != 1) {
    return fail(ErrorKind::InvalidArgument, "server-cert.pem: {}", openssl_error());
  }
  for (size_t i = 1; i < chain->size(); ++i) {
    if (SSL_CTX_add1_chain_cert(context, (*chain)[i].get()) != 1) {
      return fail(ErrorKind::InvalidArgument, "server-cert.pem: {}", openssl_error());
    }
  }
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, verify_client);
  return trust_ca(context, texts);
}

// "alice:0123..."; a name that is not plain text is written as '#' and its bytes in hexadecimal.
Status read_psk_users(std::string_view text, TlsCredentials::Impl& impl) {
  for (size_t line_number = 1; !text.empty(); ++line_number) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    const auto bad = [&](std::string_view what) {
      return fail(ErrorKind::InvalidArgument, "line {} of the file of pre-shared keys {}", line_number, what);
    };
    const size_t colon = line.rfind(':');
    if (colon == std::string_view::npos || colon == 0) return bad("is not USER:HEXKEY");
    std::string user(line.substr(0, colon));
    if (user.starts_with('#')) {
      const auto bytes = from_hex(std::string_view(user).substr(1));
      if (bytes.empty()) return bad("has a name in '#' form that is not hexadecimal");
      user.assign(bytes.begin(), bytes.end());
    }
    if (user.find('\0') != std::string::npos || user.size() > 128) return bad("has a name that no client can send");
    Bytes key = from_hex(line.substr(colon + 1));
    if (key.empty()) return bad("has a key that is not hexadecimal");
    if (key.size() < TlsCredentials::kPskKeySizeMin || key.size() > TlsCredentials::kPskKeySizeMax) {
      return bad(fmt::format("has a key of {} bytes; it has to have {} to {} (psktool makes 32)", key.size(),
                             TlsCredentials::kPskKeySizeMin, TlsCredentials::kPskKeySizeMax));
    }
    if (!impl.psk_users.emplace(std::move(user), std::move(key)).second) return bad("names a user for the second time");
    if (impl.psk_users.size() > TlsCredentials::kPskUsersMax) return bad("is over the limit of 10000 users");
  }
  if (impl.psk_users.empty()) return fail(ErrorKind::InvalidArgument, "the file of pre-shared keys names no user");
  return {};
}

// TLS 1.2 has to be offered (proto.md, "TLS versions"), but only with ephemeral keys and authenticated encryption.
bool configure(SSL_CTX* context) {
  static constexpr unsigned char kSessionContext[] = "vmferry nbd";
  if (context == nullptr) return false;
  SSL_CTX_set_security_level(context, 2);
  SSL_CTX_set_options(
      context, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_max_cert_list(context, 16 * 1024);
  SSL_CTX_set_read_ahead(context, 0);
  return SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION) == 1 &&
         SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION) == 1 &&
         // A key of SHA-256 goes with the first and the third only.
         SSL_CTX_set_ciphersuites(context,
                                  "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256") == 1 &&
         SSL_CTX_set_cipher_list(
             context, "ECDHE+AESGCM:ECDHE+CHACHA20:kECDHEPSK+CHACHA20:kDHEPSK+AESGCM:kDHEPSK+CHACHA20") == 1 &&
         SSL_CTX_set_dh_auto(context, 1) == 1 && SSL_CTX_set_num_tickets(context, 0) == 1 &&
         SSL_CTX_set_max_early_data(context, 0) == 1 &&
         SSL_CTX_set_session_id_context(context, kSessionContext, sizeof kSessionContext) == 1;
}

}  // namespace

TlsCredentials::TlsCredentials(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TlsCredentials::~TlsCredentials() = default;

bool TlsCredentials::has_certificate() const {
  return impl_->has_certificate;
}

bool TlsCredentials::has_psk() const {
  return !impl_->psk_users.empty();
}

Result<std::shared_ptr<const TlsCredentials>> TlsCredentials::create(const TlsCredentialTexts& texts) {
  for (const std::string* text : {&texts.ca_certificate, &texts.revocation_list, &texts.server_certificate,
                                  &texts.server_key, &texts.psk_users}) {
    if (text->size() > kTextSizeMax) {
      return fail(ErrorKind::LimitExceeded, "a file of {} bytes holds no credentials", text->size());
    }
  }
  auto impl = std::make_unique<Impl>();
  impl->context.reset(SSL_CTX_new(TLS_server_method()));
  SSL_CTX* const context = impl->context.get();
  ERR_clear_error();
  if (!configure(context)) return fail(ErrorKind::Internal, "TLS context: {}", openssl_error());
  impl->has_certificate =
      !texts.ca_certificate.empty() || !texts.server_certificate.empty() || !texts.server_key.empty();
  if (impl->has_certificate) {
    if (auto used = use_certificates(context, texts); !used) return tl::unexpected(used.error());
  }
  if (!texts.psk_users.empty()) {
    if (auto read = read_psk_users(texts.psk_users, *impl); !read) return tl::unexpected(read.error());
    SSL_CTX_set_psk_server_callback(context, find_psk);
  }
  if (!impl->has_certificate && impl->psk_users.empty()) {
    return fail(ErrorKind::InvalidArgument, "neither a certificate nor a pre-shared key is given");
  }
  return std::shared_ptr<const TlsCredentials>(new TlsCredentials(std::move(impl)));
}

Result<std::string> name_of_client(SSL* tls, const TlsAttempt& attempt) {
  if (const X509* const certificate = SSL_get0_peer_certificate(tls); certificate != nullptr) {
    return common_name(certificate);  // verified: the handshake fails otherwise
  }
  // In TLS 1.3 a handshake with a key looks like a resumption; none other is possible here.
  const SSL_CIPHER* const cipher = SSL_get_current_cipher(tls);
  const int authentication = cipher != nullptr ? SSL_CIPHER_get_auth_nid(cipher) : NID_undef;
  const bool by_key =
      SSL_version(tls) == TLS1_3_VERSION ? SSL_session_reused(tls) == 1 : authentication == NID_auth_psk;
  if (by_key && !attempt.psk_user.empty()) return attempt.psk_user;
  return fail(ErrorKind::Denied, "TLS handshake: the client proved neither a certificate nor a key");
}

std::string handshake_problem(const TlsAttempt& attempt) {
  const unsigned long code = ERR_peek_error();
  const int reason = ERR_GET_LIB(code) == ERR_LIB_SSL ? ERR_GET_REASON(code) : 0;
  const std::string text = openssl_error();
  if (!attempt.problem.empty()) return attempt.problem;
  switch (reason) {
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
      return "the client presented no certificate: it needs one that the server's ca-cert.pem has signed";
    case SSL_R_BINDER_DOES_NOT_VERIFY:
      return fmt::format("the key of the client's user '{}' is not the one in the file of pre-shared keys",
                         printable(attempt.psk_user));
    case SSL_R_NO_SHARED_CIPHER:
    case SSL_R_NO_SUITABLE_SIGNATURE_ALGORITHM:
      if (!attempt.credentials->has_certificate) {
        return fmt::format("{}: the server has pre-shared keys only, so the client needs a user and its key", text);
      }
      return text;
    case SSL_R_HTTP_REQUEST:
    case SSL_R_WRONG_VERSION_NUMBER:
    case SSL_R_BAD_PACKET_LENGTH:
      return fmt::format("{}: what the client sent is not TLS", text);
    default:
      if (reason >= SSL_AD_REASON_OFFSET) return fmt::format("{}: the client refused the server", text);
      return text;
  }
}

}  // namespace vmferry
