// SPDX-License-Identifier: Apache-2.0
//
// Messages waiting for the link, by class, and the order in which they leave.
//
// Control before Urgent before the rest; Memory and Bulk share by weight while both have something to send. Messages
// leave in fragments no larger than the caller asks for, so the first byte of an urgent message waits for one
// fragment of a large one, not for all of it.
// Flow: PeerLink::send() pushes, PeerLink::pump() takes. Threads: the executor's thread.
#pragma once

#include <array>
#include <deque>
#include <optional>

#include "engine/base/id.h"
#include "engine/replicate/peer_channel.h"
#include "netproto/repl/frame.h"

namespace vmferry {

constexpr size_t lane_of(TrafficClass traffic) {
  return static_cast<size_t>(traffic);
}

class LinkQueue {
 public:
  struct Weights {
    uint32_t memory = 1;
    uint32_t bulk = 1;
  };
  // Smallest space that fill() can use for a piece of a message: its header and some payload.
  static constexpr size_t kFragmentMin = 1024;

  void set_weights(const Weights& weights) { weights_ = weights; }

  // `group` is put in front of the payload. The whole is at most kFramePayloadSizeMax (asserted: our own messages).
  void push(TrafficClass traffic, MessageType type, const std::optional<Id128>& group, Bytes payload);

  // Appends frames to `out` until it has `size_max` bytes or nothing fits. With control_only the other classes wait.
  void fill(Bytes& out, size_t size_max, bool control_only);

  uint64_t queued_bytes(TrafficClass traffic) const { return lanes_[lane_of(traffic)].bytes; }
  bool empty() const;
  // The connection is gone: what was queued will be repeated by whoever needs it.
  void clear();

 private:
  struct Message {
    MessageType type;
    Bytes group;  // empty or 16 bytes
    Bytes payload;
    size_t sent = 0;  // of group and payload together
    size_t size() const { return group.size() + payload.size(); }
  };
  struct Lane {
    std::deque<Message> messages;
    uint64_t bytes = 0;
    uint64_t served = 0;  // bytes divided by weight: the lane with less goes next
  };

  std::optional<size_t> next_lane(bool control_only) const;
  void append_fragment(size_t lane_number, size_t space, Bytes& out);

  std::array<Lane, kTrafficClassCount> lanes_;
  Weights weights_;
};

}  // namespace vmferry
