// SPDX-License-Identifier: Apache-2.0
//
// The log of a guest's load as vmlib's collector stored it: `HOST_TIME QEMU_PID MESSAGE` per line, with the messages
// of workload/log_channel.h. A log of the load itself (run on a host) has only the messages.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <map>
#include <string>
#include <vector>

#include "tests/guest/record/record.h"

namespace vmferry::guest {

struct SeqRange {
  std::uint64_t first = 0;
  std::uint64_t end = 0;
  std::uint64_t source = 0;  // pid of the QEMU it came from; 0: unknown
};

struct Extent {
  std::uint64_t logical = 0;
  std::uint64_t physical = 0;
  std::uint64_t length = 0;
};

// One start of a writer on one disk.
struct Run {
  std::uint64_t id = 0;
  SlotPattern pattern;
  std::uint64_t offset = 0;
  unsigned fsync_every = 0;
  std::vector<SeqRange> durable;  // as they came
  std::vector<SeqRange> written;  // without fsync
  std::uint64_t stopped_at = 0;   // a last fsync made all numbers below durable; 0: did not stop by itself
  std::vector<Extent> extents;    // empty: the area lies at `offset` in one piece
};

struct AckLog {
  std::map<unsigned, std::vector<Run>> runs;  // by disk, in order of their start
  std::vector<std::string> errors;            // what the guest reported, in its words
  std::uint64_t memory_pages_bad = 0;
};

// False with a message (with the number of the line) when the log is not one: an acknowledgement that was not
// understood would be one that is not checked. A last line without its end is left out: the guest died there.
bool read_ack_log(std::istream& in, AckLog& log, std::string& error);

}  // namespace vmferry::guest
