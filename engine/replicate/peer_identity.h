// SPDX-License-Identifier: Apache-2.0
//
// Where the daemon's key lives: one PEM file in the state directory, mode 0600, made once. Losing it means pairing
// again with every peer; copying it means two daemons with one identity.
// Threads: blocks on the disk; called once at start.
#pragma once

#include <string>

#include "engine/base/id.h"
#include "netproto/tls/tls_identity.h"

namespace vmferry {

// Reads the key, or makes it durable when the file does not exist. A file that others may read is refused.
Result<TlsIdentity> load_or_create_identity(const std::string& path);

// The node's id in Hello: the first half of its key's hash, so it lives exactly as long as the key.
Id128 node_id_of(const KeyHash& key_hash);

}  // namespace vmferry
