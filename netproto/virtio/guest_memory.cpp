// SPDX-License-Identifier: Apache-2.0
#include "netproto/virtio/guest_memory.h"

#include <algorithm>

namespace vmferry::virtio {

bool GuestMemory::add(const GuestRegion& region) {
  if (region.size == 0 || region.host == nullptr || region.size > UINT64_MAX - region.guest_address ||
      region.size > UINT64_MAX - region.user_address)
    return false;
  const ByteRange guest{region.guest_address, region.size};
  const ByteRange user{region.user_address, region.size};
  for (const GuestRegion& other : regions_) {
    if (guest.overlaps({other.guest_address, other.size}) || user.overlaps({other.user_address, other.size}))
      return false;
  }
  const auto place = std::find_if(regions_.begin(), regions_.end(),
                                  [&](const GuestRegion& other) { return other.guest_address > region.guest_address; });
  regions_.insert(place, region);
  return true;
}

const GuestRegion* GuestMemory::region_at_guest(uint64_t address) const {
  for (const GuestRegion& region : regions_)
    if (address >= region.guest_address && address - region.guest_address < region.size) return &region;
  return nullptr;
}

bool GuestMemory::translate(uint64_t address, uint32_t length, std::vector<HostSpan>& out) const {
  if (length == 0) return false;
  const size_t size_before = out.size();
  while (length > 0) {
    const GuestRegion* region = region_at_guest(address);
    if (region == nullptr) {
      out.resize(size_before);
      return false;
    }
    const uint64_t offset = address - region->guest_address;
    const auto piece = static_cast<uint32_t>(std::min<uint64_t>(length, region->size - offset));
    uint8_t* data = region->host + offset;
    if (out.size() > size_before && out.back().data + out.back().length == data) {
      out.back().length += piece;
    } else {
      out.push_back({data, piece, address});
    }
    address += piece;
    length -= piece;
  }
  return true;
}

uint8_t* GuestMemory::at_guest(uint64_t address, uint64_t length) const {
  const GuestRegion* region = region_at_guest(address);
  if (region == nullptr || !fits_in(address - region->guest_address, length, region->size)) return nullptr;
  return region->host + (address - region->guest_address);
}

uint8_t* GuestMemory::at_user(uint64_t address, uint64_t length) const {
  for (const GuestRegion& region : regions_) {
    if (address < region.user_address || address - region.user_address >= region.size) continue;
    const uint64_t offset = address - region.user_address;
    return fits_in(offset, length, region.size) ? region.host + offset : nullptr;
  }
  return nullptr;
}

std::optional<uint64_t> GuestMemory::guest_of_user(uint64_t address) const {
  for (const GuestRegion& region : regions_)
    if (address >= region.user_address && address - region.user_address < region.size)
      return region.guest_address + (address - region.user_address);
  return std::nullopt;
}

}  // namespace vmferry::virtio
