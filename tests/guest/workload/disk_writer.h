// SPDX-License-Identifier: Apache-2.0
//
// Writes records (record/record.h) at a rate to a part of a disk or to a file on it, and logs which are durable.
//
// Runs in a process of its own until `stop` is set; a write that fails is reported and ends the writer: what the
// guest was told is all that counts, and a retry could hide a lost write.
#pragma once

#include <csignal>

#include "tests/guest/workload/log_channel.h"
#include "tests/guest/workload/options.h"

namespace vmferry::guest {

// path: the disk (raw) or the file (file mode). index: number of the disk in the log.
// Returns the exit status of the process.
int run_disk_writer(const Options& options, unsigned index, const std::string& path, const LogChannel& log,
                    const volatile std::sig_atomic_t& stop);

}  // namespace vmferry::guest
