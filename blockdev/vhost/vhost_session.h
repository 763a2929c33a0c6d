// SPDX-License-Identifier: Apache-2.0
//
// One front-end's connection: carries out its messages in order.
//
// A message that has to wait (for requests in flight) keeps the next ones in the socket. A message that is wrong in
// itself ends the connection; one that cannot be carried out is refused, where the front-end asked for an answer, and
// ends the connection where it did not. When the connection ends, requests under way are finished first.
// Threads: the reactor's.
#pragma once

#include <memory>
#include <vector>

#include "blockdev/vhost/vhost_channel.h"
#include "blockdev/vhost/vhost_memory.h"
#include "blockdev/vhost/vhost_queue.h"
#include "netproto/virtio/dirty_log.h"

namespace vmferry {

class VhostServer;

class VhostSession {
 public:
  VhostSession(VhostServer& server, UniqueFd socket);
  ~VhostSession();
  VhostSession(const VhostSession&) = delete;
  VhostSession& operator=(const VhostSession&) = delete;

  // Takes no more messages and requests; the server is told when the last request is answered.
  void close(std::string_view why);
  bool closed() const { return closed_; }
  void notify_config_change();

  // For queues.
  virtio::RingOptions ring_options() const;
  bool write_through() const;
  const virtio::DirtyLog* dirty_log() const;  // nullptr: no migration runs
  void fail_later(std::string_view why);
  std::vector<uint64_t> requests_of_queues() const;

 private:
  enum class Outcome : uint8_t { Done, Replied, Waits };

  void received(VhostPacket packet);
  Result<Outcome> handle(const vhost::Message& message, VhostPacket& packet);
  Result<Outcome> handle_ring(const vhost::Message& message, VhostPacket& packet);
  Result<Outcome> handle_memory(const vhost::Message& message, VhostPacket& packet);
  Result<VhostQueue*> queue_at(uint32_t index);
  Result<VhostQueue*> stopped_queue_at(uint32_t index);
  Result<Outcome> set_features(uint64_t features);
  Result<Outcome> set_address(const vhost::VringAddress& address);
  Result<Outcome> start_queue(uint32_t index, UniqueFd kick);
  Result<Outcome> get_base(uint32_t index);
  Result<Outcome> set_log(const vhost::LogArea& area, const UniqueFd& fd);
  Result<Outcome> make_inflight(const vhost::Inflight& wanted);
  Result<Outcome> take_inflight(const vhost::Inflight& given, const UniqueFd& fd);
  Result<Outcome> get_config(const vhost::ConfigAccess& access);
  Result<Outcome> set_config(const vhost::ConfigAccess& access);
  Result<Outcome> reset_device(bool need_reply);
  Result<Outcome> install(Result<VhostMemory::Ptr> memory);
  Status no_queue_uses_inflight() const;
  MutableByteSpan inflight_of(const VhostQueue& queue, uint32_t index) const;
  void stop_queues(std::function<void()> stopped);
  void acknowledge(vhost::Request request, bool need_reply, bool success);
  void reply(vhost::Request request, const vhost::Body& body, int fd = -1);
  uint64_t offered_features() const;
  Bytes config_space() const;
  void update_logs();

  VhostServer& server_;
  bool closed_ = false;
  uint64_t features_ = 0;
  uint64_t protocol_features_ = 0;
  bool writeback_ = true;
  uint8_t status_ = 0;
  VhostMemory::Ptr memory_;
  SharedMapping inflight_;
  vhost::Inflight inflight_shape_;
  SharedMapping log_mapping_;
  virtio::DirtyLog log_;
  UniqueFd backend_requests_;
  std::vector<std::unique_ptr<VhostQueue>> queues_;
  std::unique_ptr<VhostChannel> channel_;
  Alive alive_;
};

}  // namespace vmferry
