// SPDX-License-Identifier: Apache-2.0
//
// A disk in memory that can be slow or failing on request. Threads: the executor's.
#pragma once

#include <memory>
#include <string_view>

#include "blockdev/block_device.h"
#include "engine/runtime/executor.h"

namespace vmferry {

class RamDisk final : public BlockDevice {
 public:
  enum class Mood : uint8_t { Fine, Slow, Failing };

  // "BYTES", "BYTES:slow", "BYTES:failing".
  static Result<std::unique_ptr<BlockDevice>> parse(Executor& executor, std::string_view text);
  RamDisk(Executor& executor, uint64_t size, Mood mood);
  ~RamDisk() override;

  uint64_t size() const noexcept override { return size_; }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override;
  void query_extents(ByteRange range, size_t extents_max, ExtentsDone done) override;

 private:
  Errno carry_out(const BlockRequest& request);
  void run_batch();

  Executor& executor_;
  const uint64_t size_;
  const Mood mood_;
  uint8_t* content_ = nullptr;  // mapped, so that a large disk costs only what is written
  BlockLimits limits_;
  std::vector<BlockRequest*> batch_;
  std::vector<BlockRequest*> running_;
};

}  // namespace vmferry
