// SPDX-License-Identifier: Apache-2.0
//
// Fuzz target of the virtqueues: a driver that mostly keeps the rules, restarts of the device, damaged regions.
//
// The input is a script of two-byte steps. Descriptors written by it mostly point into the memory and to the next
// descriptor, because a chain that is refused at its first field tests nothing behind it; one step in eight is free.
// Whatever comes, a taken chain is bounded, a broken queue stays broken, and nothing outside the memory is touched.
#include <cstring>
#include <memory>
#include <optional>

#include "netproto/virtio/virtqueue.h"
#include "tests/fuzz/require.h"

namespace {

using namespace vmferry;
using namespace vmferry::virtio;

constexpr uint64_t kGuest = 0x10000;
constexpr uint64_t kSize = 16_KiB;
constexpr uint64_t kTables = 4_KiB;  // indirect tables lie here

class Script {
 public:
  Script(const uint8_t* data, size_t size) : data_(data), size_(size) {
    const uint8_t shape = byte();
    options_ = {(shape & 1) != 0, (shape & 2) != 0, (shape & 4) != 0};
    queue_size_ = static_cast<uint16_t>(1U << (1 + (shape >> 3 & 3)));
    const RingSizes sizes = ring_sizes(options_.packed, queue_size_);
    // Exactly as large as they are, so that the sanitizer sees one byte too far.
    memory_.reset(new (std::align_val_t(64)) uint8_t[kSize]());
    ring_ = {queue_size_, memory_.get(), memory_.get() + round_up(sizes.descriptors, 64),
             memory_.get() + round_up(sizes.descriptors, 64) + round_up(sizes.driver, 64)};
    require(table_.add({kGuest, kSize, 0x7000000, memory_.get()}));
    if ((shape & 0x20) != 0) inflight_.resize(inflight_size(options_.packed, queue_size_) / 8);
    restart();
  }

  void run() {
    while (at_ < size_) {
      const uint8_t step = byte();
      const uint8_t value = byte();
      switch (step & 7) {
        case 0:
        case 1:
          write_descriptor(step, value);
          break;
        case 2:
          make_available(value);
          break;
        case 3:
          take();
          break;
        case 4:
          if (!taken_.empty()) {
            queue_->put(taken_[value % taken_.size()], value);
            taken_.erase(taken_.begin() + value % static_cast<ptrdiff_t>(taken_.size()));
            ++unpublished_;
          }
          break;
        case 5:
          (void)queue_->publish();
          unpublished_ = 0;
          if ((value & 1) != 0) (void)queue_->want_notifications();
          if ((value & 2) != 0) queue_->stop_notifications();
          break;
        case 6:
          if (value < 200 || inflight_.empty()) {
            restart();
          } else {
            reinterpret_cast<uint8_t*>(inflight_.data())[(size_t{step} << 8 | byte()) % (inflight_.size() * 8)] =
                byte();
          }
          break;
        case 7:
          memory_.get()[(size_t{value} << 4 | step >> 3) % kSize] = byte();
          break;
      }
    }
    while (take()) {
    }
  }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }

  void restart() {
    const uint32_t base = options_.packed ? 0x80008000U : 0U;
    MutableByteSpan region;
    if (!inflight_.empty()) region = {reinterpret_cast<uint8_t*>(inflight_.data()), inflight_.size() * 8};
    queue_ = Virtqueue::create(ring_, options_, base, table_, region);
    taken_.clear();
    unpublished_ = 0;
  }

  bool take() {
    // As VhostQueue bounds it.
    if (taken_.size() + unpublished_ >= queue_size_) return false;
    Chain chain;
    const bool broken = queue_->fault() != ChainFault::None;
    const auto result = queue_->take(chain);
    require(!broken || result == Virtqueue::Take::Broken);
    if (result != Virtqueue::Take::Taken) return false;
    require(chain.readable.size() + chain.writable.size() <= kChainLengthMax);
    require(chain.id < queue_size_ && chain.slots <= queue_size_ && chain.slots > 0);
    for (const Buffer& buffer : chain.readable) {
      std::vector<HostSpan> spans;
      if (!table_.translate(buffer.address, buffer.length, spans)) continue;
      for (const HostSpan& span : spans)
        require(span.data >= memory_.get() && span.data + span.length <= memory_.get() + kSize);
    }
    taken_.push_back(std::move(chain));
    return true;
  }

  void write_descriptor(uint8_t step, uint8_t value) {
    const bool in_table = (step & 1) != 0;
    const uint16_t entry = value % 16;
    uint8_t* at =
        in_table ? memory_.get() + kTables + 16 * (value % 64) : ring_.descriptors + 16 * (entry % queue_size_);
    uint64_t address = kGuest + 8_KiB + uint64_t{value} * 16;
    uint32_t length = 16U * (1 + (step >> 3 & 7));
    uint16_t flags = static_cast<uint16_t>(byte() & 7);
    auto next = static_cast<uint16_t>((entry + 1) % queue_size_);
    if (!in_table && (flags & 4) != 0) address = kGuest + kTables;
    if (step >> 6 == 3) {  // free: anything
      address = uint64_t{byte()} << 56 | uint64_t{byte()} << 12 | byte();
      length = uint32_t{byte()} << 24 | byte();
      next = static_cast<uint16_t>(byte() << 8 | byte());
    }
    if (options_.packed) {
      flags = static_cast<uint16_t>(flags | (byte() & 1) << 7 | (byte() & 1) << 15);
      std::swap(flags, next);
    }
    store_shared(at, address);
    store_shared(at + 8, length);
    store_shared(at + 12, flags);
    store_shared(at + 14, next);
  }

  void make_available(uint8_t value) {
    if (options_.packed) {  // the flags of an entry, for the wrap that is due
      uint8_t* flags = ring_.descriptors + 16 * (value % queue_size_) + 14;
      store_shared(flags, static_cast<uint16_t>((load_shared<uint16_t>(flags) & 7) | (value & 0x80 ? 0x8000 : 0x80)));
      return;
    }
    store_shared(ring_.driver + 4 + 2 * (available_ & (queue_size_ - 1)),
                 static_cast<uint16_t>(value > 250 ? value : value % queue_size_));
    available_ = static_cast<uint16_t>(available_ + (value == 255 ? 100 : 1));
    store_shared(ring_.driver + 2, available_);
  }

  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  RingOptions options_;
  uint16_t queue_size_ = 0;
  std::unique_ptr<uint8_t[], Free> memory_;
  RingMemory ring_;
  GuestMemory table_;
  std::vector<uint64_t> inflight_;
  std::unique_ptr<Virtqueue> queue_;
  std::vector<Chain> taken_;
  size_t unpublished_ = 0;
  uint16_t available_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 4096) return 0;
  Script(data, size).run();
  return 0;
}
