// SPDX-License-Identifier: Apache-2.0
//
// Meta contexts vmferry:dirty-PEER and vmferry:epoch of a volume's NBD export: what changed, for backup tools.
//
// Source of truth: docs/nbd.md, "Contexts of our own". Threads: the volume's executor.
#pragma once

#include <functional>
#include <string>

#include "blockdev/nbd/nbd_status_source.h"
#include "engine/track/tracked_device.h"

namespace vmferry {

class DirtyContexts final : public NbdStatusSource {
 public:
  // The device's peer now, as we call it; "" when it has none.
  using PeerName = std::function<std::string()>;

  DirtyContexts(const TrackedDevice& device, PeerName peer) : device_(device), peer_(std::move(peer)) {}

  std::vector<std::string> contexts() const override;
  bool status(std::string_view context, ByteRange range, size_t runs_max,
              std::vector<nbd::StatusDescriptor>& runs) const override;

 private:
  const TrackedDevice& device_;
  const PeerName peer_;
};

}  // namespace vmferry
