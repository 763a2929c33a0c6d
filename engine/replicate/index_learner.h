// SPDX-License-Identifier: Apache-2.0
//
// Learns, by reading, what the copy is known to hold: after a restart the session index is empty, and a guest that
// copies an old file would send data that the peer has.
//
// Flow: Sender is idle -> one small read of blocks that are not dirty -> fingerprints on a worker -> session index. One
// pass over the volumes, holes skipped, at most as many blocks as the index has room for. It yields to everything: it
// reads only while the sender has nothing to send, and pauses when the guest does more than a little. A block that
// changes meanwhile costs nothing but a reference that the copy does not confirm (I8).
// Threads: the group's executor.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/delta/block_scan.h"
#include "engine/replicate/epoch_reader.h"

namespace vmferry {

class IndexLearner {
 public:
  struct Environment {
    Executor& executor;
    std::vector<ReplicaVolume> volumes;
    uint64_t blocks_max = 0;     // that the index has room for
    std::function<bool()> idle;  // nothing is to be sent, and every block that is not dirty is at the copy
    // How many bytes from the range's beginning on the index knows already; only while idle.
    std::function<uint64_t(uint16_t volume, ByteRange range)> known;
    // Puts blocks from `offset` on into the index, zero where it is not to be learnt; only while idle. How many it
    // took.
    std::function<size_t(uint16_t volume, uint64_t offset, const std::vector<delta::Fingerprint>& blocks)> learn;
  };
  explicit IndexLearner(Environment environment);
  IndexLearner(const IndexLearner&) = delete;
  IndexLearner& operator=(const IndexLearner&) = delete;

  void start();
  uint64_t learnt_blocks() const { return learnt_blocks_; }
  bool finished() const { return finished_; }

 private:
  struct Piece;

  void step();
  void later(Nanoseconds delay);
  bool guest_is_busy();
  void read(uint64_t length);
  void scanned(const Piece& piece);

  const Environment env_;
  uint16_t volume_ = 0;  // where to go on
  uint64_t offset_ = 0;
  uint64_t read_blocks_ = 0;  // that were no zeroes
  uint64_t learnt_blocks_ = 0;
  uint64_t guest_requests_ = 0;  // when last looked at
  Nanoseconds looked_at_ = 0;
  bool finished_ = false;
  ExtentCache extents_;
  Timer timer_;
  Alive alive_;
};

}  // namespace vmferry
