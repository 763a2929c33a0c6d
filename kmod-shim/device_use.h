// SPDX-License-Identifier: Apache-2.0
//
// Who uses a block device: asked before it is taken away.
//
// Threads: blocks, and may wait for I/O on the device (opening one reads its partition table): never from the thread
// that serves it.
#pragma once

#include <string>

#include "engine/base/result.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

// Claims "/dev/NAME" for as long as the descriptor is open, so that nobody mounts it meanwhile, and has written what
// the page cache held for it. Busy, with who uses it, when it is mounted, is part of another device, or some program
// has it or one of its partitions open.
Result<UniqueFd> claim_unused_device(const std::string& device);

}  // namespace vmferry
