// SPDX-License-Identifier: Apache-2.0
//
// Compares the copy with the source, digest by digest.
//
// Flow: for each range: wait until the copy has everything, ask for the digests of its pieces, compute our own,
// compare. A piece that differs and was written meanwhile is asked again; what differs at rest is reported. Threads:
// the group's executor.
#pragma once

#include <memory>
#include <vector>

#include "engine/replicate/sender.h"

namespace vmferry {

struct VerifyRun : std::enable_shared_from_this<VerifyRun> {
  using Finished = std::function<void(Result<std::vector<VerifyDifference>>)>;
  struct Environment {
    Executor& executor;
    std::vector<ReplicaVolume> volumes;
    Alive::Token alive;
    std::function<void(Sender::Done)> wait_in_sync;
    std::function<void(const VerifyRequest&)> ask;
    Finished finished;
  };
  explicit VerifyRun(Environment environment) : env(std::move(environment)) {}

  void start() { next_range(); }
  void on_reply(const VerifyReply& reply);
  // Ends it; nothing when it is over.
  void fail_with_reason(const Error& error);
  bool waits_for_copy() const { return !over && step == Step::Copy; }
  bool waits_for_digests() const { return !over && step == Step::Digests && !theirs_done; }
  Nanoseconds step_since() const { return since; }
  uint64_t compared_bytes() const { return compared; }

 private:
  struct Item {
    uint16_t volume = 0;
    ByteRange range;
    uint32_t attempts = 0;
  };
  enum class Step : uint8_t { Copy, Digests };  // what it waits for: that the copy has everything; both digests

  void next_range();
  void ask_again();
  void hash_ours(uint64_t at);
  void compare();
  void finish(Result<std::vector<VerifyDifference>> result);

  Environment env;
  uint16_t volume_next = 0;
  uint64_t offset_next = 0;
  uint64_t compared = 0;    // each range once
  std::vector<Item> again;  // pieces that differed while they were written
  Item item;
  Step step = Step::Copy;
  Nanoseconds since = 0;
  VerifyRequest request;
  uint64_t id_last = 0;
  uint64_t mutations = 0;
  bool quiet = false;
  std::vector<Sha256Digest> ours;
  std::vector<Sha256Digest> theirs;
  bool ours_done = false;
  bool theirs_done = false;
  bool over = false;
  Bytes buffer;
  std::vector<VerifyDifference> differences;
};

}  // namespace vmferry
