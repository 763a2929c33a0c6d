// SPDX-License-Identifier: Apache-2.0
//
// What the daemon tells Prometheus: volumes, replication, peers. Names are stable (docs/operations.md).
// Threads: the reactor's.
#pragma once

#include <string>

namespace vmferry {

class Daemon;

std::string metrics_text(Daemon& daemon);

}  // namespace vmferry
