// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/dirty_contexts.h"

#include <algorithm>

namespace vmferry {

namespace {

constexpr std::string_view kEpoch = "vmferry:epoch";
constexpr std::string_view kDirtyPrefix = "vmferry:dirty-";
constexpr uint32_t kDirty = 1;
// Looked at for one answer, so that the data path never waits for a walk over terabytes; clients ask on.
constexpr uint64_t kWalkMax = 64_GiB;

}  // namespace

std::vector<std::string> DirtyContexts::contexts() const {
  // Without tracking nothing is known: a map without dirty blocks would say "nothing changed".
  const std::string peer = peer_();
  if (!device_.tracking() || peer.empty()) return {};
  return {std::string(kDirtyPrefix) + peer, std::string(kEpoch)};
}

bool DirtyContexts::status(std::string_view context, ByteRange range, size_t runs_max,
                           std::vector<nbd::StatusDescriptor>& runs) const {
  const std::vector<std::string> known = contexts();
  if (std::find(known.begin(), known.end(), context) == known.end()) return false;
  range.length = std::min(range.length, kWalkMax);
  std::vector<ByteRange> dirty;
  device_.collect_dirty(context == kEpoch ? DirtySet::OpenEpoch : DirtySet::Unacknowledged, range, runs_max, dirty);
  uint64_t at = range.offset;
  const auto add = [&](uint64_t end, uint32_t flags) {
    if (end > at && runs.size() < runs_max) runs.push_back({end - at, flags});
    at = end;
  };
  for (const ByteRange& run : dirty) {
    add(run.offset, 0);
    add(run.end(), kDirty);
  }
  // With the walk cut short by runs_max, what comes behind the last run is not known to be clean.
  if (dirty.size() < runs_max) add(range.end(), 0);
  return true;
}

}  // namespace vmferry
