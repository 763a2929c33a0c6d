// SPDX-License-Identifier: Apache-2.0
//
// A disk with a volatile cache, for power cuts at any moment.
//
// Fault model: a write is in the cache from its completion on and durable after the next flush that was submitted later
// completed; with FUA it is durable itself, and says nothing about earlier ones. A power cut keeps of each 512-byte
// sector the durable content or any one of the versions written since, in flight included: writes are lost, torn
// between sectors and reordered, but a sector is never torn within. The death of the daemon alone loses nothing that
// completed; writes in flight land in whole, in part or not at all. Requests take a random time and complete in any
// order; two overlapping writes in flight land in the order of their completion. Threads: the world's.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <vector>

#include "blockdev/block_device.h"
#include "engine/base/assert.h"
#include "engine/base/bytes.h"
#include "engine/base/hash.h"
#include "tests/sim/sim_world.h"

namespace vmferry::sim {

struct SimDiskTotals {
  uint64_t writes = 0;
  uint64_t flushes = 0;
  uint64_t power_cuts = 0;
  uint64_t lost_sectors = 0;  // a newer version existed at the cut
  uint64_t torn_writes = 0;   // a part of the write's sectors survived
};

class SimDisk final : public BlockDevice {
 public:
  static constexpr uint64_t kSector = 512;

  SimDisk(SimExecutor& executor, uint64_t size, SimDiskTotals* totals = nullptr)
      : executor_(executor),
        totals_(totals != nullptr ? *totals : own_totals_),
        current_(size),
        durable_(size),
        allocated_(div_up(size, kPage)) {
    VF_ASSERT(size % kSector == 0);
    limits_.can_punch = true;
    limits_.can_fast_zero = true;
  }

  ~SimDisk() override { abandon_flights(); }

  uint64_t size() const noexcept override { return current_.size(); }
  const BlockLimits& limits() const noexcept override { return limits_; }

  void submit(BlockRequest& request) noexcept override {
    VF_ASSERT(request.op == BlockOp::Flush || fits_in(request.range.offset, request.range.length, size()));
    Flight flight{
        .request = &request, .copy = request, .id = ++next_flight_, .sequence = sequence_, .data = {}, .error = 0};
    if (on_submit) flight.error = on_submit(request);
    if (request.op == BlockOp::Write) flight.data.assign(request.data, request.data + request.range.length);
    if (request.op == BlockOp::WriteZeroes) flight.data.assign(request.range.length, 0);
    flights_.push_back(std::move(flight));
    executor_.start_timer(delay(), [this, id = next_flight_] { complete(id); });
  }

  void query_extents(ByteRange range, size_t extents_max, ExtentsDone done) override {
    std::vector<Extent> extents;
    for (uint64_t at = range.offset; at < range.end();) {
      const uint64_t end = std::min(range.end(), (at / kPage + 1) * kPage);
      const bool hole = !allocated_[at / kPage];
      if (!extents.empty() && extents.back().hole == hole) {
        extents.back().range.length += end - at;
      } else {
        if (extents.size() == extents_max) break;
        extents.push_back({.range = {at, end - at}, .hole = hole, .zero = hole});
      }
      at = end;
    }
    executor_.post([extents = std::move(extents), done = std::move(done)] { done(extents); });
  }

  void grow(uint64_t size) {
    current_.resize(size);
    durable_.resize(size);
    allocated_.resize(div_up(size, kPage));
  }

  // The power fails: decides what of the unsynced writes survives. The daemon's process is killed by the caller.
  void power_cut() {
    Random& random = executor_.world().random();
    ++totals_.power_cuts;
    land_flights(2);
    // Whole cuts differ in kind: everything lost, everything kept, or sector by sector.
    const uint64_t kind = random.below(4);
    std::map<uint64_t, std::pair<uint64_t, uint64_t>> kept_of_write;  // sequence -> kept, all
    for (auto& [sector, versions] : unsynced_) {
      size_t kept = 0;  // 0: durable content; n: version n - 1
      if (kind == 1) kept = versions.size();
      if (kind >= 2) kept = static_cast<size_t>(random.below(versions.size() + 1));
      if (kept > 0) std::memcpy(&durable_[sector * kSector], versions[kept - 1].data.data(), kSector);
      totals_.lost_sectors += kept < versions.size() ? 1U : 0U;
      for (size_t i = 0; i < versions.size(); ++i) {
        auto& counts = kept_of_write[versions[i].sequence];
        counts.first += i + 1 == kept ? 1U : 0U;
        counts.second += 1;
      }
    }
    for (const auto& [sequence, counts] : kept_of_write) {
      if (counts.first != 0 && counts.first != counts.second) ++totals_.torn_writes;
    }
    unsynced_.clear();
    current_ = durable_;
    refresh_digest();
    refresh_allocated();
  }

  // Only the daemon died: the cache stays, requests in flight may still land.
  void daemon_died() { land_flights(2); }

  // Inspection, beside all requests.
  const Bytes& content() const { return current_; }
  const Bytes& durable_content() const { return durable_; }
  // Of content(), kept up to date: equal for equal contents.
  uint64_t digest() const { return digest_; }
  // For planting damage.
  void poke(uint64_t offset, ByteSpan data) {
    std::memcpy(&current_[offset], data.data(), data.size());
    std::memcpy(&durable_[offset], data.data(), data.size());
    refresh_digest();
    refresh_allocated();
  }
  size_t in_flight() const { return flights_.size(); }

  // Called for each request; the error it returns is that of the request, whose data then lands in part.
  std::function<Errno(const BlockRequest&)> on_submit;
  Nanoseconds delay_max = 500 * kMicrosecond;

