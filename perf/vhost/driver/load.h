// SPDX-License-Identifier: Apache-2.0
//
// One queue's load: keeps `depth` requests in flight for a while and notes how long each took.
//
// Content can be verified: every block carries its number and how often it was written, so that a block at the wrong
// place, an older version, and bytes that never arrived are all found. Threads: one per queue.
#pragma once

#include <vector>

#include "perf/vhost/driver/blk_queue.h"

namespace vmferry::perf {

enum class Pattern : uint8_t { Read, Write, RandomRead, RandomWrite, RandomMixed };

struct LoadOptions {
  Pattern pattern = Pattern::RandomRead;
  uint16_t depth = 32;
  uint32_t block_bytes = 4096;
  uint64_t first_block = 0;  // of this queue's part of the disk
  uint64_t blocks = 0;
  double seconds = 5;
  bool verify = false;
  bool busy_poll = false;  // never sleep: measures the back-end, not the wake-up of this program
  uint64_t seed = 1;
};

struct LoadResult {
  uint64_t requests = 0;
  uint64_t errors = 0;
  uint64_t mismatches = 0;
  uint64_t verified = 0;  // blocks compared
  double seconds = 0;
  std::vector<uint32_t> latency_ns;  // of each request, capped at 4.2 s
};

class Load {
 public:
  Load(BlkQueue& queue, const LoadOptions& options);
  LoadResult run();

 private:
  struct Slot {
    uint64_t block = 0;
    bool write = false;
    uint64_t started_ns = 0;
  };
  bool choose(Slot& slot);
  void begin(uint16_t index);
  bool finish(const BlkQueue::Done& done);
  void read_all();
  void fill(uint8_t* data, uint64_t block, uint32_t generation) const;
  bool matches(const uint8_t* data, uint64_t block) const;
  uint64_t next_random();

  BlkQueue& queue_;
  const LoadOptions options_;
  LoadResult result_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> generations_;  // of each block; 0: not written by us
  std::vector<bool> busy_;             // blocks with a request in flight, when content is verified
  std::vector<uint16_t> idle_;
  uint64_t sequential_ = 0;
  uint64_t random_;
};

}  // namespace vmferry::perf
