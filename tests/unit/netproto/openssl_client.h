// SPDX-License-Identifier: Apache-2.0
//
// A TLS client of OpenSSL's own, through memory BIOs, in conversation with a TlsSession as the server.
#pragma once

#include <openssl/ssl.h>

#include <functional>

#include "netproto/tls/tls_session.h"

namespace vmferry {

class OpenSslClient {
 public:
  // `set_up` changes what the defaults of OpenSSL are not to be.
  explicit OpenSslClient(const std::function<void(SSL_CTX*)>& set_up) : context_(SSL_CTX_new(TLS_client_method())) {
    set_up(context_);
    ssl_ = SSL_new(context_);
    SSL_set_bio(ssl_, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    SSL_set_connect_state(ssl_);
  }
  OpenSslClient(const OpenSslClient&) = delete;
  OpenSslClient& operator=(const OpenSslClient&) = delete;
  ~OpenSslClient() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
  }

  SSL* ssl() { return ssl_; }
  // Status of the server after the conversation.
  Status talk_to(TlsSession& server) {
    Bytes plaintext;
    for (int round = 0; round < 5; ++round) {
      SSL_do_handshake(ssl_);
      char* data = nullptr;
      const long size = BIO_get_mem_data(SSL_get_wbio(ssl_), &data);
      const Bytes bytes(data, data + size);
      BIO_reset(SSL_get_wbio(ssl_));
      if (auto fed = server.feed(bytes, plaintext); !fed) return fed;
      const Bytes back = server.take_output();
      BIO_write(SSL_get_rbio(ssl_), back.data(), static_cast<int>(back.size()));
    }
    return {};
  }

 private:
  SSL_CTX* context_;
  SSL* ssl_ = nullptr;
};

}  // namespace vmferry
