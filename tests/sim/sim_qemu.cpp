// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_qemu.h"

#include "engine/base/hash.h"
#include "engine/base/log.h"
#include "tests/sim/host.h"
#include "tests/sim/oracle.h"
#include "tests/sim/sim_stream.h"

namespace vmferry::sim {

namespace {

constexpr uint64_t kTailMagic = 0x5441494c53494d31;  // ends a whole stream
constexpr size_t kTrailerSize = 24;
constexpr size_t kPrecopyChunk = 2048;

}  // namespace

QemuProcess::QemuProcess(Host& host, SimExecutor& executor, Oracle& oracle, Start start, int64_t pid)
    : host_(host),
      executor_(executor),
      oracle_(oracle),
      pid_(pid),
      run_(start == Start::Boot ? RunState::Paused : RunState::InMigrate) {
  if (start == Start::Incoming) return;
  settle_ = true;
  memory_ = oracle.newest_memory(host) + 1;
  oracle.guest_stepped(host, memory_);
  set_run(RunState::Running);
  oracle_.guest_started(*this, host_, false);
  check_whole_disk();
}

QemuProcess::~QemuProcess() = default;

void QemuProcess::die() {
  if (!alive_) return;
  alive_ = false;
  run_ = RunState::Unknown;
  stream_.reset();
  host_.orphan_requests(executor_);
  outstanding_.clear();
  drain_waiters_.clear();
  executor_.kill();
  if (on_death) on_death();
}

QemuState QemuProcess::state() const {
  QemuState state;
  state.run = run_;
  state.migration = migration_;
  state.migration_error = error_;
  state.ram_remaining = precopy_left_;
  state.ram_total = 64U << 10;
  return state;
}

void QemuProcess::set_run(RunState run) {
  if (run_ == run) return;
  run_ = run;
  if (on_run_state) on_run_state(run);
  if (run == RunState::Running && !ticking_) {
    ticking_ = true;
    executor_.start_timer(kMillisecond, [this] { guest_tick(); });
  }
}

void QemuProcess::set_migration(MigrationState migration) {
  migration_ = migration;
  if (on_migration_state) on_migration_state(migration);
}

// --- Source

Status QemuProcess::migrate_out(std::unique_ptr<ByteStream> stream) {
  if (run_ != RunState::Running && run_ != RunState::Paused) {
    return fail(ErrorKind::InvalidArgument, "the guest is neither running nor paused");
  }
  if (migration_ == MigrationState::Active || migration_ == MigrationState::PreSwitchover ||
      migration_ == MigrationState::Device) {
    return fail(ErrorKind::Busy, "there is a migration already");
  }
  stream_ = std::move(stream);
  socket_gone_ = false;
  tail_sent_ = false;
  error_.clear();
  outgoing_.clear();
  precopy_left_ = (2 + executor_.world().random().below(10)) * kPrecopyChunk;
  set_migration(MigrationState::Setup);
  set_migration(MigrationState::Active);
  sending_ = true;
  stream_->set_handler(this);
  send_precopy();
  return {};
}

void QemuProcess::send_precopy() {
  Random& random = executor_.world().random();
  while (sending_ && precopy_left_ > 0 && stream_->unsent_bytes() == 0) {
    Bytes chunk(kPrecopyChunk);
    for (size_t i = 0; i < chunk.size(); i += 64) chunk[i] = static_cast<uint8_t>(random.next());
    outgoing_.insert(outgoing_.end(), chunk.begin(), chunk.end());
    precopy_left_ -= kPrecopyChunk;
    stream_->write(std::move(chunk));
  }
  if (!sending_ || precopy_left_ > 0 || stream_->unsent_bytes() > 0) return;
  // Everything has drained: QEMU stops the guest by itself, whatever the disks need.
  sending_ = false;
  executor_.start_timer(kMillisecond, [this] {
    if (migration_ == MigrationState::Active) reach_switchover();
  });
}

void QemuProcess::reach_switchover() {
  set_run(RunState::FinishMigrate);
  when_drained([this] {
    if (migration_ == MigrationState::Active) set_migration(MigrationState::PreSwitchover);
  });
}

Status QemuProcess::migrate_continue() {
  if (migration_ != MigrationState::PreSwitchover) return fail(ErrorKind::InvalidArgument, "not at pre-switchover");
  set_migration(MigrationState::Device);
  // Inactivating the disks flushes them.
  auto flush = std::make_unique<DiskRequest>();
  flush->request.op = BlockOp::Flush;
  flush->answer = [this](DiskRequest& request, Errno error) {
    std::erase(outstanding_, &request);
    if (error != 0) oracle_.violation(fmt::format("the flush of a stopped guest failed: {}", errno_text(error)));
    if (migration_ == MigrationState::Device) send_tail();
  };
  submit(std::move(flush));
  return {};
}

void QemuProcess::send_tail() {
  if (socket_gone_) return migration_failed("the socket was closed");
  Random& random = executor_.world().random();
  Bytes tail(1024 + random.below(30'000));
  for (size_t i = 0; i < tail.size(); i += 64) tail[i] = static_cast<uint8_t>(random.next());
  outgoing_.insert(outgoing_.end(), tail.begin(), tail.end());
  ByteWriter(tail).le64(kTailMagic).le64(memory_).le64(xxh3_64(outgoing_));
  tail_sent_ = true;
  stream_->write(std::move(tail));
  if (stream_->unsent_bytes() == 0) sent_all();
}

void QemuProcess::sent_all() {
  stream_->close_after_writing();
  stream_.reset();
  set_migration(MigrationState::Completed);
  const auto moment = static_cast<Nanoseconds>(executor_.world().random().below(3000)) * kMicrosecond;
  executor_.start_timer(moment, [this] {
    if (migration_ == MigrationState::Completed && run_ == RunState::FinishMigrate) set_run(RunState::PostMigrate);
  });
}

Status QemuProcess::migrate_cancel() {
  const bool stopped = run_ == RunState::FinishMigrate;
  switch (migration_) {
    case MigrationState::Setup:
    case MigrationState::Active:
    case MigrationState::PreSwitchover:
    case MigrationState::Device:
      sending_ = false;
      stream_.reset();
      set_migration(MigrationState::Cancelling);
      set_migration(MigrationState::Cancelled);
      if (stopped) {
        set_run(RunState::Running);
        oracle_.guest_started(*this, host_, false);
      }
      return {};
    default:
      return {};
  }
}

void QemuProcess::migration_failed(const char* why) {
  const bool stopped = run_ == RunState::FinishMigrate;
  sending_ = false;
  stream_.reset();
  error_ = why;
  set_migration(MigrationState::Failed);
  if (!stopped) return;
  set_run(RunState::Running);  // by itself
  oracle_.guest_started(*this, host_, false);
}

// --- Destination

Status QemuProcess::migrate_in(std::unique_ptr<ByteStream> stream) {
  if (run_ != RunState::InMigrate || used_) return fail(ErrorKind::InvalidArgument, "this QEMU was used already");
  used_ = true;
  stream_ = std::move(stream);
  set_migration(MigrationState::Active);
  stream_->set_handler(this);
  return {};
}

void QemuProcess::load() {
  if (incoming_.size() < kTrailerSize) return die();
  ByteReader trailer(ByteSpan(incoming_).last(kTrailerSize));
  if (trailer.le64() != kTailMagic) return die();  // a stream that is cut short
  memory_ = trailer.le64();
  if (trailer.le64() != xxh3_64(ByteSpan(incoming_).first(incoming_.size() - kTrailerSize))) {
    oracle_.violation("the memory stream was altered on its way");
    return die();
  }
  stream_.reset();
  // The end of the guest's life as one that can be loaded: completed, and paused because of the earlier `stop`.
  set_migration(MigrationState::Completed);
  set_run(RunState::Paused);
}

void QemuProcess::stream_readable(ByteSpan bytes) {
  incoming_.insert(incoming_.end(), bytes.begin(), bytes.end());
  // QEMU knows the end of its stream from the stream, not from the socket.
  if (incoming_.size() < kTrailerSize) return;
  if (ByteReader(ByteSpan(incoming_).last(kTrailerSize)).le64() != kTailMagic) return;
  executor_.start_timer(static_cast<Nanoseconds>(executor_.world().random().below(5'000)) * kMicrosecond, [this] {
    if (run_ == RunState::InMigrate) load();
  });
}

void QemuProcess::stream_writable() {
  if (sending_) return send_precopy();
  if (tail_sent_ && migration_ == MigrationState::Device && stream_ != nullptr) sent_all();
}

void QemuProcess::stream_closed(Errno) {
  if (used_ && run_ == RunState::InMigrate) {
    // Not inside the stream's own callback.
    return executor_.post([this] { load(); });
  }
  if (migration_ == MigrationState::PreSwitchover) {
    socket_gone_ = true;  // not noticed
    return;
  }
  if (migration_ == MigrationState::Active || migration_ == MigrationState::Device) {
    socket_gone_ = true;
    executor_.post([this] {
      if (migration_ == MigrationState::Active || migration_ == MigrationState::Device) {
        migration_failed("the socket was closed");
      }
    });
  }
}

// --- Run state

Status QemuProcess::stop() {
  if (run_ == RunState::Running) set_run(RunState::Paused);
  return {};
}

Status QemuProcess::cont() {
  if (run_ == RunState::Running) return {};
  if (run_ == RunState::InMigrate) return fail(ErrorKind::InvalidArgument, "the guest is not loaded");
  if (run_ == RunState::FinishMigrate) return fail(ErrorKind::InvalidArgument, "a migration is being finished");
  const bool arrived = used_;
  set_run(RunState::Running);
  oracle_.guest_started(*this, host_, true);
  if (arrived) check_whole_disk();
  return {};
}

void QemuProcess::when_drained(std::function<void()> action) {
  if (outstanding_.empty()) return executor_.post(std::move(action));
  drain_waiters_.push_back(std::move(action));
}

}  // namespace vmferry::sim
