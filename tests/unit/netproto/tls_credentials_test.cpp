// SPDX-License-Identifier: Apache-2.0
//
// Pre-shared keys, and TlsSession with credentials against a client of OpenSSL's own. Certificates need files and are
// tested with real clients (tests/functional/nbd_tls_test.py).
#include "netproto/tls/tls_credentials.h"

#include <gtest/gtest.h>

#include <cstring>

#include "engine/base/hash.h"
#include "tests/unit/netproto/openssl_client.h"

namespace vmferry {
namespace {

const std::string kKey(64, 'a');  // 32 bytes in hexadecimal

Result<std::shared_ptr<const TlsCredentials>> with_keys(std::string text) {
  return TlsCredentials::create({.psk_users = std::move(text)});
}

// A client that knows one user's key.
class PskClient : public OpenSslClient {
 public:
  PskClient(int version, std::string user, std::string_view key)
      : OpenSslClient([version](SSL_CTX* context) {
          SSL_CTX_set_min_proto_version(context, version);
          SSL_CTX_set_max_proto_version(context, version);
          SSL_CTX_set_cipher_list(context, "PSK:ECDHE");
          SSL_CTX_set_psk_client_callback(context, offer);
        }),
        user_(std::move(user)),
        key_(from_hex(key)) {
    SSL_set_app_data(ssl(), this);
  }

 private:
  static unsigned int offer(SSL* ssl, const char*, char* identity, unsigned int identity_max, unsigned char* key,
                            unsigned int key_max) {
    const auto* self = static_cast<const PskClient*>(SSL_get_app_data(ssl));
    if (self->user_.size() >= identity_max || self->key_.size() > key_max) return 0;
    std::memcpy(identity, self->user_.c_str(), self->user_.size() + 1);
    std::memcpy(key, self->key_.data(), self->key_.size());
    return static_cast<unsigned int>(self->key_.size());
  }

  const std::string user_;
  const Bytes key_;
};

// proto.md: TLS 1.2 has to be supported; a server that speaks 1.3 only shuts older clients out without a word.
TEST(TlsCredentials, AKeyOpensBothVersionsAndNamesItsUser) {
  const auto credentials = with_keys("bob:" + kKey + "\nalice:" + std::string(64, 'b') + "\n").value();
  EXPECT_TRUE(credentials->has_psk());
  EXPECT_FALSE(credentials->has_certificate());
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    auto server = TlsSession::create(credentials).value();
    PskClient client(version, "alice", std::string(64, 'b'));
    const Status talked = client.talk_to(*server);
    ASSERT_TRUE(talked.has_value()) << talked.error().text;
    ASSERT_TRUE(server->established()) << version;
    EXPECT_EQ(server->client_name(), "alice");
  }
}

TEST(TlsCredentials, AWrongKeyOrUserIsRefusedWithTheReason) {
  // An operator who reads "decryption failed" looks in the wrong place.
  const auto credentials = with_keys("bob:" + kKey).value();
  struct Case {
    int version;
    const char* user;
    std::string key;
    const char* reason;
  };
  for (const Case& c : {Case{TLS1_3_VERSION, "bob", std::string(64, 'c'), "the key of the client's user 'bob'"},
                        Case{TLS1_3_VERSION, "dave", kKey, "user 'dave' is not in the file"},
                        Case{TLS1_2_VERSION, "dave", kKey, "user 'dave' is not in the file"},
                        Case{TLS1_3_VERSION, "b\n\"b", kKey, "user 'b??b' is not in the file"},
                        Case{TLS1_2_VERSION, "bob", std::string(64, 'c'), "TLS handshake"},
                        Case{TLS1_1_VERSION, "bob", kKey, "TLS handshake"}}) {
    auto server = TlsSession::create(credentials).value();
    PskClient client(c.version, c.user, c.key);
    const Status talked = client.talk_to(*server);
    const std::string text = talked ? server->unfinished_because() : talked.error().text;
    EXPECT_FALSE(server->established()) << c.reason;
    EXPECT_NE(text.find(c.reason), std::string::npos) << text;
  }
}

// A line that is skipped, or a key that is cut, lets nobody in or anybody.
TEST(TlsCredentials, ABadLineIsRefusedWithItsNumber) {
  struct Case {
    std::string text;
    const char* problem;
  };
  const std::string good = "bob:" + kKey + "\n";
  for (const Case& c : std::vector<Case>{{"\n\n", "names no user"},
                                         {good + "carol", "line 2"},
                                         {good + ":" + kKey, "line 2"},
                                         {good + "\ncarol:", "line 3"},
                                         {good + "carol:xyz", "not hexadecimal"},
                                         {good + "carol:" + kKey + "a", "not hexadecimal"},
                                         {"bob:" + std::string(30, 'a'), "15 bytes"},
                                         {"bob:" + std::string(130, 'a'), "65 bytes"},
                                         {good + good, "second time"},
                                         {"#zz:" + kKey, "'#' form"},
                                         {"#6100:" + kKey, "no client can send"},
                                         {std::string(129, 'x') + ":" + kKey, "no client can send"}}) {
    const auto made = with_keys(c.text);
    ASSERT_FALSE(made.has_value()) << c.text;
    EXPECT_NE(made.error().text.find(c.problem), std::string::npos) << made.error().text;
    EXPECT_EQ(made.error().text.find(kKey), std::string::npos) << "a key must not reach the log";
  }
  EXPECT_TRUE(with_keys("bob:" + std::string(32, 'a')).has_value());
  EXPECT_TRUE(with_keys("bob:" + std::string(128, 'A') + "\r\n\r\n#6162:" + kKey).has_value());
  EXPECT_FALSE(TlsCredentials::create({}).has_value());
  EXPECT_FALSE(TlsCredentials::create({.ca_certificate = "garbage"}).has_value());
}

TEST(TlsCredentials, RubbishInsteadOfAHandshakeIsRefused) {
  const auto credentials = with_keys("bob:" + kKey).value();
  for (const std::string_view rubbish : {"IHAVEOPT\0\0\0\x07", "GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff\x01"}) {
    auto server = TlsSession::create(credentials).value();
    Bytes plaintext;
    const Status fed = server->feed(as_bytes(rubbish), plaintext);
    EXPECT_FALSE(server->established());
    EXPECT_TRUE(plaintext.empty());
    EXPECT_TRUE(!fed || server->take_output().empty());
  }
}

}  // namespace
}  // namespace vmferry
