// SPDX-License-Identifier: Apache-2.0
//
// A vhost-user-blk front-end with a guest's memory and rings, without QEMU: loads any back-end, for benchmarks, tests
// and fuzzing.
//
// Flow: create() makes the memory, connect() speaks the whole start of a session up to enabled rings; BlkQueue drives
// a ring. After the back-end died, connect() again continues with the same memory and the same in-flight region, as
// QEMU does. Source of truth: vhost-user.rst. Threads: blocking, one thread; queues may be driven from others.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/base/result.h"
#include "engine/runtime/unique_fd.h"
#include "netproto/vhost/message.h"
#include "netproto/virtio/blk.h"
#include "netproto/virtio/driver_ring.h"

namespace vmferry::perf {

struct FrontendOptions {
  virtio::RingOptions ring{.packed = false, .indirect = true, .event_idx = true};
  uint16_t queues = 1;
  uint16_t queue_size = 128;
  uint64_t data_bytes = 4_MiB;    // of guest memory besides the rings
  uint64_t features_refused = 0;  // not negotiated although offered
  bool inflight = true;           // negotiate and use the in-flight region
  bool memory_slots = false;      // ADD_MEM_REG instead of SET_MEM_TABLE
};

class Frontend {
 public:
  static constexpr uint64_t kGuestBase = 0x40000000;

  static Result<std::unique_ptr<Frontend>> create(const FrontendOptions& options);
  ~Frontend();
  Frontend(const Frontend&) = delete;
  Frontend& operator=(const Frontend&) = delete;

  static Result<UniqueFd> dial(const std::string& socket_path);
  Status connect(UniqueFd socket);
  void disconnect() { socket_.reset(); }

  const FrontendOptions& options() const { return options_; }
  uint64_t features() const { return features_; }
  uint64_t protocol_features() const { return protocol_features_; }
  const virtio::BlkConfig& config() const { return config_; }

  uint8_t* data() const { return memory_ + data_offset_; }
  uint64_t data_address() const { return kGuestBase + data_offset_; }
  uint64_t memory_bytes() const { return memory_bytes_; }
  int memory_fd() const { return memory_fd_.get(); }
  virtio::DriverRing& ring(uint16_t index) { return *queues_[index].ring; }
  void kick(uint16_t index);
  int call_fd(uint16_t index) const { return queues_[index].call.get(); }
  int error_fd(uint16_t index) const { return queues_[index].error.get(); }

  // GET_VRING_BASE; the ring is stopped afterwards.
  Result<uint32_t> stop_queue(uint16_t index);
  Status start_queue(uint16_t index, uint32_t base);
  // A dirty log over all of the memory, as at the start of a migration; then off again.
  Status set_logging(bool on);
  std::span<uint8_t> log() const { return {log_, log_ == nullptr ? 0 : log_bytes_}; }
  // The back-end sets bits at any time: both are atomic.
  bool is_logged(uint64_t guest_address) const;
  void clear_log();
  // True when a message of the back-end (a config change) arrived within `timeout_ms`.
  bool wait_backend_message(int timeout_ms);
  Status read_config();

  // Single messages, for tests and fuzzing.
  Status send(vhost::Request request, const vhost::Body& body, std::span<const int> fds = {}, bool need_reply = false);
  Status send_bytes(ByteSpan bytes, std::span<const int> fds = {});
  Result<vhost::Body> receive(vhost::Request request, UniqueFd* fd = nullptr);
  // Sends with need_reply; a refusal is an error.
  Status order(vhost::Request request, const vhost::Body& body, std::span<const int> fds = {});
  Result<uint64_t> ask(vhost::Request request);
  vhost::VringAddress addresses(uint16_t index) const;
  vhost::MemoryRegion region() const;

 private:
  struct Queue {
    std::unique_ptr<virtio::DriverRing> ring;
    uint64_t offset = 0;  // of its memory
    UniqueFd kick;
    UniqueFd call;
    UniqueFd error;
  };
  explicit Frontend(const FrontendOptions& options) : options_(options) {}
  Status make_memory();
  Status negotiate();
  Status share_inflight();

  FrontendOptions options_;
  UniqueFd memory_fd_;
  uint8_t* memory_ = nullptr;
  uint64_t memory_bytes_ = 0;
  uint64_t data_offset_ = 0;
  std::vector<Queue> queues_;
  UniqueFd socket_;
  UniqueFd backend_channel_;
  UniqueFd inflight_fd_;
  vhost::Inflight inflight_shape_;
  UniqueFd log_fd_;
  uint8_t* log_ = nullptr;
  uint64_t log_bytes_ = 0;
  bool logging_ = false;
  uint64_t features_ = 0;
  uint64_t protocol_features_ = 0;
  virtio::BlkConfig config_;
};

}  // namespace vmferry::perf
