// SPDX-License-Identifier: Apache-2.0
//
// What the replication and handover of one group see of the link to their peer: typed messages, in order per class,
// over a connection that comes and goes. Real: PeerLink (TLS over TCP); tests/sim: SimLink.
//
// Every group message travels with its group's id; the link routes by it, so payloads here are without the id.
// Threads: the group's executor.
#pragma once

#include <cstdint>

#include "engine/base/bytes.h"
#include "engine/base/units.h"
#include "netproto/repl/message_types.h"

namespace vmferry {

// Order of service on the link, most urgent first. Within a class messages keep their order; between classes none is
// promised.
enum class TrafficClass : uint8_t {
  Control,  // small: hello, acknowledgements, handover messages
  Urgent,   // the last epoch of a handover
  Memory,   // QEMU's stream
  Bulk,     // epochs and full copies
};
inline constexpr size_t kTrafficClassCount = 4;

struct LinkFigures {
  Nanoseconds rtt = 0;      // shortest of the last pings; 0 = not measured yet
  uint64_t send_rate = 0;   // bytes per second that recently left, while there was something to send
  uint64_t sent_bytes = 0;  // TLS bytes to the socket since the link object was made
  uint64_t received_bytes = 0;
};

class GroupChannel {
 public:
  virtual ~GroupChannel() = default;

  virtual bool connected() const = 0;
  // Whether the peer of this connection has a feature (netproto/repl/hello.h); false without a connection.
  virtual bool peer_has(uint64_t feature) const = 0;
  // Queues a message. Without a connection it is dropped: whoever needs it sent repeats it from its own state when
  // the connection comes back (on_connected of the group).
  virtual void send(TrafficClass traffic, MessageType type, Bytes payload) = 0;
  // Bytes queued in this class for the whole link. Producers of Memory and Bulk stop above queue_limit() and go on at
  // the writable callback of the group.
  virtual uint64_t queued_bytes(TrafficClass traffic) const = 0;
  virtual uint64_t queue_limit(TrafficClass traffic) const = 0;
  virtual LinkFigures figures() const = 0;
};

// Implemented by whoever owns a group's sender, receiver and coordinator (engine/daemon/group).
class GroupChannelHandler {
 public:
  virtual void channel_connected() = 0;     // authenticated; send GroupHello first
  virtual void channel_disconnected() = 0;  // everything not acknowledged has to be thought lost
  virtual void channel_message(MessageType type, ByteSpan payload) = 0;
  virtual void channel_writable(TrafficClass traffic) = 0;

 protected:
  ~GroupChannelHandler() = default;
};

}  // namespace vmferry
