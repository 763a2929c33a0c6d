// SPDX-License-Identifier: Apache-2.0
//
// The files behind --nbd-tls-certificates and --nbd-tls-psk, in the layout of QEMU and libnbd.
//
// Flow: read when the daemon starts, and by --check-config. Threads: any; blocks for a moment.
#pragma once

#include <memory>

#include "engine/control/config.h"
#include "netproto/tls/tls_credentials.h"

namespace vmferry {

// nullptr when neither is configured. Denied for a secret that everybody may read.
Result<std::shared_ptr<const TlsCredentials>> load_nbd_credentials(const NbdTlsConfig& config);

}  // namespace vmferry
