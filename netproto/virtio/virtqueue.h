// SPDX-License-Identifier: Apache-2.0
//
// The device's side of one virtqueue, split or packed: takes chains of buffers from the driver, gives them back.
//
// Flow: take() until Empty; later, in any order, put(); publish() makes a batch of puts visible and says whether the
// driver wants to be told. A region for requests in flight (vhost-user.rst "Inflight I/O tracking"), when given, is
// kept on the way, so that the next back-end finds what this one had not finished; take() gives those first, in
// their order. Source of truth: virtio 1.2, 2.7 and 2.8.
// Everything in the ring and in the region is hostile: it is read once, checked, and used from the copy (I11).
// A structural lie (a loop, an index outside the ring) gives Broken: the queue cannot go on, because what the driver
// meant by anything that follows is unknown. Threads: one owner; the driver writes at the same time.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "engine/base/bytes.h"
#include "netproto/virtio/dirty_log.h"
#include "netproto/virtio/guest_memory.h"

namespace vmferry::virtio {

inline constexpr uint16_t kQueueSizeMax = 1024;
// Buffers of one chain, indirect ones included. More than SEG_MAX + 2, so that a chain slightly too long is answered
// with an error instead of stopping the queue.
inline constexpr size_t kChainLengthMax = 1024;

struct Buffer {
  uint64_t address = 0;  // guest's
  uint32_t length = 0;
};

struct Chain {
  std::vector<Buffer> readable;  // by the device
  std::vector<Buffer> writable;
  uint16_t id = 0;     // split: index of the head; packed: buffer id
  uint16_t slots = 1;  // packed: descriptors that it takes in the ring
  uint16_t state = 0;  // packed: its head entry in the in-flight region
  void clear() {
    readable.clear();
    writable.clear();
  }
};

enum class ChainFault : uint8_t {
  None,
  RingIndex,           // the driver's index is further ahead than the ring is long
  DescriptorIndex,     // outside the table
  Loop,                // longer than its table
  TooLong,             // more than kChainLengthMax
  IndirectNotAgreed,   //
  IndirectInIndirect,  //
  IndirectChained,     // an indirect descriptor with NEXT (split)
  IndirectTable,       // no multiple of 16 bytes, empty, too long, or outside the guest's memory
  ReadableAfterWritable,
  RegionDamaged,  // the in-flight region contradicts itself
};
std::string_view to_string(ChainFault fault) noexcept;

// Where the three parts of a ring are, here. Split: descriptor table, available ring, used ring. Packed: descriptor
// ring, driver event suppression, device event suppression.
struct RingMemory {
  uint16_t size = 0;
  uint8_t* descriptors = nullptr;
  uint8_t* driver = nullptr;
  uint8_t* device = nullptr;
};
struct RingOptions {
  bool packed = false;
  bool indirect = false;
  bool event_idx = false;
};
struct RingSizes {
  uint64_t descriptors = 0;
  uint64_t driver = 0;
  uint64_t device = 0;
};
RingSizes ring_sizes(bool packed, uint16_t size) noexcept;
// Required alignment of each part, bytes.
RingSizes ring_alignments(bool packed) noexcept;
// 1..kQueueSizeMax; a split ring's size is a power of two.
bool valid_queue_size(bool packed, uint32_t size) noexcept;
// Bytes of one queue's part of the in-flight region.
uint64_t inflight_size(bool packed, uint16_t size) noexcept;

// Where writes to the ring are logged while a migration runs. Addresses are the guest's.
struct RingLog {
  const DirtyLog* log = nullptr;
  uint64_t device = 0;       // of RingMemory::device
  uint64_t descriptors = 0;  // packed: of the descriptor ring, which the device writes too
};

class Virtqueue {
 public:
  enum class Take : uint8_t { Empty, Taken, Broken };

