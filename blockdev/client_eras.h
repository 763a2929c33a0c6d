// SPDX-License-Identifier: Apache-2.0
//
// Whose content a client of an export may still see.
//
// A guest that wrote to a volume while this side was primary, and is still connected when the volume becomes the copy
// of another primary, believes in content that is no longer there. It gets errors, never zeroes or the other guest's
// data under its feet. Clients that come as readers of a copy, as the QEMU of an incoming migration, are served. Flow:
// an export takes a stamp when a client begins, and asks before and after each request. Threads: those of the device.
#pragma once

#include <cstdint>

namespace vmferry {

class ClientEras {
 public:
  virtual uint64_t next_client() noexcept = 0;
  virtual bool may_serve(uint64_t client) const noexcept = 0;

 protected:
  ~ClientEras() = default;
};

}  // namespace vmferry
