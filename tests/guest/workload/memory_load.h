// SPDX-License-Identifier: Apache-2.0
//
// Dirties memory at a rate and notices when a page is not what it was written as.
//
// Each page holds its number, a generation and a checksum; the generations are also kept apart from the pages, so
// that a page that a migration left behind in an older, well-formed state is found too. A page is verified before
// each change, all of them when asked (SIGUSR1) and at the end.
// Load: 70 % of the touches in a hot fifth; 25 % rewrite the whole page with 60 % text and 40 % noise, the others
// change 256 bytes.
#pragma once

#include <csignal>

#include "tests/guest/workload/log_channel.h"
#include "tests/guest/workload/options.h"

namespace vmferry::guest {

// verify: set by a signal handler, cleared here after the verification of all pages. Returns the exit status.
int run_memory_load(const Options& options, const LogChannel& log, const volatile std::sig_atomic_t& stop,
                    volatile std::sig_atomic_t& verify);

}  // namespace vmferry::guest
