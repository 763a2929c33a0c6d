// SPDX-License-Identifier: Apache-2.0
//
// One NBD request on its way through the device: what the client asked, the BlockRequest made of it, and the data.
//
// Owned by the server's pool; lent to one connection from admission to reply. Threads: the server's executor.
#pragma once

#include <memory>
#include <vector>

#include "blockdev/block_device.h"
#include "blockdev/transfer_buffers.h"
#include "netproto/nbd/wire.h"

namespace vmferry {

class NbdConnection;

class NbdOperation final : public BlockCompletion {
 public:
  void block_done(BlockRequest& request, Errno error) noexcept override;

  NbdConnection* connection = nullptr;
  nbd::Request request;
  BlockRequest block;
  TransferBuffer buffer;
  uint64_t charge = 0;  // bytes of the in-flight limits
};

class NbdOperationPool {
 public:
  NbdOperation* take() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<NbdOperation>());
      free_.reserve(all_.size());
      return all_.back().get();
    }
    NbdOperation* operation = free_.back();
    free_.pop_back();
    return operation;
  }
  void give_back(NbdOperation& operation) {
    operation.connection = nullptr;
    operation.buffer.reset();
    free_.push_back(&operation);
  }
  size_t in_use() const { return all_.size() - free_.size(); }

 private:
  std::vector<std::unique_ptr<NbdOperation>> all_;  // as many as were ever in flight at once: bounded by the limits
  std::vector<NbdOperation*> free_;
};

}  // namespace vmferry
