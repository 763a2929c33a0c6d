// SPDX-License-Identifier: Apache-2.0
//
// The NBD export: serves BlockDevices by name to any number of clients.
//
// Flow: a listener hands accepted streams to accept(); each becomes an NbdConnection, which submits to the export's
// device. The server owns what connections share: the exports, the memory limit, the pools, and the order to stop.
// Source of truth: docs/nbd.md. Threads: one executor, the one of the devices.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "blockdev/block_device.h"
#include "blockdev/client_eras.h"
#include "blockdev/log_limit.h"
#include "blockdev/nbd/nbd_limits.h"
#include "blockdev/nbd/nbd_operation.h"
#include "blockdev/nbd/nbd_status_source.h"
#include "blockdev/transfer_buffers.h"
#include "engine/runtime/executor.h"
#include "engine/runtime/stream.h"
#include "netproto/tls/tls_credentials.h"

namespace vmferry {

struct NbdExport {
  std::string name{};  // also in NBD URIs: unix socket path + "/name"
  std::string description{};
  BlockDevice* device = nullptr;  // outlives the export: until remove_export or drain has called `done`
  ClientEras* clients = nullptr;  // of the device, if it knows eras; lives as long
  bool read_only = false;
  // Smallest unit offered to clients that ask for block sizes. 1 because the stores do read-modify-write themselves.
  uint32_t block_size_min = 1;
  const NbdStatusSource* status = nullptr;  // further meta contexts; outlives the export like the device
  // Not empty: only for clients that have proved one of these names through TLS (certificate's common name, PSK user).
  std::vector<std::string> tls_allow{};
};

// `credentials` are there unless the policy is Off.
struct NbdTls {
  nbd::TlsPolicy policy = nbd::TlsPolicy::Off;
  std::shared_ptr<const TlsCredentials> credentials{};
};

struct NbdStats {
  uint64_t connections = 0;        // now, in all phases
  uint64_t handshakes = 0;         // of these, not yet in transmission
  uint64_t connections_total = 0;  // since the start, without refused ones
  uint64_t refused_total = 0;      // over a limit, or evicted while in the handshake
  uint64_t requests_total = 0;
  uint64_t errors_total = 0;  // requests answered with an error
  uint64_t read_bytes_total = 0;
  uint64_t written_bytes_total = 0;
  uint64_t inflight_bytes = 0;
};

class NbdServer final : public nbd::ExportCatalog {
 public:
  NbdServer(Executor& executor, const NbdLimits& limits, NbdTls tls = {});
  // No operation is in flight: call drain() first and wait for `done`, unless nothing was ever accepted.
  ~NbdServer();
  NbdServer(const NbdServer&) = delete;
  NbdServer& operator=(const NbdServer&) = delete;

  // InvalidArgument for a name that NBD cannot carry, Exists for one that is taken.
  Status add_export(const NbdExport& config);
  // Refuses new requests of its clients with ESHUTDOWN, finishes those under way, closes the connections, then calls
  // `done` (never inline). NotFound for an unknown name.
  Status remove_export(std::string_view name, std::function<void()> done);
  // The export behind the empty name; without this the one that was added first.
  Status set_default_export(std::string_view name);

  void accept(std::unique_ptr<ByteStream> stream);
  // Stops for good: no new connection; the others as in remove_export.
  void drain(std::function<void()> done);

  NbdStats stats() const;

  std::optional<nbd::ExportInfo> find_export(std::string_view name) const override;
  std::vector<nbd::ExportInfo> list_exports() const override;

 private:
  friend class NbdConnection;

  struct Export {
    NbdExport config;
    size_t connection_count = 0;
    bool removed = false;  // no new connections, requests answered with ESHUTDOWN
    std::function<void()> removal_done;
  };

  // For connections.
  Export* bind(const std::string& name);  // nullptr when it went meanwhile
  void unbind(Export& target);
  // Takes `bytes` of the server-wide limit, or queues the connection and later calls its grant(bytes).
  bool admit(NbdConnection& connection, uint64_t bytes);
  void charge(uint64_t bytes) { inflight_bytes_ += bytes; }
  void release(uint64_t bytes);
  void stop_waiting(NbdConnection& connection);
  void retire(NbdConnection& connection);  // it is closed and idle: destroyed soon
  bool draining() const { return draining_; }

  void wake_waiters();
  void schedule_wake();
  void watch_for_stalls();
  bool make_room();  // for one more connection; false: it has to go
  void drain_connections(const std::function<bool(const NbdConnection&)>& chosen);
  void bury();
  void check_drained();
  nbd::ExportInfo describe(const NbdExport& config) const;
  Export* lookup(std::string_view name) const;

  Executor& executor_;
  const NbdLimits limits_;
  const NbdTls tls_;
  TransferBuffers buffers_;
  NbdOperationPool operations_;

  std::vector<std::unique_ptr<Export>> exports_;  // in the order added
  std::string default_export_;
  std::vector<std::unique_ptr<NbdConnection>> connections_;  // in the order accepted
  std::vector<std::unique_ptr<NbdConnection>> retired_;

  uint64_t inflight_bytes_ = 0;
  std::deque<NbdConnection*> waiters_;  // for server-wide memory, first come first served
  bool wake_scheduled_ = false;
  bool bury_scheduled_ = false;
  Timer stall_timer_;

  LogLimit refusals_;

  bool draining_ = false;
  std::vector<std::function<void()>> drain_done_;
  uint64_t connection_id_next_ = 1;
  NbdStats totals_;
  Alive alive_;
};

}  // namespace vmferry
