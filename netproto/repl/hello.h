// SPDX-License-Identifier: Apache-2.0
//
// Connection-level messages between two daemons, and the negotiation: docs/replication-protocol.md section 2.
//
// The dialler sends Hello (or, when it does not trust the key it met, HelloReject); the acceptor answers with its own
// Hello, which accepts, or with HelloReject, which says why not. check_hello() is the same function on both sides.
// Flow: PeerLink and PeerService. Threads: pure functions on values.
#pragma once

#include <cstdint>
#include <string>

#include "engine/base/bytes.h"
#include "engine/base/id.h"
#include "engine/base/result.h"
#include "netproto/repl/frame.h"

namespace vmferry {

// The protocol versions that this build speaks. A version is raised when an old daemon could misread a message;
// additions that it may ignore are features or non-critical frames.
inline constexpr uint16_t kProtocolVersionMin = 1;
inline constexpr uint16_t kProtocolVersionMax = 1;

// Feature bits. Both sides use what both have; `features_required` names those without which one side will not work.
enum FeatureBits : uint64_t {
  kFeatureEpochs = 1 << 0,        // epochs and full copies (section 4)
  kFeatureHandover = 1 << 1,      // handover messages of version 1 (section 5)
  kFeatureMemoryStream = 1 << 2,  // QEMU's stream through the link (section 6)
  kFeatureSourceState = 1 << 3,   // SourceState (section 4.1)
};
inline constexpr uint64_t kFeaturesKnown =
    kFeatureEpochs | kFeatureHandover | kFeatureMemoryStream | kFeatureSourceState;

// Fields are only ever appended: a decoder ignores what follows the ones it knows, so that any two versions can read
// each other's Hello far enough to say why they do not fit.
struct Hello {
  uint16_t version_min = kProtocolVersionMin;
  uint16_t version_max = kProtocolVersionMax;
  uint64_t features = kFeaturesKnown;
  uint64_t features_required = 0;
  Id128 node_id{};               // of the state directory; the same over restarts
  Id128 boot_id{};               // of this run of the daemon: another one means that older connections are dead
  std::string daemon_version{};  // for people
  std::string your_name{};       // what the sender calls the receiver; for people
};

enum class RejectReason : uint16_t {
  Other = 0,
  Version = 1,       // no common protocol version
  Feature = 2,       // a required feature is missing
  KeyNotPinned = 3,  // the key that this side presented is not one the sender of the message knows
  Duplicate = 4,     // another connection between the two is in use
  SelfConnected = 5,
  ShuttingDown = 6,
};

struct HelloReject {
  RejectReason reason = RejectReason::Other;
  uint16_t version_min = kProtocolVersionMin;
  uint16_t version_max = kProtocolVersionMax;
  std::string text{};  // one sentence for the other side's operator
};

struct Ping {
  uint64_t stamp = 0;  // the sender's own clock; comes back unchanged in Pong
};

// A control question and its answer: JSON text, which the codec does not look into.
struct PeerRequest {
  uint64_t id = 0;
  std::string method{};
  std::string json{};
};
struct PeerReply {
  uint64_t id = 0;
  bool ok = false;
  ErrorKind error = ErrorKind::Internal;  // when not ok
  std::string text{};                     // JSON when ok, otherwise what went wrong
};
inline constexpr size_t kPeerRequestTextMax = 1024 * 1024;
inline constexpr size_t kPeerMethodSizeMax = 64;
inline constexpr size_t kHelloTextMax = 512;

Bytes encode(const Hello& message);
Bytes encode(const HelloReject& message);
Bytes encode(const Ping& message);  // Pong has the same payload
Bytes encode(const PeerRequest& message);
Bytes encode(const PeerReply& message);

Result<Hello> decode_hello(ByteSpan payload);
Result<HelloReject> decode_hello_reject(ByteSpan payload);
Result<Ping> decode_ping(ByteSpan payload);
Result<PeerRequest> decode_peer_request(ByteSpan payload);
Result<PeerReply> decode_peer_reply(ByteSpan payload);

struct Negotiated {
  uint16_t version = 0;
  uint64_t features = 0;  // of both
};

// What both sides can speak together, or the rejection to send. Both sides come to the same version.
tl::expected<Negotiated, HelloReject> check_hello(const Hello& ours, const Hello& theirs);

// Printable ASCII only, cut to `size_max`: texts from a peer go into log lines and onto terminals.
std::string printable(std::string_view text, size_t size_max);

}  // namespace vmferry
