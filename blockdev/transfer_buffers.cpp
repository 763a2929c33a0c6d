// SPDX-License-Identifier: Apache-2.0
#include "blockdev/transfer_buffers.h"

#include <bit>
#include <cstdlib>

#include "engine/base/assert.h"

namespace vmferry {

TransferBuffers::~TransferBuffers() {
  VF_ASSERT(in_use_ == 0);
  for (const std::vector<uint8_t*>& list : free_)
    for (uint8_t* data : list) std::free(data - kHeadroom);
}

TransferBuffer TransferBuffers::take(size_t size) {
  VF_ASSERT(size > 0 && size <= kSizeMax);
  const auto size_class = static_cast<unsigned>(std::countr_zero(std::bit_ceil((size + kSizeMin - 1) / kSizeMin)));
  std::vector<uint8_t*>& list = free_[size_class];
  uint8_t* data = nullptr;
  if (!list.empty()) {
    data = list.back();
    list.pop_back();
    cached_bytes_ -= class_size(size_class);
  } else {
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, kHeadroom + class_size(size_class)));
    if (memory == nullptr) return {};
    data = memory + kHeadroom;
  }
  ++in_use_;
  return {this, data, size_class};
}

void TransferBuffers::give_back(uint8_t* data, unsigned size_class) {
  --in_use_;
  if (cached_bytes_ + class_size(size_class) > cached_bytes_max_) return std::free(data - kHeadroom);
  cached_bytes_ += class_size(size_class);
  free_[size_class].push_back(data);
}

}  // namespace vmferry
