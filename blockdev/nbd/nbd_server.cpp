// SPDX-License-Identifier: Apache-2.0
#include "blockdev/nbd/nbd_server.h"

#include <algorithm>
#include <bit>

#include "blockdev/nbd/nbd_connection.h"
#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

// How long a handshake is left alone when all connections are taken: many round trips, a small part of its own limit.
constexpr Nanoseconds kHandshakePatience = kSecond;

// The largest request must fit each limit, or its client would wait for ever.
NbdLimits with_room_for_one_request(NbdLimits limits) {
  const uint64_t needed = nbd::kPayloadSizeMax + 64_KiB + limits.status_extents_max * 64;
  limits.connection_inflight_bytes_max = std::max(limits.connection_inflight_bytes_max, needed);
  limits.inflight_bytes_max = std::max(limits.inflight_bytes_max, needed);
  limits.connections_max = std::max<size_t>(limits.connections_max, 1);
  limits.handshakes_max = std::max<size_t>(limits.handshakes_max, 1);
  limits.status_extents_max = std::max<size_t>(limits.status_extents_max, 1);
  return limits;
}

}  // namespace

NbdServer::NbdServer(Executor& executor, const NbdLimits& limits, NbdTls tls)
    : executor_(executor),
      limits_(with_room_for_one_request(limits)),
      tls_(std::move(tls)),
      buffers_(limits_.buffer_cache_bytes_max),
      stall_timer_(executor) {
  VF_ASSERT(tls_.policy == nbd::TlsPolicy::Off || tls_.credentials != nullptr);
}

NbdServer::~NbdServer() {
  VF_ASSERT(operations_.in_use() == 0);
  while (!connections_.empty()) connections_.back()->abandon("server is gone");  // moves it to retired_
  retired_.clear();  // before the members that connections refer to
}

Status NbdServer::add_export(const NbdExport& config) {
  VF_ASSERT(config.device != nullptr);
  if (config.name.empty() || config.name.size() > nbd::kStringSizeMax || config.name.find('\0') != std::string::npos)
    return fail(ErrorKind::InvalidArgument, "export name of {} bytes: NBD takes 1 to {} bytes without NUL",
                config.name.size(), nbd::kStringSizeMax);
  if (config.description.size() > nbd::kStringSizeMax)
    return fail(ErrorKind::InvalidArgument, "export '{}': description is longer than {} bytes", config.name,
                nbd::kStringSizeMax);
  if (!std::has_single_bit(config.block_size_min) || config.block_size_min > 64_KiB)
    return fail(ErrorKind::InvalidArgument, "export '{}': smallest block size {} is not a power of two up to 64 KiB",
                config.name, config.block_size_min);
  if (lookup(config.name) != nullptr) return fail(ErrorKind::Exists, "export '{}' exists already", config.name);
  exports_.push_back(std::make_unique<Export>());
  exports_.back()->config = config;
  return {};
}

Status NbdServer::remove_export(std::string_view name, std::function<void()> done) {
  Export* target = lookup(name);
  if (target == nullptr) return fail(ErrorKind::NotFound, "no export '{}'", name);
  target->removed = true;
  target->removal_done = std::move(done);
  ++target->connection_count;  // ours, so that the last to leave announces it, and not before the walk has ended
  drain_connections([target](const NbdConnection& connection) { return connection.target() == target; });
  unbind(*target);
  return {};
}

Status NbdServer::set_default_export(std::string_view name) {
  if (lookup(name) == nullptr) return fail(ErrorKind::NotFound, "no export '{}'", name);
  default_export_ = name;
  return {};
}

// An idle connection may be over at once, which takes it out of connections_.
void NbdServer::drain_connections(const std::function<bool(const NbdConnection&)>& chosen) {
  std::vector<NbdConnection*> all;
  for (const auto& connection : connections_)
    if (chosen(*connection)) all.push_back(connection.get());
  for (NbdConnection* connection : all) connection->begin_drain();
}

NbdServer::Export* NbdServer::lookup(std::string_view name) const {
  for (const auto& target : exports_)
    if (!target->removed && target->config.name == name) return target.get();
  return nullptr;
}

NbdServer::Export* NbdServer::bind(const std::string& name) {
  Export* target = lookup(name);
  if (target != nullptr) ++target->connection_count;
  return target;
}

void NbdServer::unbind(Export& target) {
  --target.connection_count;
  if (!target.removed || target.connection_count > 0) return;
  executor_.post(std::move(target.removal_done));
  std::erase_if(exports_, [&](const auto& entry) { return entry.get() == &target; });
}

std::optional<nbd::ExportInfo> NbdServer::find_export(std::string_view name) const {
  const Export* target = lookup(name.empty() && !default_export_.empty() ? std::string_view(default_export_) : name);
  if (target == nullptr && name.empty()) {
    const auto first = std::find_if(exports_.begin(), exports_.end(), [](const auto& e) { return !e->removed; });
    if (first != exports_.end()) target = first->get();
  }
  if (target == nullptr) return std::nullopt;
  return describe(target->config);
}

std::vector<nbd::ExportInfo> NbdServer::list_exports() const {
  std::vector<nbd::ExportInfo> result;
  for (const auto& target : exports_)
    if (!target->removed) result.push_back(describe(target->config));
  return result;
}

