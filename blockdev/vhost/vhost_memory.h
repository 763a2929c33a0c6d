// SPDX-License-Identifier: Apache-2.0
//
// A guest's memory, mapped: what SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG build.
//
// A table never changes; the session puts a new one in its place, and requests in flight keep the one they were read
// with. Threads: built and used on one reactor.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/runtime/shared_mapping.h"
#include "engine/runtime/unique_fd.h"
#include "netproto/vhost/message.h"
#include "netproto/virtio/guest_memory.h"

namespace vmferry {

class VhostMemory {
 public:
  using Ptr = std::shared_ptr<const VhostMemory>;

  // `fds[i]` belongs to `regions[i]`. Mismatch for overlapping regions or files that are too short.
  static Result<Ptr> create(std::span<const vhost::MemoryRegion> regions, std::span<const UniqueFd> fds);
  Result<Ptr> with(const vhost::MemoryRegion& region, const UniqueFd& fd) const;
  Result<Ptr> without(const vhost::MemoryRegion& region) const;  // NotFound when it is not there

  const virtio::GuestMemory& table() const { return table_; }
  bool damaged() const;  // the front-end took memory away from under us

 private:
  struct Region {
    vhost::MemoryRegion region;
    std::shared_ptr<const SharedMapping> mapping;
  };
  Status add(Region region);

  std::vector<Region> regions_;
  virtio::GuestMemory table_;
};

}  // namespace vmferry
