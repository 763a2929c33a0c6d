// SPDX-License-Identifier: Apache-2.0
//
// Knows what must hold and notes the first violation: I1, I2, I5, I6 over two hosts.
//
// Threads: the world's.
#pragma once

#include <array>
#include <list>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/base/hash.h"
#include "engine/migrate/ownership.h"
#include "netproto/repl/epoch_messages.h"
#include "netproto/repl/group_hello.h"
#include "netproto/repl/message_types.h"
#include "tests/sim/disk_model.h"

namespace vmferry::sim {

class Host;
class QemuProcess;

class Oracle {
 public:
  explicit Oracle(const std::vector<uint64_t>& volume_sizes) {
    Branch& first = branches_.emplace_back();
    for (const uint64_t size : volume_sizes) first.disks.emplace_back(size);
    branch_of_.fill(&first);
  }
  void set_hosts(Host* a, Host* b) {
    hosts_ = {a, b};
    holder_ = a;
  }

  void violation(std::string what) {
    if (violation_.empty()) violation_ = std::move(what);
  }
  const std::string& violation() const { return violation_; }
  bool violated() const { return !violation_.empty(); }

  // After every step of the world.
  void check_step();

  // --- told by the parts
  void guest_started(QemuProcess& process, Host& host, bool by_command);
  void guest_stepped(const Host& host, uint64_t memory) { branch(host).newest_memory = memory; }
  uint64_t newest_memory(const Host& host) { return branch(host).newest_memory; }
  void write_failed(Host& host, Errno error, bool guest_running);
  void message_sent(size_t side, MessageType type, ByteSpan payload);
  void daemon_started(Host& host);
  // The host's record says that it is primary now. `by_promotion`: without a migration.
  void became_primary(Host& host, bool by_promotion, bool forced);
  // It was promoted without --accept-inconsistent.
  void promoted_as_consistent(const Host& host);
  // Whether a power cut of the host takes unsynced writes of the guest's truth with it.
  bool holds_truth(const Host& host) const { return forked() || holder_ == &host; }

  // After a promotion by force there are two truths, until the operator has chosen one.
  bool forked() const { return branch_of_[0] != branch_of_[1]; }
  void join(const Host& winner);
  std::vector<DiskModel>& disks(const Host& host) { return branch(host).disks; }
  Hash128 image_of(Host& host) const;

  const Host* given_up = nullptr;  // its data was discarded; a guest that still runs there may find anything
  bool promoting = false;          // by the operator, in order: parked writes may be refused
  uint64_t guest_writes = 0;
  uint64_t guest_checks = 0;
  uint64_t checked_images = 0;
  uint64_t final_epochs = 0;  // compared with the source
  uint64_t moments = 0;       // copies called consistent that were looked for in the past of the source
  uint64_t refused_writes = 0;
  std::map<std::string, uint64_t> messages;  // of the handover

 private:
  struct Branch {
    std::vector<DiskModel> disks;
    uint64_t newest_memory = 0;
    Host* last_host = nullptr;  // that ran the guest
  };
  Branch& branch(const Host& host);

  std::array<Host*, 2> hosts_{};
  std::string violation_;
  std::list<Branch> branches_;  // all that ever were: requests in flight point into them
  std::array<Branch*, 2> branch_of_{};
  const Host* holder_ = nullptr;  // was primary last
  struct Copy {
    Id128 lineage{};
    std::map<uint64_t, Hash128> images;  // at the acknowledgement of each epoch
    uint64_t acknowledged = 0;           // newest
    Nanoseconds acknowledged_at = 0;
    Nanoseconds acknowledged_before_at = 0;  // the one before
    bool first_hello = true;                 // of this life of the daemon
  };
  void copy_said_hello(Host& host, const GroupHello& hello);
  void copy_acknowledged(Host& host, const EpochAck& ack);
  void check_final_epoch(Host& copy, Host& source);
  // What the volumes of a host held, as digests, and when last.
  struct Past {
    uint64_t now = 0;
    std::unordered_map<uint64_t, Nanoseconds> last_held;
  };
  void note_content(const Host& host);
  bool source_held(const Host& copy, uint64_t content, Nanoseconds since) const;
  void check_moment(const Host& copy, const std::string& said, uint64_t content, Nanoseconds since);
  std::array<Past, 2> pasts_;
  uint64_t promoted_content_ = 0;        // what the newest primary held when it became one
  Nanoseconds promoted_not_before_ = 0;  // its epoch was sealed
  uint64_t final_epoch_ = 0;
  Id128 final_attempt_{};
  std::array<Copy, 2> copies_;
};

}  // namespace vmferry::sim
