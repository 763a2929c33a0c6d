// SPDX-License-Identifier: Apache-2.0
//
// Pairing two daemons by a token: the token's text and the two messages. docs/replication-protocol.md section 3.
//
// Flow: `peer invite` prints encode_token(); `peer join` decodes it, dials, checks that the key it meets is the one in
// the token, and sends JoinRequest with a proof that is bound to this TLS session; JoinReply ends it.
// Threads: pure functions on values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/result.h"
#include "netproto/repl/hello.h"
#include "netproto/tls/tls_session.h"
#include "netproto/tls/token_key.h"

namespace vmferry {

inline constexpr size_t kPeerAddressesMax = 4;
inline constexpr size_t kPeerAddressSizeMax = 255;
inline constexpr size_t kTokenTextMax = 4096;

// What one side lets the other do here.
struct PeerRights {
  bool replicate_in = true;  // send epochs into volumes here
  bool verify = true;        // compare content here
  bool migrate_in = true;    // hand over a running guest: it is trusted with code in the destination QEMU
  friend bool operator==(const PeerRights&, const PeerRights&) = default;
};
inline constexpr PeerRights kNoRights{.replicate_in = false, .verify = false, .migrate_in = false};

uint8_t to_bits(const PeerRights& rights);
PeerRights rights_from_bits(uint8_t bits);
// "replicate-in, verify, migrate-in", or "nothing".
std::string to_string(const PeerRights& rights);
// Comma-separated names; an unknown one is an error.
Result<PeerRights> parse_rights(std::string_view text);

// "HOST:PORT", "[IPv6]:PORT": characters and port only; whether it can be reached shows later.
bool is_valid_peer_address(std::string_view address);

using TokenId = std::array<uint8_t, 8>;  // names the token; worth nothing without the secret

// All that a joiner needs. Whoever reads it may join: handle it like a password.
struct PairingToken {
  TokenId id{};
  KeyHash inviter_key{};
  TokenSecret secret{};
  std::vector<std::string> addresses{};  // 1..kPeerAddressesMax
};

// One line: "vmferry1.", then base64url of the fields and a CRC-32C, which tells a mistyped token from a refused one.
std::string encode_token(const PairingToken& token);
Result<PairingToken> decode_token(std::string_view text);

struct JoinRequest {
  uint16_t version_min = kProtocolVersionMin;
  uint16_t version_max = kProtocolVersionMax;
  TokenId token{};
  TokenProof proof{};
  Id128 node_id{};
  std::string requested_name{};          // what the joiner wants to be called; may be empty
  PeerRights grants{};                   // what the joiner lets the inviter do
  uint16_t listen_port = 0;              // 0: the joiner does not listen. With the address seen by the inviter
  std::vector<std::string> addresses{};  // further ones, as configured
};

enum class JoinResult : uint16_t {
  Ok = 0,
  Unknown = 1,  // no such token here
  Used = 2,
  Expired = 3,
  Dead = 4,        // too many wrong tries
  WrongProof = 5,  // one of them
  Version = 6,
  Refused = 7,  // anything else, said in the text
};

struct JoinReply {
  JoinResult result = JoinResult::Refused;
  std::string text{};       // when not Ok, one sentence
  std::string your_name{};  // what the inviter now calls the joiner
  PeerRights grants{};      // what the inviter lets the joiner do
  Id128 node_id{};
};

Bytes encode(const JoinRequest& message);
Bytes encode(const JoinReply& message);
Result<JoinRequest> decode_join_request(ByteSpan payload);
Result<JoinReply> decode_join_reply(ByteSpan payload);

// What the joiner signs: it names this TLS session, both keys and everything in the request, so the proof fits no other
// session, no other pair of daemons and no altered request.
inline constexpr std::string_view kJoinExporterLabel = "EXPORTER-vmferry-join";
Bytes join_statement(const TlsSession::Exporter& exporter, const KeyHash& inviter, const KeyHash& joiner,
                     const JoinRequest& request);

}  // namespace vmferry
