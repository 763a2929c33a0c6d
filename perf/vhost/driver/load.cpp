// SPDX-License-Identifier: Apache-2.0
#include "perf/vhost/driver/load.h"

#include <time.h>

#include <algorithm>
#include <cstring>

namespace vmferry::perf {

namespace {

constexpr int kStallMs = 10'000;  // a request that takes longer is counted as an error

uint64_t now_ns() {
  timespec ts{};
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(ts.tv_nsec);
}

constexpr bool is_random(Pattern pattern) {
  return pattern != Pattern::Read && pattern != Pattern::Write;
}

}  // namespace

Load::Load(BlkQueue& queue, const LoadOptions& options)
    : queue_(queue), options_(options), slots_(options.depth), random_(options.seed * 0x9e3779b97f4a7c15ULL | 1) {
  for (uint16_t i = 0; i < options.depth; ++i) idle_.push_back(i);
  if (options.verify) {
    generations_.resize(options.blocks);
    busy_.resize(options.blocks);
  }
  result_.latency_ns.reserve(1U << 20);
}

uint64_t Load::next_random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_;
}

void Load::fill(uint8_t* data, uint64_t block, uint32_t generation) const {
  const uint64_t number = options_.first_block + block;
  for (uint32_t at = 0; at + 16 <= options_.block_bytes; at += 16) {
    const uint64_t words[2] = {number, uint64_t{generation} << 32 | at};
    std::memcpy(data + at, words, sizeof words);
  }
}

bool Load::matches(const uint8_t* data, uint64_t block) const {
  const uint64_t number = options_.first_block + block;
  for (uint32_t at = 0; at + 16 <= options_.block_bytes; at += 16) {
    const uint64_t words[2] = {number, uint64_t{generations_[block]} << 32 | at};
    if (std::memcmp(data + at, words, sizeof words) != 0) return false;
  }
  return true;
}

bool Load::choose(Slot& slot) {
  for (int attempt = 0; attempt < 64; ++attempt) {
    slot.block = (is_random(options_.pattern) ? next_random() : sequential_++) % options_.blocks;
    slot.write = options_.pattern == Pattern::Write || options_.pattern == Pattern::RandomWrite ||
                 (options_.pattern == Pattern::RandomMixed && next_random() % 2 == 0);
    if (!options_.verify) return true;
    if (busy_[slot.block]) continue;
    busy_[slot.block] = true;
    return true;
  }
  return false;
}

void Load::begin(uint16_t index) {
  const Slot& slot = slots_[index];
  if (slot.write && options_.verify) fill(queue_.data(index), slot.block, ++generations_[slot.block]);
  const uint64_t sector = (options_.first_block + slot.block) * options_.block_bytes / virtio::kSectorSize;
  // A ring always has room: the depth was checked against its size.
  if (!queue_.add(index, slot.write ? virtio::kBlkOut : virtio::kBlkIn, sector, options_.block_bytes)) ++result_.errors;
  slots_[index].started_ns = now_ns();
}

bool Load::finish(const BlkQueue::Done& done) {
  const Slot& slot = slots_[done.slot];
  ++result_.requests;
  if (done.status != virtio::BlkStatus::Ok) ++result_.errors;
  result_.latency_ns.push_back(static_cast<uint32_t>(std::min<uint64_t>(now_ns() - slot.started_ns, UINT32_MAX)));
  if (!options_.verify) return true;
  busy_[slot.block] = false;
  if (slot.write || generations_[slot.block] == 0) return true;
  ++result_.verified;
  if (!matches(queue_.data(done.slot), slot.block)) ++result_.mismatches;
  return true;
}

LoadResult Load::run() {
  const uint64_t start = now_ns();
  const uint64_t end = start + static_cast<uint64_t>(options_.seconds * 1e9);
  for (;;) {
    const bool over = now_ns() >= end;
    while (!over && !idle_.empty() && choose(slots_[idle_.back()])) {
      begin(idle_.back());
      idle_.pop_back();
    }
    queue_.flush();
    if (over && idle_.size() == options_.depth) break;
    bool any = false;
    while (const auto done = queue_.reap()) {
      finish(*done);
      idle_.push_back(done->slot);
      any = true;
    }
    if (any || options_.busy_poll) {
      if (options_.busy_poll && now_ns() > end + uint64_t{kStallMs} * 1'000'000) return ++result_.errors, result_;
      continue;
    }
    if (!queue_.wait(kStallMs)) return ++result_.errors, result_;
  }
  result_.seconds = static_cast<double>(now_ns() - start) / 1e9;
  if (options_.verify) read_all();
  return std::move(result_);
}

// Everything that was ever written, once more.
void Load::read_all() {
  for (uint64_t block = 0; block < options_.blocks; ++block) {
    if (generations_[block] == 0) continue;
    const uint64_t sector = (options_.first_block + block) * options_.block_bytes / virtio::kSectorSize;
    const auto done = queue_.run(virtio::kBlkIn, sector, options_.block_bytes);
    ++result_.verified;
    if (!done || done->status != virtio::BlkStatus::Ok || !matches(queue_.data(0), block)) ++result_.mismatches;
  }
}

}  // namespace vmferry::perf
