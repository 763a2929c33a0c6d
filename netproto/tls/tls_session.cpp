// SPDX-License-Identifier: Apache-2.0
#include "netproto/tls/tls_session.h"

#include "engine/base/assert.h"
#include "netproto/tls/openssl_handles.h"
#include "netproto/tls/tls_credentials_impl.h"

namespace vmferry {

namespace {

// What the BIO below reads from and writes to: the caller's span, and our output.
struct Wire {
  ByteSpan input;
  Bytes output;
};

// A BIO over Wire: the records are encrypted straight into the vector that goes to the stream, and decrypted straight
// from the receive buffer. BIO_s_mem would copy both once more.
int wire_write(BIO* bio, const char* data, size_t size, size_t* written) {
  auto* wire = static_cast<Wire*>(BIO_get_data(bio));
  const auto* bytes = reinterpret_cast<const uint8_t*>(data);
  wire->output.insert(wire->output.end(), bytes, bytes + size);
  *written = size;
  return 1;
}

int wire_read(BIO* bio, char* data, size_t size, size_t* read) {
  auto* wire = static_cast<Wire*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  if (wire->input.empty()) {
    BIO_set_retry_read(bio);
    return 0;
  }
  *read = std::min(size, wire->input.size());
  std::memcpy(data, wire->input.data(), *read);
  wire->input = wire->input.subspan(*read);
  return 1;
}

long wire_control(BIO*, int command, long, void*) {
  return command == BIO_CTRL_FLUSH ? 1 : 0;
}

BIO_METHOD* wire_method() {
  static BIO_METHOD* const method = [] {
    BIO_METHOD* made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "vmferry wire");
    VF_ASSERT(made != nullptr);
    BIO_meth_set_write_ex(made, wire_write);
    BIO_meth_set_read_ex(made, wire_read);
    BIO_meth_set_ctrl(made, wire_control);
    return made;
  }();
  return method;
}

int accept_any_certificate(X509_STORE_CTX*, void*) {
  return 1;  // pinned by key, by the caller; the handshake still verifies the signature made with that key
}

Result<TlsContextHandle> make_context(const TlsIdentity& identity) {
  TlsContextHandle context(SSL_CTX_new(TLS_method()));
  SSL_CTX* const c = context.get();
  const bool made =
      context && SSL_CTX_set_min_proto_version(c, TLS1_3_VERSION) == 1 &&
      SSL_CTX_set_max_proto_version(c, TLS1_3_VERSION) == 1 &&
      SSL_CTX_set_ciphersuites(c, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256") == 1 &&
      SSL_CTX_set1_groups_list(c, "X25519:P-256") == 1 && SSL_CTX_set1_sigalgs_list(c, "ed25519:ECDSA+SHA256") == 1 &&
      SSL_CTX_set_num_tickets(c, 0) == 1 && SSL_CTX_set_max_early_data(c, 0) == 1 &&
      SSL_CTX_use_certificate(c, identity.keys().certificate.get()) == 1 &&
      SSL_CTX_use_PrivateKey(c, identity.keys().key.get()) == 1;
  if (!made) return fail(ErrorKind::Internal, "TLS context: {}", openssl_error());
  SSL_CTX_set_options(c, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
  SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_max_cert_list(c, 16 * 1024);
  SSL_CTX_set_read_ahead(c, 0);
  SSL_CTX_set_verify(c, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  SSL_CTX_set_cert_verify_callback(c, accept_any_certificate, nullptr);
  return context;
}

}  // namespace

struct TlsSession::Impl {
  TlsContextHandle context;                           // of a pinned session
  std::shared_ptr<const TlsCredentials> credentials;  // of the others, with their context
  TlsAttempt attempt;
  std::string client_name;
  Wire wire;
  TlsHandle tls;
  size_t handshake_bytes = 0;
  bool established = false;
  bool closed_by_peer = false;
  bool failed = false;
  KeyHash peer_key_hash{};
};

TlsSession::TlsSession(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TlsSession::~TlsSession() = default;

Result<std::unique_ptr<TlsSession>> TlsSession::create(const TlsIdentity& identity, Side side) {
  auto impl = std::make_unique<Impl>();
  auto context = make_context(identity);
  if (!context) return tl::unexpected(context.error());
  impl->context = std::move(*context);
  return start(std::move(impl), side);
}

Result<std::unique_ptr<TlsSession>> TlsSession::create(std::shared_ptr<const TlsCredentials> credentials) {
  auto impl = std::make_unique<Impl>();
  impl->credentials = std::move(credentials);
  impl->attempt.credentials = &impl->credentials->impl();
  return start(std::move(impl), Side::Server);
}

Result<std::unique_ptr<TlsSession>> TlsSession::start(std::unique_ptr<Impl> impl, Side side) {
  impl->tls.reset(SSL_new(impl->credentials ? impl->credentials->impl().context.get() : impl->context.get()));
  BIO* const bio = BIO_new(wire_method());
  if (!impl->tls || bio == nullptr) {
    BIO_free(bio);
    return fail(ErrorKind::Internal, "TLS session: {}", openssl_error());
  }
  BIO_set_data(bio, &impl->wire);
  BIO_set_init(bio, 1);
  SSL_set_bio(impl->tls.get(), bio, bio);  // owns it; one reference serves both directions
  SSL_set_app_data(impl->tls.get(), &impl->attempt);
  if (side == Side::Client) {
    SSL_set_connect_state(impl->tls.get());
  } else {
    SSL_set_accept_state(impl->tls.get());
  }
  std::unique_ptr<TlsSession> session(new TlsSession(std::move(impl)));
  if (side == Side::Client) {
    if (auto started = session->advance_handshake(); !started) return tl::unexpected(started.error());
  }
  return session;
}

Status TlsSession::advance_handshake() {
  Impl& impl = *impl_;
  ERR_clear_error();
  const int result = SSL_do_handshake(impl.tls.get());
  if (result != 1) {
    if (SSL_get_error(impl.tls.get(), result) == SSL_ERROR_WANT_READ) return {};
    impl.failed = true;
    return fail(ErrorKind::Mismatch, "TLS handshake: {}",
                impl.credentials ? handshake_problem(impl.attempt) : openssl_error());
  }
  if (!impl.credentials) return check_peer_key();
  auto name = name_of_client(impl.tls.get(), impl.attempt);
  if (!name) {
    impl.failed = true;
    return tl::unexpected(name.error());
  }
  impl.client_name = std::move(*name);
  impl.established = true;
  return {};
}

Status TlsSession::check_peer_key() {
  Impl& impl = *impl_;
  const X509* const certificate = SSL_get0_peer_certificate(impl.tls.get());
  EVP_PKEY* const key = certificate != nullptr ? X509_get0_pubkey(certificate) : nullptr;
  if (key == nullptr) {
    impl.failed = true;
    return fail(ErrorKind::Mismatch, "TLS handshake: the other side presented no usable key");
  }
  auto hash = hash_of_public_key(key);
  if (!hash) {
    impl.failed = true;
    return tl::unexpected(hash.error());
  }
  impl.peer_key_hash = *hash;
  impl.established = true;
  return {};
}

Status TlsSession::feed(ByteSpan ciphertext, Bytes& plaintext) {
  Impl& impl = *impl_;
  if (impl.failed) return fail(ErrorKind::Unavailable, "TLS session has failed before");
  impl.wire.input = ciphertext;
  if (!impl.established) {
    impl.handshake_bytes += ciphertext.size();
    if (impl.handshake_bytes > kHandshakeBytesMax) {
      impl.failed = true;
      return fail(ErrorKind::LimitExceeded, "TLS handshake is longer than {} bytes", kHandshakeBytesMax);
    }
    if (auto advanced = advance_handshake(); !advanced) return advanced;
    if (!impl.established) return {};
  }
  constexpr size_t kRecordSizeMax = 16384;
  while (!impl.closed_by_peer) {
    const size_t before = plaintext.size();
    plaintext.resize(before + kRecordSizeMax);
    size_t read = 0;
    ERR_clear_error();
    const int result = SSL_read_ex(impl.tls.get(), plaintext.data() + before, kRecordSizeMax, &read);
    plaintext.resize(before + (result == 1 ? read : 0));
    if (result == 1) continue;
    const int error = SSL_get_error(impl.tls.get(), result);
    if (error == SSL_ERROR_WANT_READ) break;
    if (error == SSL_ERROR_ZERO_RETURN) {
      impl.closed_by_peer = true;
      break;
    }
    impl.failed = true;
    return fail(ErrorKind::Corrupt, "TLS: {}", openssl_error());
  }
  impl.wire.input = {};  // what follows a close is not looked at
  return {};
}

Status TlsSession::write(ByteSpan plaintext) {
  Impl& impl = *impl_;
  VF_ASSERT(impl.established);
  if (impl.failed) return fail(ErrorKind::Unavailable, "TLS session has failed before");
  if (plaintext.empty()) return {};
  // Header, content type and tag of a TLS 1.3 record are 22 bytes.
  impl.wire.output.reserve(impl.wire.output.size() + plaintext.size() + (plaintext.size() / 16384 + 1) * 22);
  size_t written = 0;
  ERR_clear_error();
  if (SSL_write_ex(impl.tls.get(), plaintext.data(), plaintext.size(), &written) != 1 || written != plaintext.size()) {
    impl.failed = true;
    return fail(ErrorKind::Internal, "TLS write: {}", openssl_error());
  }
  return {};
}

void TlsSession::write_close() {
  if (impl_->failed || !impl_->established) return;
  SSL_shutdown(impl_->tls.get());
  ERR_clear_error();
}

Bytes TlsSession::take_output() {
  return std::exchange(impl_->wire.output, {});
}

bool TlsSession::established() const {
  return impl_->established;
}

bool TlsSession::closed_by_peer() const {
  return impl_->closed_by_peer;
}

const KeyHash& TlsSession::peer_key_hash() const {
  VF_ASSERT(impl_->established);
  return impl_->peer_key_hash;
}

const std::string& TlsSession::client_name() const {
  VF_ASSERT(impl_->established);
  return impl_->client_name;
}

Result<TlsSession::Exporter> TlsSession::export_secret(std::string_view label) const {
  VF_ASSERT(impl_->established);
  Exporter out{};
  if (SSL_export_keying_material(impl_->tls.get(), out.data(), out.size(), label.data(), label.size(), nullptr, 0, 0) !=
      1) {
    return fail(ErrorKind::Internal, "TLS exporter: {}", openssl_error());
  }
  return out;
}

std::string TlsSession::unfinished_because() const {
  const std::string& problem = impl_->attempt.problem;
  return "TLS handshake: " + (problem.empty() ? "the client refused the server, and did not say why" : problem);
}

std::string_view TlsSession::version() const {
  return SSL_get_version(impl_->tls.get());
}

std::string_view TlsSession::cipher() const {
  const char* const name = SSL_get_cipher_name(impl_->tls.get());
  return impl_->established && name != nullptr ? name : std::string_view{};
}

}  // namespace vmferry
