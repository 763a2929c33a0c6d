// SPDX-License-Identifier: Apache-2.0
//
// One virtqueue of a vhost-user-blk device: notifications in, requests through the device, notifications out.
//
// Flow: a kick, or the end of a batch of requests, makes it look at the ring; chains become VhostRequests; what is done
// is put back once per round of the reactor, so that one notification covers many. Stopped by GET_VRING_BASE, which is
// answered when nothing is in flight. Threads: the reactor's.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "blockdev/vhost/vhost_request.h"
#include "engine/runtime/reactor.h"
#include "netproto/virtio/virtqueue.h"

namespace vmferry {

class VhostSession;

// Set by messages before the ring starts.
struct VhostRingConfig {
  uint16_t size = 0;
  uint32_t base = 0;
  vhost::VringAddress address;
  bool address_known = false;
  bool enabled = false;
};

class VhostQueue {
 public:
  VhostQueue(VhostSession& session, VhostServer& server, uint16_t index);
  ~VhostQueue();
  VhostQueue(const VhostQueue&) = delete;
  VhostQueue& operator=(const VhostQueue&) = delete;

  VhostRingConfig config;

  // Starts with the configuration and this kick descriptor. The ring lies in `memory`; `inflight` may be empty.
  Status start(UniqueFd kick, VhostMemory::Ptr memory, MutableByteSpan inflight);
  bool started() const { return ring_ != nullptr; }
  void set_call(UniqueFd fd) { call_ = std::move(fd); }
  void set_error(UniqueFd fd) { error_ = std::move(fd); }
  void set_enabled(bool enabled);
  void set_kick(UniqueFd kick);  // of a started ring
  // Another memory table, or other addresses of the log. A ring that is no longer inside stops.
  Status move(VhostMemory::Ptr memory);
  void update_log();

  // Takes nothing more from the ring; requests under way go on. `stopped` when the last one is answered: at once, or
  // from its completion. It may destroy the queue.
  void stop(std::function<void()> stopped);
  uint32_t base() const { return base_; }  // valid once stopped

  size_t inflight() const { return inflight_; }
  bool write_through() const;
  bool keeps_inflight() const { return keeps_inflight_; }
  void request_done(VhostRequest& request);
  uint64_t requests() const { return requests_; }

 private:
  Result<virtio::RingMemory> find_ring(const VhostMemory& memory) const;
  void watch_kick();
  void publish();
  void kicked();
  void process();
  void flush();
  void answer(VhostRequest& request);
  void break_down(std::string_view why);
  void check_stopped();

  VhostSession& session_;
  VhostServer& server_;
  const uint16_t index_;
  UniqueFd kick_;
  UniqueFd call_;
  UniqueFd error_;
  WatchId watch_ = 0;
  std::unique_ptr<virtio::Virtqueue> ring_;
  VhostMemory::Ptr memory_;
  bool keeps_inflight_ = false;
  bool broken_ = false;
  bool stopping_ = false;
  bool processing_ = false;
  std::function<void()> stopped_;
  uint32_t base_ = 0;
  size_t inflight_ = 0;     // taken, not yet answered
  size_t unpublished_ = 0;  // answered, not yet shown to the driver
  size_t postponed_ = 0;    // left for the next back-end
  uint64_t requests_ = 0;
  DeferredCall flush_later_;
  DeferredCall process_later_;
};

}  // namespace vmferry
