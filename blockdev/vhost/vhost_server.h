// SPDX-License-Identifier: Apache-2.0
//
// The vhost-user-blk back-end of one volume: a virtio block device whose rings and data lie in the guest's memory.
//
// Flow: a listener hands sockets to accept(); each becomes a VhostSession, one at a time, because a disk has one
// guest: a newcomer waits until the one before is gone and its last request is done (a front-end that reconnects
// submits again what was in flight, and the same request must not run twice at once). The session speaks the protocol,
// its VhostQueues take requests from the rings, a VhostRequest carries each through the BlockDevice, straight from and
// to the guest's memory where the device allows it.
// Source of truth: docs/vhost-user-blk.md. Threads: one reactor, the one of the device.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "blockdev/block_device.h"
#include "blockdev/client_eras.h"
#include "blockdev/transfer_buffers.h"
#include "blockdev/vhost/vhost_limits.h"
#include "engine/runtime/reactor.h"

namespace vmferry {

class VhostSession;
class VhostRequest;

struct VhostExport {
  std::string name{};             // for log lines; also what GET_ID answers
  BlockDevice* device = nullptr;  // outlives the server
  ClientEras* clients = nullptr;  // of the device, if it knows eras; lives as long
  bool read_only = false;
  uint16_t queues = 16;  // at most; the front-end decides how many it uses
};

struct VhostStats {
  uint64_t connections = 0;  // 0 or 1
  uint64_t connections_total = 0;
  uint64_t requests_total = 0;
  uint64_t errors_total = 0;  // requests answered with an error
  uint64_t broken_queues_total = 0;
  uint64_t read_bytes_total = 0;
  uint64_t written_bytes_total = 0;
  uint64_t copied_bytes_total = 0;  // that went through a buffer of ours, because a request lay in too many pieces
  uint64_t kicks_total = 0;
  uint64_t calls_total = 0;
  uint64_t inflight = 0;
  std::vector<uint64_t> requests_of_queue{};  // since the connection began
};

class VhostServer {
 public:
  VhostServer(Reactor& reactor, const VhostExport& config, const VhostLimits& limits = {});
  ~VhostServer();  // after drain(), unless nothing was ever accepted
  VhostServer(const VhostServer&) = delete;
  VhostServer& operator=(const VhostServer&) = delete;

  void accept(UniqueFd socket);
  // Stops for good: takes no more requests, waits for those under way, closes. What the device refuses with ESHUTDOWN
  // stays in flight for the next back-end instead of becoming an error in the guest.
  void drain(std::function<void()> done);
  // The device has another size: tells the front-end, which reads the configuration again.
  void resized();

  VhostStats stats() const;

 private:
  bool may_serve() const { return config_.clients == nullptr || config_.clients->may_serve(client_); }
  friend class VhostSession;
  friend class VhostQueue;
  friend class VhostRequest;

  void start_next();
  void session_over();  // it is idle and closed: destroyed soon
  VhostRequest& take_request();
  void give_back(VhostRequest& request);

  Reactor& reactor_;
  const VhostExport config_;
  const VhostLimits limits_;
  TransferBuffers buffers_;
  uint64_t buffered_bytes_ = 0;
  std::vector<std::unique_ptr<VhostRequest>> requests_;  // as many as were ever in flight at once
  std::vector<VhostRequest*> free_requests_;
  std::unique_ptr<VhostSession> session_;
  uint64_t client_ = 0;  // the session, for the device's ClientEras
  std::deque<UniqueFd> waiting_;
  bool draining_ = false;
  std::vector<std::function<void()>> drain_done_;
  VhostStats totals_;
  Alive alive_;
};

}  // namespace vmferry