  // `base` as in SET_VRING_BASE. `inflight`: inflight_size() bytes, 8-aligned, or empty. Addresses in `ring` are
  // aligned and inside guest memory; `memory` and `inflight` outlive this.
  static std::unique_ptr<Virtqueue> create(const RingMemory& ring, const RingOptions& options, uint32_t base,
                                           const GuestMemory& memory, MutableByteSpan inflight);
  virtual ~Virtqueue() = default;

  virtual Take take(Chain& chain) = 0;
  // `written`: bytes that the device wrote into the chain. At most `size` chains between two publish().
  virtual void put(const Chain& chain, uint32_t written) = 0;
  // True when the driver asked to be notified of what was put since the last call.
  [[nodiscard]] virtual bool publish() = 0;

  // Asks the driver not to notify us, where it listens to that.
  virtual void stop_notifications() = 0;
  // Asks for a notification of the next chain. True when there is one already: look again instead of waiting.
  [[nodiscard]] virtual bool want_notifications() = 0;

  // For GET_VRING_BASE, with nothing in flight.
  virtual uint32_t base() const = 0;

  // After a change of the memory table: the same ring at new host addresses.
  void move(const RingMemory& ring, const GuestMemory& memory) {
    ring_ = ring;
    memory_ = &memory;
  }
  void set_log(const RingLog& log) { log_ = log; }
  // Marks the whole of what the device writes: for the moment in which logging begins.
  void log_all();
  bool log_failed() const { return log_failed_; }  // something lay beyond the log
  ChainFault fault() const { return fault_; }
  uint16_t size() const { return ring_.size; }

 protected:
  struct Descriptor {
    uint64_t address = 0;
    uint32_t length = 0;
    uint16_t flags = 0;
    uint16_t link = 0;  // split: next; packed: buffer id
  };
  static constexpr size_t kDescriptorSize = 16;
  static constexpr uint16_t kNext = 1;
  static constexpr uint16_t kWrite = 2;
  static constexpr uint16_t kIndirect = 4;

  Virtqueue(const RingMemory& ring, const RingOptions& options, const GuestMemory& memory)
      : ring_(ring), options_(options), memory_(&memory) {}

  bool add_buffer(Chain& chain, const Descriptor& descriptor);
  // Copies the table that `descriptor` names into `table`; its length in entries, 0 after a fault.
  size_t read_indirect(const Descriptor& descriptor, std::vector<Descriptor>& table);
  bool failed(ChainFault fault) {
    fault_ = fault;
    return false;
  }
  void log_device(uint64_t offset, uint64_t length) { log(log_.device + offset, length); }
  void log_descriptors(uint64_t offset, uint64_t length) { log(log_.descriptors + offset, length); }
  void log(uint64_t address, uint64_t length) {
    if (log_.log != nullptr && !log_.log->mark(address, length)) log_failed_ = true;
  }

  RingMemory ring_;
  RingOptions options_;
  const GuestMemory* memory_;
  RingLog log_;
  bool log_failed_ = false;
  ChainFault fault_ = ChainFault::None;
  std::vector<Descriptor> indirect_;  // reused
  std::vector<HostSpan> spans_;       // reused
};

// Ring memory is shared with the guest: single accesses, no tearing, stated order.
template <typename T>
T load_shared(const uint8_t* at, std::memory_order order = std::memory_order_relaxed) {
  return std::atomic_ref<T>(*reinterpret_cast<T*>(const_cast<uint8_t*>(at))).load(order);
}
template <typename T>
void store_shared(uint8_t* at, T value, std::memory_order order = std::memory_order_relaxed) {
  std::atomic_ref<T>(*reinterpret_cast<T*>(at)).store(value, order);
}
// virtio 1.2, 2.7.7.1: whether `event` lies in (before, now].
constexpr bool event_passed(uint16_t event, uint16_t now, uint16_t before) {
  return static_cast<uint16_t>(now - event - 1) < static_cast<uint16_t>(now - before);
}

}  // namespace vmferry::virtio
