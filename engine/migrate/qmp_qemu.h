// SPDX-License-Identifier: Apache-2.0
//
// The real Qemu: a QEMU process behind a QMP socket (tested with 7.2 and 10.0).
//
// The migration channel is a socketpair whose other end goes to QEMU by getfd (SCM_RIGHTS), so no path and no port is
// involved. Capabilities are set only where QEMU lists them and only when they differ; what they were is kept by the
// caller, durably, for restore_capabilities(). Threads: the reactor's.
#pragma once

#include "engine/migrate/process_handle.h"
#include "engine/migrate/qemu_facts.h"
#include "engine/migrate/qmp_client.h"

namespace vmferry {

class QmpQemu final : public Qemu {
 public:
  QmpQemu(Reactor& reactor, std::string qmp_path);

  void set_events(QemuEvents events) override { events_ = std::move(events); }
  void connect(Done done) override;
  bool connected() const override { return client_.connected(); }
  ProcessIdentity identity() const override;
  ProcessFate fate(const ProcessIdentity& of) const override;
  void query(std::function<void(Result<QemuState>)> done) override;
  void capabilities(std::function<void(Result<std::string>)> done) override;
  void restore_capabilities(const std::string& on, Done done) override;
  void migrate_out(const MigrateOptions& options,
                   std::function<void(Result<std::unique_ptr<ByteStream>>)> done) override;
  void set_switchover_bandwidth(uint64_t bytes_per_second) override;
  void migrate_continue(Done done) override;
  void migrate_cancel(Done done) override;
  void migrate_in(std::function<void(Result<std::unique_ptr<ByteStream>>)> done) override;
  void announce_self(Done done) override;
  void stop(Done done) override;
  void cont(Done done) override;
  void quit(Done done) override;
  void kill(Done done) override;

  // What preflight compares; on a connected QEMU.
  void preflight_facts(std::function<void(Result<QemuFacts>)> done);
  const std::string& path() const { return path_; }

 private:
  void find_vhost_disks(const std::shared_ptr<QemuFacts>& facts);
  enum class Side : uint8_t { Source, Destination };
  using StreamDone = std::function<void(Result<std::unique_ptr<ByteStream>>)>;
  struct Setup;  // one migrate_out or migrate_in under way

  void command(std::string_view name, const Json& arguments, Done done);
  void reached(const PeerCredentials& credentials);
  void event(const qmp::Event& event);
  void set_capabilities(Side side, Done done);
  void set_parameters(const MigrateOptions& options, Done done);
  void restore_parameters(Done done);
  void start_channel(std::shared_ptr<Setup> setup);
  void give_up(std::shared_ptr<Setup> setup, Error error);
  void died();

  Reactor& reactor_;
  std::string path_;
  QmpClient client_;
  std::unique_ptr<ProcessHandle> process_;
  ProcessIdentity identity_;
  QemuEvents events_;
  Json parameters_before_ = Json::object();  // what restore_capabilities() sets back
  bool knows_switchover_bandwidth_ = false;
  uint64_t channel_next_ = 1;
  Done kill_done_;
  Timer kill_timeout_;
  Alive alive_;
};

RunState parse_run_state(std::string_view text);
MigrationState parse_migration_state(std::string_view text);

}  // namespace vmferry
