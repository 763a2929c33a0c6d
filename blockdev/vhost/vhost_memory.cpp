// SPDX-License-Identifier: Apache-2.0
#include "blockdev/vhost/vhost_memory.h"

#include <algorithm>

#include "engine/base/assert.h"

namespace vmferry {

Status VhostMemory::add(Region region) {
  const vhost::MemoryRegion& what = region.region;
  if (!table_.add({what.guest_address, what.size, what.user_address, region.mapping->data()}))
    return fail(ErrorKind::Mismatch, "memory region at {:#x} of {} bytes overlaps another one", what.guest_address,
                what.size);
  regions_.push_back(std::move(region));
  return {};
}

Result<VhostMemory::Ptr> VhostMemory::create(std::span<const vhost::MemoryRegion> regions,
                                             std::span<const UniqueFd> fds) {
  VF_ASSERT(regions.size() == fds.size());
  Ptr memory = std::make_shared<VhostMemory>();
  for (size_t i = 0; i < regions.size(); ++i) {
    auto next = memory->with(regions[i], fds[i]);
    if (!next) return next;
    memory = std::move(*next);
  }
  return memory;
}

Result<VhostMemory::Ptr> VhostMemory::with(const vhost::MemoryRegion& region, const UniqueFd& fd) const {
  auto mapping = SharedMapping::map(fd.get(), region.mmap_offset, region.size);
  if (!mapping) return fail_with(mapping.error(), "memory region");
  auto next = std::make_shared<VhostMemory>(*this);
  if (Status added = next->add({region, std::make_shared<const SharedMapping>(std::move(*mapping))}); !added)
    return tl::unexpected(added.error());
  return Ptr(std::move(next));
}

Result<VhostMemory::Ptr> VhostMemory::without(const vhost::MemoryRegion& region) const {
  auto next = std::make_shared<VhostMemory>();
  bool found = false;
  for (const Region& known : regions_) {
    if (known.region.guest_address == region.guest_address && known.region.user_address == region.user_address &&
        known.region.size == region.size) {
      found = true;
      continue;
    }
    if (Status added = next->add(known); !added) return tl::unexpected(added.error());
  }
  if (!found)
    return fail(ErrorKind::NotFound, "no memory region at {:#x} of {} bytes", region.guest_address, region.size);
  return Ptr(std::move(next));
}

bool VhostMemory::damaged() const {
  return std::any_of(regions_.begin(), regions_.end(), [](const Region& region) { return region.mapping->damaged(); });
}

}  // namespace vmferry
