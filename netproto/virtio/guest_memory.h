// SPDX-License-Identifier: Apache-2.0
//
// A guest's memory as a back-end sees it: regions with guest, user and host addresses, and the only way from one to
// another. Every address that comes from a guest or a front-end passes through here.
//
// Flow: the back-end maps regions and builds a table; rings and requests translate with it. A table never changes: a
// new one replaces it. Threads: immutable after building.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/base/units.h"

namespace vmferry::virtio {

struct GuestRegion {
  uint64_t guest_address = 0;  // physical, in the guest
  uint64_t size = 0;
  uint64_t user_address = 0;  // in the front-end's process: what ring addresses are given in
  uint8_t* host = nullptr;    // here
};

// A run of bytes that lies in one region.
struct HostSpan {
  uint8_t* data = nullptr;
  uint32_t length = 0;
  uint64_t guest_address = 0;
};

class GuestMemory {
 public:
  // False, and nothing is added, when the region is empty, wraps around, or overlaps another one in the guest's or the
  // front-end's addresses.
  [[nodiscard]] bool add(const GuestRegion& region);

  // Appends what [address, address + length) is here: several spans where it crosses adjacent regions, joined where
  // these are adjacent here too. False, with `out` unchanged, when any byte is outside. A length of 0 is outside.
  [[nodiscard]] bool translate(uint64_t address, uint32_t length, std::vector<HostSpan>& out) const;

  // nullptr unless the whole range lies in one region.
  uint8_t* at_guest(uint64_t address, uint64_t length) const;
  uint8_t* at_user(uint64_t address, uint64_t length) const;
  // The guest address of the byte at a user address.
  std::optional<uint64_t> guest_of_user(uint64_t address) const;

  bool empty() const { return regions_.empty(); }
  const std::vector<GuestRegion>& regions() const { return regions_; }
  uint64_t guest_end() const { return regions_.empty() ? 0 : regions_.back().guest_address + regions_.back().size; }

 private:
  const GuestRegion* region_at_guest(uint64_t address) const;
  std::vector<GuestRegion> regions_;  // by guest address
};

}  // namespace vmferry::virtio
