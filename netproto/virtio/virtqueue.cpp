// SPDX-License-Identifier: Apache-2.0
#include "netproto/virtio/virtqueue.h"

#include <bit>

#include "netproto/virtio/packed_ring.h"
#include "netproto/virtio/split_ring.h"

namespace vmferry::virtio {

static_assert(std::endian::native == std::endian::little, "rings are read in place");

std::string_view to_string(ChainFault fault) noexcept {
  switch (fault) {
    case ChainFault::None:
      return "none";
    case ChainFault::RingIndex:
      return "available index beyond the ring";
    case ChainFault::DescriptorIndex:
      return "descriptor index outside the table";
    case ChainFault::Loop:
      return "descriptors form a loop";
    case ChainFault::TooLong:
      return "too many descriptors";
    case ChainFault::IndirectNotAgreed:
      return "indirect descriptor without the feature";
    case ChainFault::IndirectInIndirect:
      return "indirect descriptor inside an indirect table";
    case ChainFault::IndirectChained:
      return "indirect descriptor that goes on";
    case ChainFault::IndirectTable:
      return "indirect table of a wrong size or outside the memory";
    case ChainFault::ReadableAfterWritable:
      return "readable buffer after a writable one";
    case ChainFault::RegionDamaged:
      return "in-flight region is damaged";
  }
  return "unknown";
}

RingSizes ring_sizes(bool packed, uint16_t size) noexcept {
  const uint64_t count = size;
  if (packed) return {16 * count, 4, 4};
  return {16 * count, 6 + 2 * count, 6 + 8 * count};
}

RingSizes ring_alignments(bool packed) noexcept {
  if (packed) return {16, 4, 4};
  return {16, 2, 4};
}

bool valid_queue_size(bool packed, uint32_t size) noexcept {
  return size > 0 && size <= kQueueSizeMax && (packed || std::has_single_bit(size));
}

uint64_t inflight_size(bool packed, uint16_t size) noexcept {
  return packed ? PackedInflight::size(size) : SplitInflight::size(size);
}

std::unique_ptr<Virtqueue> Virtqueue::create(const RingMemory& ring, const RingOptions& options, uint32_t base,
                                             const GuestMemory& memory, MutableByteSpan inflight) {
  if (options.packed) return std::make_unique<PackedRing>(ring, options, base, memory, inflight);
  return std::make_unique<SplitRing>(ring, options, base, memory, inflight);
}

void Virtqueue::log_all() {
  const RingSizes sizes = ring_sizes(options_.packed, ring_.size);
  log_device(0, sizes.device);
  if (options_.packed) log_descriptors(0, sizes.descriptors);
}

bool Virtqueue::add_buffer(Chain& chain, const Descriptor& descriptor) {
  if (chain.readable.size() + chain.writable.size() >= kChainLengthMax) return failed(ChainFault::TooLong);
  if ((descriptor.flags & kWrite) != 0) {
    chain.writable.push_back({descriptor.address, descriptor.length});
    return true;
  }
  if (!chain.writable.empty()) return failed(ChainFault::ReadableAfterWritable);
  chain.readable.push_back({descriptor.address, descriptor.length});
  return true;
}

size_t Virtqueue::read_indirect(const Descriptor& descriptor, std::vector<Descriptor>& table) {
  if (!options_.indirect) return failed(ChainFault::IndirectNotAgreed), 0;
  const size_t count = descriptor.length / kDescriptorSize;
  if (count == 0 || descriptor.length % kDescriptorSize != 0 || count > kChainLengthMax)
    return failed(ChainFault::IndirectTable), 0;
  std::vector<HostSpan>& spans = spans_;
  spans.clear();
  if (!memory_->translate(descriptor.address, descriptor.length, spans)) return failed(ChainFault::IndirectTable), 0;
  table.resize(count);
  static_assert(sizeof(Descriptor) == kDescriptorSize);
  auto* target = reinterpret_cast<uint8_t*>(table.data());
  for (const HostSpan& span : spans) {
    std::memcpy(target, span.data, span.length);
    target += span.length;
  }
  return count;
}

}  // namespace vmferry::virtio
