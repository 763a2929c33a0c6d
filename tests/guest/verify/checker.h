// SPDX-License-Identifier: Apache-2.0
//
// Compares the records in an image with what the guest was told about them.
//
// A slot that was acknowledged with sequence number s must hold a valid record of that slot with a number >= s.
// The order of slots is replayed from the parameters in the log, so nothing about a record is taken from the record
// alone: one that is valid in itself but belongs elsewhere is found, too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/guest/verify/ack_log.h"

namespace vmferry::guest {

struct CheckResult {
  std::uint64_t acknowledged = 0;  // records
  std::uint64_t found = 0;         // of those: there, or overwritten by a later one that is there
  std::uint64_t lost = 0;          // of those: an older record, or nothing
  std::uint64_t corrupt = 0;       // slots with anything but nothing or the right kind of record
  std::uint64_t torn = 0;          // of the corrupt ones: a header of ours with a wrong checksum
  std::uint64_t misplaced = 0;     // of the corrupt ones: a valid record of another slot, run, or from the future
  std::uint64_t reordered = 0;     // not acknowledged, but a record written after a later fsync is there and this not
  std::uint64_t forked = 0;        // numbers that two QEMUs reported: the guest ran twice
  std::uint64_t last_seq = 0;      // of the last run
  std::vector<std::string> examples;  // of the first few

  bool clean() const { return lost + corrupt + reordered + forked == 0 && found == acknowledged; }
};

// include_written: records that were written without fsync count as acknowledged; right when nothing crashed.
// False with a message when the image cannot be read.
bool check_image(const std::string& path, const std::vector<Run>& runs, bool include_written, CheckResult& result,
                 std::string& error);

}  // namespace vmferry::guest
