// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/pairing.h"

#include <gtest/gtest.h>

#include "tests/unit/netproto/golden_repl.h"

namespace vmferry {
namespace {

PairingToken example_token() {
  PairingToken token;
  for (size_t i = 0; i < 8; ++i) token.id[i] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < 32; ++i) token.inviter_key[i] = static_cast<uint8_t>(0x40 + i);
  for (size_t i = 0; i < 32; ++i) token.secret[i] = static_cast<uint8_t>(0x80 + i);
  token.addresses = {"10.0.0.1:4410", "[2001:db8::1]:4410"};
  return token;
}

JoinRequest example_request() {
  JoinRequest request{.version_min = 1,
                      .version_max = 1,
                      .token = example_token().id,
                      .node_id = Id128{{5}},
                      .requested_name = "bee",
                      .grants = {.replicate_in = true, .verify = false, .migrate_in = true},
                      .listen_port = 4410,
                      .addresses = {"bee.example:4410"}};
  for (size_t i = 0; i < request.proof.size(); ++i) request.proof[i] = static_cast<uint8_t>(i);
  return request;
}

// Tokens are pasted between hosts that may run different versions.
TEST(PairingToken, TextIsAsDocumented) {
  const std::string text = encode_token(example_token());
  EXPECT_EQ(text, as_text(golden_repl("token.txt", as_bytes(text))));
  EXPECT_EQ(text.find_first_of(" \n\t'\"$"), std::string::npos) << "it has to survive a shell";
  const PairingToken decoded = decode_token(text + "\r\n").value();
  EXPECT_EQ(decoded.id, example_token().id);
  EXPECT_EQ(decoded.inviter_key, example_token().inviter_key);
  EXPECT_EQ(decoded.secret, example_token().secret);
  EXPECT_EQ(decoded.addresses, example_token().addresses);
}

// A slip in copying must be named as such, and never reach the inviter as a wrong try.
TEST(PairingToken, EveryTruncationAndEveryChangedCharacterIsNoticed) {
  const std::string good = encode_token(example_token());
  for (size_t size = 0; size < good.size(); ++size)
    EXPECT_FALSE(decode_token(good.substr(0, size)).has_value()) << size;
  for (size_t i = 0; i < good.size(); ++i) {
    for (const char c : {'A', '_', '*', '\0'}) {
      std::string bad = good;
      if (bad[i] == c) continue;
      bad[i] = c;
      EXPECT_FALSE(decode_token(bad).has_value()) << i << " " << static_cast<int>(c);
    }
  }
  EXPECT_FALSE(decode_token(good + "A").has_value());
  EXPECT_FALSE(decode_token(std::string(5000, 'A')).has_value());
}

TEST(PairingToken, ALaterVersionIsNamedAsSuch) {
  std::string text = encode_token(example_token());
  text[7] = '2';
  EXPECT_EQ(decode_token(text).error().kind, ErrorKind::Mismatch);
  EXPECT_EQ(decode_token("hello").error().kind, ErrorKind::InvalidArgument);
}

TEST(JoinRequest, BytesAreAsDocumented) {
  const Bytes request = encode(example_request());
  EXPECT_EQ(to_hex(request), to_hex(golden_repl("join_request.bin", request)));
  const Bytes reply =
      encode(JoinReply{.result = JoinResult::Ok, .your_name = "bee-2", .grants = {}, .node_id = Id128{{6}}});
  EXPECT_EQ(to_hex(reply), to_hex(golden_repl("join_reply.bin", reply)));
  const JoinRequest decoded = decode_join_request(request).value();
  EXPECT_EQ(encode(decoded), request);
  EXPECT_EQ(encode(decode_join_reply(reply).value()), reply);
}

TEST(JoinRequest, EveryTruncationIsRefused) {
  // A request is read before anything is proved about its sender.
  const Bytes request = encode(example_request());
  for (size_t size = 0; size < request.size(); ++size) {
    EXPECT_FALSE(decode_join_request(ByteSpan(request).first(size)).has_value()) << size;
  }
  const Bytes reply = encode(JoinReply{.result = JoinResult::Ok, .your_name = "bee", .node_id = Id128{{6}}});
  for (size_t size = 0; size < reply.size(); ++size) {
    EXPECT_FALSE(decode_join_reply(ByteSpan(reply).first(size)).has_value()) << size;
  }
}

// Names become parts of paths and log lines, addresses become something that we dial.
TEST(JoinRequest, HostileNamesAndAddressesAreRefused) {
  for (const char* name : {"../x", "a b", "-x", "a\n"}) {
    JoinRequest request = example_request();
    request.requested_name = name;
    EXPECT_FALSE(decode_join_request(encode(request)).has_value()) << name;
  }
  for (const char* address :
       {"", "x", "x:", ":1", "x:0", "x:65536", "x:1a", "x y:1", "x/y:1", "unix:/p", "x\n:1", "[::1:1", "a:b:1"}) {
    EXPECT_FALSE(is_valid_peer_address(address)) << address;
    JoinRequest request = example_request();
    request.addresses = {address};
    EXPECT_FALSE(decode_join_request(encode(request)).has_value()) << address;
  }
  for (const char* address : {"a:1", "10.0.0.1:65535", "[::1]:4410", "host-1.example:80"}) {
    EXPECT_TRUE(is_valid_peer_address(address)) << address;
  }
  JoinReply reply{.result = JoinResult::Ok, .your_name = "../x", .node_id = Id128{{6}}};
  EXPECT_FALSE(decode_join_reply(encode(reply)).has_value());
}

// A proof that is good for another session, another pair of keys or another request could be replayed.
TEST(JoinProof, IsBoundToSessionKeysAndRequest) {
  const TokenSecret secret = random_token_secret();
  const TokenVerifier verifier = token_verifier(secret).value();
  const TlsSession::Exporter exporter{1};
  const KeyHash inviter{2};
  const KeyHash joiner{3};
  const JoinRequest request = example_request();
  const Bytes statement = join_statement(exporter, inviter, joiner, request);
  const TokenProof proof = sign_with_token(secret, statement).value();
  EXPECT_TRUE(verify_token_proof(verifier, statement, proof));

  JoinRequest more_rights = request;
  more_rights.grants.verify = true;
  JoinRequest other_name = request;
  other_name.requested_name = "bea";
  for (const Bytes& other :
       {join_statement(TlsSession::Exporter{9}, inviter, joiner, request),
        join_statement(exporter, KeyHash{9}, joiner, request), join_statement(exporter, inviter, KeyHash{9}, request),
        join_statement(exporter, inviter, joiner, more_rights),
        join_statement(exporter, inviter, joiner, other_name)}) {
    EXPECT_FALSE(verify_token_proof(verifier, other, proof));
  }
  TokenProof flipped = proof;
  flipped[10] ^= 1;
  EXPECT_FALSE(verify_token_proof(verifier, statement, flipped));
  EXPECT_FALSE(verify_token_proof(token_verifier(random_token_secret()).value(), statement, proof));
  EXPECT_FALSE(verify_token_proof(TokenVerifier{}, statement, TokenProof{}));
}

TEST(PeerRights, NamesAndBits) {
  // A right that is read as another one opens what the operator kept closed.
  EXPECT_EQ(to_string(PeerRights{}), "replicate-in, verify, migrate-in");
  EXPECT_EQ(to_string(kNoRights), "nothing");
  EXPECT_EQ(parse_rights("verify").value(), (PeerRights{.replicate_in = false, .verify = true, .migrate_in = false}));
  EXPECT_EQ(parse_rights("replicate-in, migrate-in").value(),
            (PeerRights{.replicate_in = true, .verify = false, .migrate_in = true}));
  EXPECT_FALSE(parse_rights("everything").has_value());
  EXPECT_FALSE(parse_rights("").has_value());
  for (uint8_t bits = 0; bits < 8; ++bits) EXPECT_EQ(to_bits(rights_from_bits(bits)), bits);
}

}  // namespace
}  // namespace vmferry
