// SPDX-License-Identifier: Apache-2.0
#include "netproto/tls/tls_session.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/unit/netproto/openssl_client.h"

namespace vmferry {
namespace {

const TlsIdentity& identity_a() {
  static const TlsIdentity identity = TlsIdentity::generate().value();
  return identity;
}
const TlsIdentity& identity_b() {
  static const TlsIdentity identity = TlsIdentity::generate().value();
  return identity;
}

struct Pair {
  std::unique_ptr<TlsSession> client = TlsSession::create(identity_a(), TlsSession::Side::Client).value();
  std::unique_ptr<TlsSession> server = TlsSession::create(identity_b(), TlsSession::Side::Server).value();
  Bytes at_client, at_server;

  // Carries bytes both ways until nothing is left; pieces of `piece` bytes.
  Status exchange(size_t piece = SIZE_MAX) {
    for (int round = 0; round < 20; ++round) {
      const Bytes to_server = client->take_output();
      const Bytes to_client = server->take_output();
      if (to_server.empty() && to_client.empty()) return {};
      if (auto fed = feed(*server, to_server, at_server, piece); !fed) return fed;
      if (auto fed = feed(*client, to_client, at_client, piece); !fed) return fed;
    }
    return fail(ErrorKind::Internal, "the two sides never come to rest");
  }
  static Status feed(TlsSession& to, const Bytes& bytes, Bytes& plaintext, size_t piece) {
    for (size_t at = 0; at < bytes.size(); at += piece) {
      if (auto fed = to.feed(ByteSpan(bytes).subspan(at, std::min(piece, bytes.size() - at)), plaintext); !fed)
        return fed;
      if (piece == SIZE_MAX) break;
    }
    return {};
  }
};

// The pin is compared with this: a hash of anything but the key that made the handshake would let anybody in.
TEST(TlsSession, BothSidesLearnTheOthersKey) {
  Pair pair;
  ASSERT_TRUE(pair.exchange().has_value());
  ASSERT_TRUE(pair.client->established() && pair.server->established());
  EXPECT_EQ(pair.client->peer_key_hash(), identity_b().key_hash());
  EXPECT_EQ(pair.server->peer_key_hash(), identity_a().key_hash());
  EXPECT_NE(identity_a().key_hash(), identity_b().key_hash());
  EXPECT_EQ(pair.client->cipher(), "TLS_AES_128_GCM_SHA256");
}

TEST(TlsSession, DataSurvivesDeliveryInPiecesOfAnySize) {
  // TCP cuts records anywhere.
  Bytes data(100'000);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(i * 7 + i / 256);
  for (const size_t piece : {size_t{1}, size_t{5}, size_t{1000}, size_t{16406}, SIZE_MAX}) {
    Pair pair;
    ASSERT_TRUE(pair.exchange(piece).has_value()) << piece;
    ASSERT_TRUE(pair.client->write(data).has_value());
    ASSERT_TRUE(pair.server->write(ByteSpan(data).first(3)).has_value());
    ASSERT_TRUE(pair.exchange(piece).has_value()) << piece;
    EXPECT_EQ(pair.at_server, data);
    EXPECT_EQ(pair.at_client.size(), 3U);
  }
}

// The proof of a token hangs on this value: equal at both ends, new in every session.
TEST(TlsSession, ExporterIsEqualAtBothEndsAndNewEachTime) {
  Pair first;
  Pair second;
  ASSERT_TRUE(first.exchange().has_value() && second.exchange().has_value());
  EXPECT_EQ(first.client->export_secret("EXPORTER-a").value(), first.server->export_secret("EXPORTER-a").value());
  EXPECT_NE(first.client->export_secret("EXPORTER-a").value(), first.client->export_secret("EXPORTER-b").value());
  EXPECT_NE(first.client->export_secret("EXPORTER-a").value(), second.client->export_secret("EXPORTER-a").value());
}

TEST(TlsSession, ADamagedRecordEndsTheSession) {
  Pair pair;
  ASSERT_TRUE(pair.exchange().has_value());
  ASSERT_TRUE(pair.client->write(as_bytes("payload")).has_value());
  Bytes record = pair.client->take_output();
  record.back() ^= 1;
  Bytes plaintext;
  EXPECT_EQ(pair.server->feed(record, plaintext).error().kind, ErrorKind::Corrupt);
  EXPECT_TRUE(plaintext.empty());
  EXPECT_FALSE(pair.server->feed(record, plaintext).has_value());
}

TEST(TlsSession, AReplayedRecordEndsTheSession) {
  Pair pair;
  ASSERT_TRUE(pair.exchange().has_value());
  ASSERT_TRUE(pair.client->write(as_bytes("payload")).has_value());
  const Bytes record = pair.client->take_output();
  Bytes plaintext;
  EXPECT_TRUE(pair.server->feed(record, plaintext).has_value());
  EXPECT_FALSE(pair.server->feed(record, plaintext).has_value());
  EXPECT_EQ(as_text(plaintext), "payload");
}

// An end that was said is different from a cut.
TEST(TlsSession, CloseIsToldFromACut) {
  Pair pair;
  ASSERT_TRUE(pair.exchange().has_value());
  ASSERT_TRUE(pair.client->write(as_bytes("last")).has_value());
  pair.client->write_close();
  EXPECT_FALSE(pair.server->closed_by_peer());
  ASSERT_TRUE(pair.exchange().has_value());
  EXPECT_TRUE(pair.server->closed_by_peer());
  EXPECT_EQ(as_text(pair.at_server), "last");
}

// A stranger must not make us hold more than a handshake needs.
TEST(TlsSession, AnEndlessHandshakeIsCutOff) {
  auto server = TlsSession::create(identity_b(), TlsSession::Side::Server).value();
  Bytes plaintext;
  // A handshake record that announces a ClientHello of 16 MiB - 1 and goes on for ever.
  Bytes record = {22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff};
  record.resize(5 + 0x4000);
  size_t taken = 0;
  while (server->feed(record, plaintext).has_value()) {
    taken += record.size();
    ASSERT_LT(taken, TlsSession::kHandshakeBytesMax + record.size());
  }
  EXPECT_FALSE(server->established());
}

TEST(TlsSession, RubbishIsRefused) {
  for (const std::string_view rubbish : {"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01", "SSH-2.0-OpenSSH_9.2\r\n"}) {
    auto server = TlsSession::create(identity_b(), TlsSession::Side::Server).value();
    Bytes plaintext;
    const Status fed = server->feed(as_bytes(rubbish), plaintext);
    EXPECT_TRUE(!fed || !server->established());
    EXPECT_TRUE(plaintext.empty());
  }
}

// Without a certificate, and of at most this version.
struct ForeignClient : OpenSslClient {
  explicit ForeignClient(int version)
      : OpenSslClient([version](SSL_CTX* context) {
          SSL_CTX_set_max_proto_version(context, version);
          SSL_CTX_set_security_level(context, 0);
        }) {}
};

TEST(TlsSession, OlderVersionsOfTlsAreRefused) {
  // TLS 1.2 has other rules for exporters and renegotiation; nothing here is made for them.
  auto server = TlsSession::create(identity_b(), TlsSession::Side::Server).value();
  EXPECT_FALSE(ForeignClient(TLS1_2_VERSION).talk_to(*server).has_value());
  EXPECT_FALSE(server->established());
}

TEST(TlsSession, AClientWithoutACertificateIsRefused) {
  // Without a key there is nothing to pin.
  auto server = TlsSession::create(identity_b(), TlsSession::Side::Server).value();
  EXPECT_FALSE(ForeignClient(TLS1_3_VERSION).talk_to(*server).has_value());
  EXPECT_FALSE(server->established());
}

// A key that changes when it is stored means that all peers refuse us after a restart.
TEST(TlsIdentity, PemKeepsTheKey) {
  const std::string pem = identity_a().to_pem();
  EXPECT_EQ(TlsIdentity::from_pem(pem).value().key_hash(), identity_a().key_hash());
  for (size_t size = 0; size < pem.size() - 1; size += 3) {
    EXPECT_FALSE(TlsIdentity::from_pem(pem.substr(0, size)).has_value()) << size;
  }
  EXPECT_FALSE(TlsIdentity::from_pem(std::string(100'000, 'x')).has_value());
}

}  // namespace
}  // namespace vmferry