 private:
  static constexpr uint64_t kPage = 4096;
  struct Version {
    uint64_t sequence;
    std::array<uint8_t, kSector> data;
  };
  struct Flight {
    BlockRequest* request;  // gone when its process died
    BlockRequest copy;
    uint64_t id;
    uint64_t sequence;  // Flush: covers writes that completed up to here
    Bytes data;
    Errno error;
  };

  Nanoseconds delay() {
    return static_cast<Nanoseconds>(1 + executor_.world().random().below(static_cast<uint64_t>(delay_max)));
  }

  void complete(uint64_t id) {
    const auto found = std::find_if(flights_.begin(), flights_.end(), [id](const Flight& f) { return f.id == id; });
    VF_ASSERT(found != flights_.end());
    Flight flight = std::move(*found);
    flights_.erase(found);
    BlockRequest& request = *flight.request;
    switch (request.op) {
      case BlockOp::Read:
        if (flight.error == 0) std::memcpy(request.data, &current_[request.range.offset], request.range.length);
        break;
      case BlockOp::Write:
      case BlockOp::WriteZeroes:
        ++totals_.writes;
        land(request, flight.data, flight.error == 0 ? 0 : 2);
        if (request.fua && flight.error == 0) make_durable(request.range);
        break;
      case BlockOp::Flush:
        ++totals_.flushes;
        if (flight.error == 0) make_durable_up_to(flight.sequence);
        break;
    }
    request.completion->block_done(request, flight.error);
  }

  // In whole, or, with odds > 1, each sector with a chance of 1 in `odds`.
  void land(const BlockRequest& request, const Bytes& data, uint64_t odds) {
    ++sequence_;
    const uint64_t offset = request.range.offset;
    for (uint64_t at = offset; at < request.range.end();) {
      const uint64_t sector = at / kSector;
      const uint64_t end = std::min(request.range.end(), (sector + 1) * kSector);
      if (odds <= 1 || executor_.world().random().chance(1, odds)) {
        digest_ -= sector_digest(sector);
        std::memcpy(&current_[at], data.data() + (at - offset), end - at);
        digest_ += sector_digest(sector);
        Version version{sequence_, {}};
        std::memcpy(version.data.data(), &current_[sector * kSector], kSector);
        unsynced_[sector].push_back(version);
        // A hole is only made by zeroes that may unmap a whole page.
        const bool punched = request.op == BlockOp::WriteZeroes && request.may_unmap &&
                             request.range.contains({at / kPage * kPage, kPage});
        allocated_[at / kPage] = !punched;
      }
      at = end;
    }
  }

  // 0 for zeroes, as a new disk has them.
  uint64_t sector_digest(uint64_t sector) const {
    static constexpr std::array<uint8_t, kSector> kZeroes{};
    const uint8_t* bytes = &current_[sector * kSector];
    if (std::memcmp(bytes, kZeroes.data(), kSector) == 0) return 0;
    return xxh3_64({bytes, kSector}) * (2 * sector + 1);
  }

  void refresh_digest() {
    digest_ = 0;
    for (uint64_t sector = 0; sector < size() / kSector; ++sector) digest_ += sector_digest(sector);
  }

  void land_flights(uint64_t odds) {
    for (const Flight& flight : flights_) {
      if (is_mutating(flight.copy.op)) land(flight.copy, flight.data, odds);
    }
    abandon_flights();
  }

  // Requests that never complete belong to a process that is gone; kept reachable, or the leak checker would report
  // what a real crash hands back to the kernel.
  void abandon_flights() {
    static auto& abandoned = *new std::vector<BlockRequest*>;  // never destroyed: the check is at the very end
    for (const Flight& flight : flights_) abandoned.push_back(flight.request);
    flights_.clear();
  }

  void make_durable(ByteRange range) {
    for (uint64_t sector = range.offset / kSector; sector * kSector < range.end(); ++sector) {
      std::memcpy(&durable_[sector * kSector], &current_[sector * kSector], kSector);
      unsynced_.erase(sector);
    }
  }

  void make_durable_up_to(uint64_t sequence) {
    for (auto entry = unsynced_.begin(); entry != unsynced_.end();) {
      auto& versions = entry->second;
      size_t covered = 0;
      while (covered < versions.size() && versions[covered].sequence <= sequence) ++covered;
      if (covered > 0) {
        std::memcpy(&durable_[entry->first * kSector], versions[covered - 1].data.data(), kSector);
        versions.erase(versions.begin(), versions.begin() + static_cast<std::ptrdiff_t>(covered));
      }
      entry = versions.empty() ? unsynced_.erase(entry) : std::next(entry);
    }
  }

  // After a cut: a page with content is allocated, a page of zeroes may be either.
  void refresh_allocated() {
    for (size_t page = 0; page < allocated_.size(); ++page) {
      const size_t offset = page * kPage;
      const size_t end = std::min<size_t>(offset + kPage, current_.size());
      if (std::any_of(current_.begin() + static_cast<std::ptrdiff_t>(offset),
                      current_.begin() + static_cast<std::ptrdiff_t>(end), [](uint8_t byte) { return byte != 0; })) {
        allocated_[page] = true;
      }
    }
  }

  SimExecutor& executor_;
  SimDiskTotals own_totals_;
  SimDiskTotals& totals_;
  BlockLimits limits_;
  Bytes current_;
  Bytes durable_;
  uint64_t digest_ = 0;
  std::vector<bool> allocated_;
  std::map<uint64_t, std::vector<Version>> unsynced_;
  std::list<Flight> flights_;
  uint64_t next_flight_ = 0;
  uint64_t sequence_ = 0;
};

}  // namespace vmferry::sim
