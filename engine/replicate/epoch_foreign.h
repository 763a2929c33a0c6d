// SPDX-License-Identifier: Apache-2.0
//
// Does a volume hold data? Asked once, before a first full copy may overwrite it.
//
// Holes are skipped, the rest is read until the first byte that is not zero: a file of zeroes holds no data.
// Threads: the group's executor.
#pragma once

#include <functional>

#include "blockdev/block_device.h"
#include "engine/runtime/executor.h"

namespace vmferry {

// `done(true)` when some byte is not zero. The device must live until then; nothing is called once `alive` says no.
void find_data(BlockDevice& device, Alive::Token alive, std::function<void(Result<bool>)> done);

}  // namespace vmferry
