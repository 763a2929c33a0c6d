// SPDX-License-Identifier: Apache-2.0
#include "blockdev/vhost/vhost_server.h"

#include <algorithm>

#include "blockdev/vhost/vhost_request.h"
#include "blockdev/vhost/vhost_session.h"
#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

VhostServer::VhostServer(Reactor& reactor, const VhostExport& config, const VhostLimits& limits)
    : reactor_(reactor), config_(config), limits_(limits), buffers_(limits.buffer_cache_bytes_max) {
  VF_ASSERT(config.device != nullptr && config.queues > 0 && config.queues <= kVhostQueuesMax);
  VF_ASSERT(limits.copy_bytes_max <= TransferBuffers::kSizeMax);
}

VhostServer::~VhostServer() {
  session_.reset();
  VF_ASSERT(requests_.size() == free_requests_.size());
}

void VhostServer::accept(UniqueFd socket) {
  if (draining_) return;
  if (waiting_.size() >= limits_.waiting_max) {
    log::warn("vhost-user-blk volume={} connection refused: {} are waiting", config_.name, waiting_.size());
    return;
  }
  waiting_.push_back(std::move(socket));
  start_next();
}

void VhostServer::start_next() {
  if (session_ != nullptr || waiting_.empty()) return;
  UniqueFd socket = std::move(waiting_.front());
  waiting_.pop_front();
  ++totals_.connections_total;
  if (config_.clients != nullptr) client_ = config_.clients->next_client();
  session_ = std::make_unique<VhostSession>(*this, std::move(socket));
}

void VhostServer::session_over() {
  session_.reset();
  if (!draining_) return start_next();
  // A callback may destroy the server.
  std::vector<std::function<void()>> callbacks;
  callbacks.swap(drain_done_);
  for (const auto& callback : callbacks) callback();
}

void VhostServer::drain(std::function<void()> done) {
  draining_ = true;
  waiting_.clear();
  if (session_ == nullptr) return reactor_.post(std::move(done));
  drain_done_.push_back(std::move(done));
  session_->close("the volume is being closed");
}

void VhostServer::resized() {
  if (session_ != nullptr) session_->notify_config_change();
}

VhostRequest& VhostServer::take_request() {
  if (free_requests_.empty()) {
    requests_.push_back(std::make_unique<VhostRequest>());
    free_requests_.reserve(requests_.size());
    return *requests_.back();
  }
  VhostRequest& request = *free_requests_.back();
  free_requests_.pop_back();
  return request;
}

void VhostServer::give_back(VhostRequest& request) {
  request.release();
  free_requests_.push_back(&request);
}

VhostStats VhostServer::stats() const {
  VhostStats stats = totals_;
  stats.connections = session_ != nullptr ? 1 : 0;
  stats.inflight = requests_.size() - free_requests_.size();
  if (session_ != nullptr) stats.requests_of_queue = session_->requests_of_queues();
  return stats;
}

}  // namespace vmferry
