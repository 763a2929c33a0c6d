// SPDX-License-Identifier: Apache-2.0
#include "perf/vhost/driver/blk_queue.h"

#include <poll.h>

#include <algorithm>
#include <cstring>

#include "engine/base/assert.h"

namespace vmferry::perf {

namespace {

uint64_t slot_bytes(uint32_t data_bytes) {
  return 4096 + round_up(std::max(data_bytes, 1U), 4096);
}

}  // namespace

uint64_t BlkQueue::memory_needed(uint16_t slots, uint32_t data_bytes) {
  return slots * slot_bytes(data_bytes);
}

BlkQueue::BlkQueue(Frontend& frontend, uint16_t index, uint16_t slots, uint32_t data_bytes, uint64_t offset)
    : frontend_(frontend), index_(index), slots_(slots), stride_(slot_bytes(data_bytes)), offset_(offset) {
  VF_ASSERT(slots <= frontend.options().queue_size);
  VF_ASSERT(offset + memory_needed(slots, data_bytes) <= frontend.options().data_bytes);
}

bool BlkQueue::add(uint16_t slot, uint32_t type, uint64_t sector, uint32_t bytes, uint32_t piece) {
  uint8_t* const header = frontend_.data() + slot_offset(slot);
  const uint32_t words[2] = {type, 0};
  std::memcpy(header, words, sizeof words);
  std::memcpy(header + 8, &sector, sizeof sector);
  header[virtio::kBlkHeaderSize] = 0xff;  // no status of the specification
  readable_.clear();
  writable_.clear();
  readable_.push_back({frontend_.data_address() + slot_offset(slot), virtio::kBlkHeaderSize});
  const bool from_device = type == virtio::kBlkIn || type == virtio::kBlkGetId;
  for (uint32_t at = 0; at < bytes;) {
    const uint32_t length = piece == 0 ? bytes : std::min(piece, bytes - at);
    (from_device ? writable_ : readable_).push_back({data_address(slot) + at, length});
    at += length;
  }
  writable_.push_back({status_address(slot), 1});
  return frontend_.ring(index_).add(slot, readable_, writable_);
}

void BlkQueue::flush() {
  if (frontend_.ring(index_).publish()) frontend_.kick(index_);
}

std::optional<BlkQueue::Done> BlkQueue::reap() {
  const auto used = frontend_.ring(index_).reap();
  if (!used) return std::nullopt;
  const auto status = static_cast<virtio::BlkStatus>(frontend_.data()[status_offset(used->id)]);
  return Done{used->id, status, used->written};
}

bool BlkQueue::wait(int timeout_ms) {
  if (frontend_.ring(index_).want_calls()) return true;
  pollfd waiting{frontend_.call_fd(index_), POLLIN, 0};
  const int count = ::poll(&waiting, 1, timeout_ms);
  uint64_t counter = 0;
  if (count > 0) [[maybe_unused]]
    const ssize_t ignored = ::read(waiting.fd, &counter, sizeof counter);
  return count > 0;
}

std::optional<BlkQueue::Done> BlkQueue::run(uint32_t type, uint64_t sector, uint32_t bytes, uint32_t piece,
                                            int timeout_ms) {
  if (!add(0, type, sector, bytes, piece)) return std::nullopt;
  flush();
  for (;;) {
    if (auto done = reap()) return done;
    if (!wait(timeout_ms)) return reap();
  }
}

}  // namespace vmferry::perf
