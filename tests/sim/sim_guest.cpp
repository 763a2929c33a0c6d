// SPDX-License-Identifier: Apache-2.0
//
// The guest inside of a QemuProcess: writes, zeroes, flushes and reads back all the time, and checks what it finds.
#include <algorithm>

#include "engine/base/log.h"
#include "tests/sim/host.h"
#include "tests/sim/oracle.h"
#include "tests/sim/sim_qemu.h"

namespace vmferry::sim {

namespace {

constexpr size_t kOutstandingMax = 6;
constexpr uint64_t kCheckSectors = 256;  // per read of the check of the whole disk

}  // namespace

void QemuProcess::guest_tick() {
  if (!guest_runs()) {
    ticking_ = false;
    return;
  }
  ++memory_;
  oracle_.guest_stepped(host_, memory_);
  Random& random = executor_.world().random();
  if (outstanding_.size() < kOutstandingMax && check_left_ == 0) {
    const uint64_t dice = random.below(100);
    if (dice < 60) {
      guest_write(false);
    } else if (dice < 70) {
      guest_write(true);
    } else if (dice < 80) {
      guest_flush();
    } else {
      guest_read();
    }
  }
  executor_.start_timer(static_cast<Nanoseconds>(1 + random.below(8)) * kMillisecond, [this] { guest_tick(); });
}

// A range of sectors that no request in flight touches.
std::optional<std::pair<uint64_t, uint64_t>> QemuProcess::free_range(size_t volume, uint64_t count_max) {
  Random& random = executor_.world().random();
  const uint64_t sectors = oracle_.disks(host_)[volume].sector_count() - kReservedSectors;
  // Half of the requests go to a hot eighth.
  const uint64_t area = random.chance(1, 2) ? sectors / 8 : sectors;
  const uint64_t count = 1 + random.below(std::min(count_max, area / 2));
  const uint64_t first = random.below(area - count);
  for (const DiskRequest* request : outstanding_) {
    if (request->volume != volume || request->request.op == BlockOp::Flush) continue;
    const uint64_t other = request->request.range.length / DiskModel::kSector;
    if (first < request->first + other && request->first < first + count) return std::nullopt;
  }
  return std::pair(first, count);
}

void QemuProcess::submit(std::unique_ptr<DiskRequest> request) {
  if (request->request.op != BlockOp::Flush) {
    request->first = request->request.range.offset / DiskModel::kSector;
  }
  request->reply_to = &executor_;
  outstanding_.push_back(request.get());
  const auto answer = std::move(request->answer);
  request->answer = [this, answer](DiskRequest& done, Errno error) {
    answer(done, error);
    std::erase(outstanding_, &done);
    if (!outstanding_.empty()) return;
    for (auto& waiter : std::exchange(drain_waiters_, {})) executor_.post(std::move(waiter));
  };
  host_.submit(std::move(request));
}

void QemuProcess::guest_write(bool zeroes) {
  Random& random = executor_.world().random();
  const size_t volume = static_cast<size_t>(random.below(oracle_.disks(host_).size()));
  const auto range = free_range(volume, zeroes ? 64 : 16);
  if (!range) return;
  DiskModel& model = oracle_.disks(host_)[volume];
  auto request = std::make_unique<DiskRequest>();
  request->volume = volume;
  request->versions.assign(range->second, 0);
  request->request.op = zeroes ? BlockOp::WriteZeroes : BlockOp::Write;
  request->request.fua = random.chance(1, 16);
  request->request.may_unmap = zeroes && random.chance(1, 2);
  request->request.range = {range->first * DiskModel::kSector, range->second * DiskModel::kSector};
  if (!zeroes) {
    request->data.resize(request->request.range.length);
    const uint64_t same = model.next_version();
    const bool repeated = random.chance(1, 4);  // equal blocks, for references
    for (uint64_t i = 0; i < range->second; ++i) {
      request->versions[i] = repeated ? 1 + same % DiskModel::kRepeated : i == 0 ? same : model.next_version();
      DiskModel::fill(request->versions[i], &request->data[i * DiskModel::kSector]);
    }
    request->request.data = request->data.data();
  }
  ++oracle_.guest_writes;
  log::debug("t={}us guest on {} writes vd{} sectors {}+{} versions {}..", executor_.now() / kMicrosecond, host_.name(),
             volume, range->first, range->second, request->versions.front());
  model.write_submitted(range->first, request->versions);
  request->answer = [this, &model](DiskRequest& done, Errno error) {
    log::debug("t={}us guest: write of {}+{} answered {}", executor_.now() / kMicrosecond, done.first,
               done.versions.size(), error);
    if (error != 0) {
      oracle_.write_failed(host_, error, guest_runs());
      return model.write_refused(done.first, done.versions);
    }
    model.write_acknowledged(done.first, done.versions);
  };
  submit(std::move(request));
}

void QemuProcess::guest_flush() {
  for (size_t volume = 0; volume < oracle_.disks(host_).size(); ++volume) {
    auto request = std::make_unique<DiskRequest>();
    request->volume = volume;
    request->request.op = BlockOp::Flush;
    request->flush_sequence = oracle_.disks(host_)[volume].flush_submitted();
    request->answer = [this, &model = oracle_.disks(host_)[volume]](DiskRequest& done, Errno error) {
      log::debug("t={}us guest: flush of vd{} up to {} answered {}", executor_.now() / kMicrosecond, done.volume,
                 done.flush_sequence, error);
      if (error != 0) return oracle_.violation(fmt::format("a flush failed: {}", errno_text(error)));
      model.flush_acknowledged(done.flush_sequence);
    };
    submit(std::move(request));
  }
}

void QemuProcess::guest_read() {
  const size_t volume = static_cast<size_t>(executor_.world().random().below(oracle_.disks(host_).size()));
  const auto range = free_range(volume, 32);
  if (!range) return;
  auto request = std::make_unique<DiskRequest>();
  request->volume = volume;
  request->request.range = {range->first * DiskModel::kSector, range->second * DiskModel::kSector};
  request->data.resize(request->request.range.length);
  request->request.data = request->data.data();
  // The model is the one of now: the operator may choose another truth meanwhile.
  request->answer = [this, &model = oracle_.disks(host_)[volume]](DiskRequest& done, Errno error) {
    ++oracle_.guest_checks;
    if (oracle_.given_up == &host_) return;
    if (error != 0) return oracle_.violation(fmt::format("a read failed: {}", errno_text(error)));
    const std::string wrong = model.check(done.first, done.data.data(), done.data.size() / DiskModel::kSector, false);
    if (!wrong.empty()) oracle_.violation(fmt::format("I1: {} reads vd{}: {}", host_.name(), done.volume, wrong));
  };
  submit(std::move(request));
}

// After a boot or an arrival, before anything is written: every sector must hold what it may hold.
void QemuProcess::check_whole_disk() {
  for (size_t volume = 0; volume < oracle_.disks(host_).size(); ++volume) {
    const uint64_t sectors = oracle_.disks(host_)[volume].sector_count() - kReservedSectors;
    for (uint64_t first = 0; first < sectors; first += kCheckSectors) {
      auto request = std::make_unique<DiskRequest>();
      request->volume = volume;
      const uint64_t count = std::min(kCheckSectors, sectors - first);
      request->request.range = {first * DiskModel::kSector, count * DiskModel::kSector};
      request->data.resize(request->request.range.length);
      request->request.data = request->data.data();
      ++check_left_;
      request->answer = [this, &model = oracle_.disks(host_)[volume]](DiskRequest& done, Errno error) {
        --check_left_;
        ++oracle_.guest_checks;
        if (oracle_.given_up == &host_) return;
        if (error != 0) return oracle_.violation(fmt::format("a read failed: {}", errno_text(error)));
        const std::string wrong =
            model.check(done.first, done.data.data(), done.data.size() / DiskModel::kSector, settle_);
        if (!wrong.empty()) {
          oracle_.violation(fmt::format("I1: {} finds on vd{} after {}: {}", host_.name(), done.volume,
                                        settle_ ? "a boot" : "its arrival", wrong));
        }
      };
      submit(std::move(request));
    }
  }
}

}  // namespace vmferry::sim