nbd::ExportInfo NbdServer::describe(const NbdExport& config) const {
  const BlockLimits& device = config.device->limits();
  nbd::ExportInfo info;
  info.name = config.name;
  info.description = config.description;
  info.size = config.device->size();
  info.read_only = config.read_only;
  info.tls_allow = config.tls_allow;
  if (config.status != nullptr) info.contexts = config.status->contexts();
  info.block_size_min = config.block_size_min;
  info.payload_size_max = std::min(nbd::kPayloadSizeMax, device.transfer_size_max);
  info.block_size_preferred = std::clamp(std::bit_ceil(std::max(device.block_size_preferred, 512U)),
                                         info.block_size_min, std::bit_floor(info.payload_size_max));
  return info;
}

void NbdServer::accept(std::unique_ptr<ByteStream> stream) {
  if (draining_) return;  // the stream closes as it dies
  if (!make_room()) {
    ++totals_.refused_total;
    if (const auto suppressed = refusals_.allow(executor_.now())) {
      log::warn("nbd peer={} refused: {} connections are open, which is the limit suppressed={}", stream->peer_text(),
                connections_.size(), *suppressed);
    }
    return;
  }
  ++totals_.connections_total;
  connections_.push_back(std::make_unique<NbdConnection>(*this, std::move(stream), connection_id_next_++));
  connections_.back()->start();
}

// Clients that stall in the handshake must not keep others out: at either limit the oldest of them goes. At the limit
// of connections only one that has had time enough, or the last newcomers would push each other out.
bool NbdServer::make_room() {
  size_t count = 0;
  NbdConnection* oldest = nullptr;
  for (const auto& connection : connections_) {
    if (connection->phase() != NbdConnection::Phase::Handshake) continue;
    if (oldest == nullptr) oldest = connection.get();
    ++count;
  }
  const bool full = connections_.size() >= limits_.connections_max;
  if (count < limits_.handshakes_max) {
    if (!full) return true;
    if (oldest == nullptr || executor_.now() - oldest->accepted_at() < kHandshakePatience) return false;
  }
  ++totals_.refused_total;
  oldest->abandon("too many unfinished handshakes");
  return true;
}

bool NbdServer::admit(NbdConnection& connection, uint64_t bytes) {
  if (waiters_.empty() && inflight_bytes_ + bytes <= limits_.inflight_bytes_max) {
    charge(bytes);
    return true;
  }
  waiters_.push_back(&connection);
  if (!stall_timer_.running()) watch_for_stalls();
  return false;
}

void NbdServer::release(uint64_t bytes) {
  VF_ASSERT(bytes <= inflight_bytes_);
  inflight_bytes_ -= bytes;
  if (bytes > 0 && !waiters_.empty()) schedule_wake();
}

void NbdServer::schedule_wake() {
  if (wake_scheduled_) return;
  wake_scheduled_ = true;
  executor_.post([this, alive = alive_.token()] {
    if (alive()) wake_waiters();
  });
}

void NbdServer::stop_waiting(NbdConnection& connection) {
  if (std::erase(waiters_, &connection) > 0 && !waiters_.empty()) schedule_wake();
}

void NbdServer::wake_waiters() {
  wake_scheduled_ = false;
  while (!waiters_.empty()) {
    NbdConnection* next = waiters_.front();
    const uint64_t bytes = next->bytes_wanted();
    if (inflight_bytes_ + bytes > limits_.inflight_bytes_max)
      return;  // its turn all the same: a later one would starve it
    waiters_.pop_front();
    charge(bytes);
    next->grant(bytes);
  }
}

void NbdServer::watch_for_stalls() {
  for (const auto& connection : connections_) connection->stalled_since_last_call();
  stall_timer_.start(limits_.stall_time_max, [this] {
    if (waiters_.empty()) return;
    std::vector<NbdConnection*> stalled;
    for (const auto& connection : connections_)
      if (connection->stalled_since_last_call()) stalled.push_back(connection.get());
    for (NbdConnection* connection : stalled) connection->abandon("no progress while others wait for memory");
    watch_for_stalls();
  });
}

void NbdServer::retire(NbdConnection& connection) {
  const auto it = std::find_if(connections_.begin(), connections_.end(),
                               [&](const auto& entry) { return entry.get() == &connection; });
  VF_ASSERT(it != connections_.end());
  retired_.push_back(std::move(*it));
  connections_.erase(it);
  if (bury_scheduled_) return;
  bury_scheduled_ = true;
  executor_.post([this, alive = alive_.token()] {
    if (alive()) bury();
  });
}

// Later, because a connection retires from inside its own callbacks.
void NbdServer::bury() {
  bury_scheduled_ = false;
  retired_.clear();
  check_drained();
}

void NbdServer::drain(std::function<void()> done) {
  draining_ = true;
  drain_done_.push_back(std::move(done));
  drain_connections([](const NbdConnection&) { return true; });
  executor_.post([this, alive = alive_.token()] {
    if (alive()) check_drained();
  });
}

void NbdServer::check_drained() {
  if (!draining_ || !connections_.empty() || !retired_.empty()) return;
  // A callback may destroy the server.
  std::vector<std::function<void()>> callbacks;
  callbacks.swap(drain_done_);
  for (const auto& callback : callbacks) callback();
}

NbdStats NbdServer::stats() const {
  NbdStats stats = totals_;
  stats.connections = connections_.size();
  for (const auto& connection : connections_)
    if (connection->phase() == NbdConnection::Phase::Handshake) ++stats.handshakes;
  stats.inflight_bytes = inflight_bytes_;
  return stats;
}

}  // namespace vmferry
