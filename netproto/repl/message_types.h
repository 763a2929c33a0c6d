// SPDX-License-Identifier: Apache-2.0
//
// Numbers of all messages between two daemons: docs/replication-protocol.md. A number is never reused.
#pragma once

#include <cstdint>

namespace vmferry {

enum class MessageType : uint16_t {
  Invalid = 0,

  // Connection level (netproto/repl/hello.h, pairing.h)
  Hello = 1,        // first from both: protocol versions, features, node id, boot id
  HelloReject = 2,  // why this connection is refused; then it is closed
  Ping = 3,
  Pong = 4,
  JoinRequest = 5,  // pairing by token
  JoinReply = 6,
  PeerRequest = 7,  // control question (JSON): preflight, estimate, space. Answered by PeerReply
  PeerReply = 8,

  // Group level; payload begins with the 16-byte group id on the wire
  GroupHello = 32,   // (volumes, sizes, role, term, attempt, state, last epoch) from both on every connection (H6)
  GroupReject = 33,  // this group is refused: reason
  SourceState = 34,  // paused or not; only to a peer with kFeatureSourceState

  // Replication (netproto/repl/epoch_messages.h)
  EpochBegin = 64,
  EpochData = 65,
  EpochEnd = 66,
  EpochSegmentAck = 67,  // durable up to this data frame
  EpochAck = 68,         // applied and durable: the sender may forget it
  EpochResend = 69,      // a reference or frame did not match: send these ranges as data
  Credit = 70,
  EpochAbandon = 71,  // the sender gives up an epoch that it began
  VerifyRequest = 80,
  VerifyReply = 81,

  // Memory stream (netproto/repl/memory_messages.h)
  MemoryData = 96,
  MemoryEnd = 97,
  MemoryAck = 98,

  // Handover and promotion (netproto/repl/handover_messages.h, docs/migration.md)
  Prepare = 128,
  Prepared = 129,
  FenceNotice = 130,
  Go = 131,
  Primary = 132,
  Started = 133,
  Running = 134,
  Aborted = 135,
  UnknownAttempt = 136,
  PromoteRequest = 144,  // asks the peer to fence itself for a promotion without migration
  PromoteReply = 145,
  DemoteNotice = 146,
};

}  // namespace vmferry
