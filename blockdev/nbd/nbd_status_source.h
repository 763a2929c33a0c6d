// SPDX-License-Identifier: Apache-2.0
//
// Meta contexts of an export beside base:allocation: facts about ranges that the device below the export does not know.
//
// Flow: the handshake offers contexts(), BLOCK_STATUS asks status(). Implemented by engine/daemon.
// Threads: the server's executor; answers at once, from memory.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "engine/base/units.h"
#include "netproto/nbd/transmission.h"

namespace vmferry {

class NbdStatusSource {
 public:
  // Names as of now, "namespace:leaf", at most nbd::kExtraContextsMax.
  virtual std::vector<std::string> contexts() const = 0;

  // Appends runs from range.offset on, without a gap, neighbours with different flags, at most `runs_max`; they may end
  // before the range does, or beyond it. False when there is no such context (any more): the request fails.
  virtual bool status(std::string_view context, ByteRange range, size_t runs_max,
                      std::vector<nbd::StatusDescriptor>& runs) const = 0;

 protected:
  ~NbdStatusSource() = default;
};

}  // namespace vmferry
