// SPDX-License-Identifier: Apache-2.0
#include "blockdev/block_device.h"

#include <memory>

namespace vmferry {

namespace {

class ClosureRequest final : public BlockCompletion {
 public:
  static void submit(BlockDevice& device, BlockRequest request, BlockDone done) {
    auto* self = new ClosureRequest(request, std::move(done));
    self->request_.completion = self;
    device.submit(self->request_);
  }
  void block_done(BlockRequest&, Errno error) noexcept override {
    const std::unique_ptr<ClosureRequest> self(this);
    done_(error);
  }

 private:
  ClosureRequest(BlockRequest request, BlockDone done) : request_(request), done_(std::move(done)) {}
  BlockRequest request_;
  BlockDone done_;
};

}  // namespace

void read_block(BlockDevice& device, uint64_t offset, uint8_t* data, uint64_t length, BlockDone done) {
  ClosureRequest::submit(device, {.op = BlockOp::Read, .range = {offset, length}, .data = data}, std::move(done));
}

void write_block(BlockDevice& device, uint64_t offset, const uint8_t* data, uint64_t length, bool fua, BlockDone done) {
  // The interface has one pointer for both directions; layers do not write through it for BlockOp::Write.
  ClosureRequest::submit(
      device, {.op = BlockOp::Write, .fua = fua, .range = {offset, length}, .data = const_cast<uint8_t*>(data)},
      std::move(done));
}

void zero_block(BlockDevice& device, ByteRange range, bool may_unmap, BlockDone done) {
  ClosureRequest::submit(device, {.op = BlockOp::WriteZeroes, .may_unmap = may_unmap, .range = range}, std::move(done));
}

void flush_block(BlockDevice& device, BlockDone done) {
  ClosureRequest::submit(device, {.op = BlockOp::Flush}, std::move(done));
}

}  // namespace vmferry
