// SPDX-License-Identifier: Apache-2.0
//
// The QMP driver against real QEMU processes.
#include "engine/migrate/qmp_qemu.h"

#include <gtest/gtest.h>

#include "netproto/qemu/migration_stream.h"
#include "tests/unit/migrate/qemu_process.h"

namespace vmferry {
namespace {

// Passes one direction on, as the two daemons do, and reads along.
struct Relay final : StreamHandler {
  ByteStream* to = nullptr;
  MigrationStreamParser parser;
  bool ended = false;
  void stream_readable(ByteSpan bytes) override {
    parser.feed(bytes);
    to->write(bytes);
  }
  void stream_writable() override {}
  void stream_closed(Errno) override {
    ended = true;
    to->close_after_writing();
  }
};
struct Ignore final : StreamHandler {
  bool closed = false;
  void stream_readable(ByteSpan) override {}
  void stream_writable() override {}
  void stream_closed(Errno) override { closed = true; }
};

class QmpQemuTest : public testing::TestWithParam<QemuBinary> {
 protected:
  void SetUp() override {
    reactor = std::move(*Reactor::create());
    std::string pattern = "/tmp/vmferry-qemu-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder = pattern;
    disk = folder + "/disk";
    { UniqueFd(::open(disk.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600)); }
    ASSERT_EQ(truncate(disk.c_str(), 1 << 20), 0);
  }
  void TearDown() override {
    source.reset();
    destination.reset();
    std::filesystem::remove_all(folder);
  }
  std::unique_ptr<QemuProcess> start(const std::string& name, std::vector<std::string> extra = {}) {
    const std::vector<std::string> common = {"-m",        "16",
                                             "-blockdev", "driver=file,filename=" + disk + ",locking=off,node-name=f0",
                                             "-blockdev", "driver=raw,file=f0,node-name=n0",
                                             "-device",   "virtio-blk-pci,drive=n0,id=disk0"};
    extra.insert(extra.begin(), common.begin(), common.end());
    return std::make_unique<QemuProcess>(GetParam().path, folder, name, extra);
  }
  Status wait(const std::function<void(Qemu::Done)>& call) {
    std::optional<Status> result;
    call([&](Status status) { result = std::move(status); });
    EXPECT_FALSE(result) << "never inline";
    EXPECT_TRUE(reactor->run_until([&] { return result.has_value(); }, 30 * kSecond));
    return result.value_or(fail(ErrorKind::Timeout, "no answer"));
  }
  template <typename T, typename Call>
  Result<T> get(Call call) {
    std::optional<Result<T>> result;
    call([&](Result<T> value) { result = std::move(value); });
    EXPECT_TRUE(reactor->run_until([&] { return result.has_value(); }, 30 * kSecond));
    return result ? std::move(*result) : Result<T>(fail(ErrorKind::Timeout, "no answer"));
  }
  QemuState state(QmpQemu& qemu) {
    auto result = get<QemuState>([&](auto done) { qemu.query(done); });
    EXPECT_TRUE(result.has_value());
    return result.value_or(QemuState{});
  }
  bool until(QmpQemu& qemu, MigrationState wanted) {
    for (int i = 0; i < 1000; ++i) {
      if (state(qemu).migration == wanted) return true;
      reactor->run_until([] { return false; }, 10 * kMillisecond);
    }
    return false;
  }
  std::string capabilities(QmpQemu& qemu) {
    const auto on = get<std::string>([&](auto done) { qemu.capabilities(done); });
    EXPECT_TRUE(on.has_value());
    return on.value_or("");
  }
  void set(const std::string& socket, const std::vector<std::string>& names) {
    QmpClient client(*reactor);
    ASSERT_TRUE(wait([&](auto done) {
      client.connect(
          socket, [](const auto&) {}, done);
    }));
    Json wanted = Json::array();
    for (const std::string& name : names) wanted.push_back({{"capability", name}, {"state", true}});
    ASSERT_TRUE(get<Json>([&](auto done) {
      client.execute("migrate-set-capabilities", {{"capabilities", wanted}}, done);
    }));
  }
  std::vector<std::string> enabled(const std::string& socket) {
    QmpClient client(*reactor);
    EXPECT_TRUE(wait([&](auto done) {
      client.connect(
          socket, [](const auto&) {}, done);
    }));
    auto listed = get<Json>([&](auto done) { client.execute("query-migrate-capabilities", nullptr, done); });
    std::vector<std::string> names;
    for (const Json& entry : *listed)
      if (qmp::flag_of(entry, "state")) names.push_back(qmp::text_of(entry, "capability"));
    return names;
  }

  std::unique_ptr<Reactor> reactor;
  std::string folder;
  std::string disk;
  std::unique_ptr<QemuProcess> source, destination;
};

INSTANTIATE_TEST_SUITE_P(Real, QmpQemuTest, testing::ValuesIn(qemu_binaries()),
                         [](const auto& info) { return info.param.name; });

// The whole way: a source that waits at pre-switchover, a destination that ends paused, and only then runs.
TEST_P(QmpQemuTest, MigratesThroughOurStreamsAndEndsPaused) {
  source = start("a");
  destination = start("b", {"-incoming", "defer"});
  QmpQemu a(*reactor, source->socket());
  QmpQemu b(*reactor, destination->socket());
  ASSERT_TRUE(wait([&](auto done) { a.connect(done); }));
  ASSERT_TRUE(wait([&](auto done) { b.connect(done); }));
  const std::string on_at_b = capabilities(b);
  std::vector<MigrationState> seen;
  std::vector<RunState> runs;
  a.set_events({.run_state = [&](RunState run) { runs.push_back(run); },
                .migration_state = [&](MigrationState next) { seen.push_back(next); },
                .connection_lost = {},
                .process_dead = {}});
  EXPECT_EQ(state(a).run, RunState::Running);
  EXPECT_EQ(state(b).run, RunState::InMigrate);

  auto to = get<std::unique_ptr<ByteStream>>([&](auto done) { b.migrate_in(done); });
  ASSERT_TRUE(to.has_value()) << to.error().text;
  auto from =
      get<std::unique_ptr<ByteStream>>([&](auto done) { a.migrate_out({.downtime_limit = 100 * kMillisecond}, done); });
  ASSERT_TRUE(from.has_value()) << from.error().text;
  Relay relay;
  Ignore ignore;
  relay.to = to->get();
  (*to)->set_handler(&ignore);
  (*from)->set_handler(&relay);
  ASSERT_TRUE(until(a, MigrationState::PreSwitchover));
  EXPECT_EQ(relay.parser.phase(), MigrationStreamParser::Phase::Sections) << relay.parser.reason();
  ASSERT_TRUE(wait([&](auto done) { a.migrate_continue(done); }));
  ASSERT_TRUE(until(a, MigrationState::Completed));
  // QEMU says completed a moment before it leaves finish-migrate.
  for (int tries = 0; tries < 500 && state(a).run != RunState::PostMigrate; ++tries) usleep(10'000);
  EXPECT_EQ(state(a).run, RunState::PostMigrate);
  ASSERT_TRUE(until(b, MigrationState::Completed));
  EXPECT_EQ(state(b).run, RunState::Paused) << "must not run before it may";
  EXPECT_EQ(relay.parser.phase(), MigrationStreamParser::Phase::Tail) << relay.parser.reason();
  EXPECT_GT(relay.parser.figures().pages_zero, 1000U);
  EXPECT_GT(relay.parser.figures().pages_data, 10U);
  EXPECT_GT(relay.parser.figures().tail_bytes, 10'000U);
  EXPECT_NE(capabilities(b), on_at_b);
  ASSERT_TRUE(wait([&](auto done) { b.restore_capabilities(on_at_b, done); }));
  EXPECT_EQ(capabilities(b), on_at_b);
  ASSERT_TRUE(wait([&](auto done) { b.cont(done); }));
  EXPECT_EQ(state(b).run, RunState::Running);
  ASSERT_TRUE(wait([&](auto done) { b.announce_self(done); }));
  EXPECT_EQ(std::count(runs.begin(), runs.end(), RunState::Paused), 1);
  EXPECT_TRUE(std::count(seen.begin(), seen.end(), MigrationState::PreSwitchover) == 1);
  EXPECT_NE(capabilities(a).find("pause-before-switchover"), std::string::npos);
  ASSERT_TRUE(wait([&](auto done) { a.restore_capabilities(on_at_b, done); }));
  EXPECT_EQ(capabilities(a), on_at_b) << "also in postmigrate";

  auto again = get<std::unique_ptr<ByteStream>>([&](auto done) { b.migrate_in(done); });
  ASSERT_FALSE(again.has_value()) << "a used destination is not fresh";
  EXPECT_EQ(again.error().kind, ErrorKind::Mismatch);
}

// Design section 6: after migrate_cancel at pre-switchover the guest runs again by itself, and a new attempt works.
TEST_P(QmpQemuTest, CancelAtPreSwitchoverRunsAgainAndCapabilitiesComeBack) {
  source = start("a");
  set(source->socket(), {"xbzrle", "auto-converge"});  // the operator's; the second one is none of ours
  const auto before = enabled(source->socket());
  std::string on;
  {
    QmpQemu a(*reactor, source->socket());
    ASSERT_TRUE(wait([&](auto done) { a.connect(done); }));
    on = capabilities(a);
    EXPECT_NE(on.find("xbzrle"), std::string::npos) << on;
    EXPECT_EQ(on.find("auto-converge"), std::string::npos) << on;
    for (int attempt = 0; attempt < 2; ++attempt) {
      auto from = get<std::unique_ptr<ByteStream>>([&](auto done) { a.migrate_out({}, done); });
      ASSERT_TRUE(from.has_value()) << from.error().text;
      Ignore ignore;
      (*from)->set_handler(&ignore);
      ASSERT_TRUE(until(a, MigrationState::PreSwitchover));
      EXPECT_NE(state(a).run, RunState::Running);
      ASSERT_TRUE(wait([&](auto done) { a.migrate_cancel(done); }));
      ASSERT_TRUE(until(a, MigrationState::Cancelled));
      ASSERT_TRUE(reactor->run_until([&] { return ignore.closed; }, 5 * kSecond));
      for (int i = 0; i < 500 && state(a).run != RunState::Running; ++i)
        reactor->run_until([] { return false; }, 10 * kMillisecond);
      EXPECT_EQ(state(a).run, RunState::Running);
    }
  }
  EXPECT_NE(enabled(source->socket()), before);
  {
    QmpQemu restarted(*reactor, source->socket());
    ASSERT_TRUE(wait([&](auto done) { restarted.connect(done); }));
    ASSERT_TRUE(wait([&](auto done) { restarted.restore_capabilities(on, done); }));
  }
  EXPECT_EQ(enabled(source->socket()), before);
}

// A QEMU that reads slowly is the only brake there is: unread, it must not reach pre-switchover.
TEST_P(QmpQemuTest, SourceIsHeldBackByNotReading) {
  source = start("a");
  QmpQemu a(*reactor, source->socket());
  ASSERT_TRUE(wait([&](auto done) { a.connect(done); }));
  auto from = get<std::unique_ptr<ByteStream>>([&](auto done) { a.migrate_out({}, done); });
  ASSERT_TRUE(from.has_value()) << from.error().text;
  reactor->run_until([] { return false; }, 700 * kMillisecond);
  EXPECT_EQ(state(a).migration, MigrationState::Active);
  EXPECT_EQ(state(a).run, RunState::Running);
}

TEST_P(QmpQemuTest, FactsNameMachineCpuAndWhereTheDisksAre) {
  source = start("a", {"-smp", "2"});
  QmpQemu a(*reactor, source->socket());
  ASSERT_TRUE(wait([&](auto done) { a.connect(done); }));
  auto facts = get<QemuFacts>([&](auto done) { a.preflight_facts(done); });
  ASSERT_TRUE(facts.has_value()) << facts.error().text;
  EXPECT_GE(facts->version_major, 7);
  EXPECT_NE(facts->machine.find("i440fx"), std::string::npos) << facts->machine;
  EXPECT_EQ(facts->cpu_model, "qemu64-x86_64-cpu");
  EXPECT_EQ(facts->cpu_count, 2U);
  EXPECT_EQ(facts->memory_size, 16U << 20);
  EXPECT_TRUE(facts->blocked_reasons.empty());
  EXPECT_FALSE(facts->ever_migrated);
  ASSERT_EQ(facts->disks.size(), 1U);
  EXPECT_EQ(facts->disks[0].file, disk);
  EXPECT_NE(facts->disks[0].device.find("disk0"), std::string::npos);
  EXPECT_TRUE(facts->disks[0].writable);
  EXPECT_EQ(facts->disks[0].size, 1U << 20);
  EXPECT_FALSE(facts->kvm);
  EXPECT_EQ(facts->reconnect_delay, std::optional<bool>(false));
}

// QEMU's replies leave a node's reconnect-delay out, so it is looked for where it was given.
TEST_P(QmpQemuTest, ReconnectDelayIsSeenOnTheCommandLine) {
  source = start("a", {"-fw_cfg", "name=opt/note,string=reconnect-delay"});
  QmpQemu a(*reactor, source->socket());
  ASSERT_TRUE(wait([&](auto done) { a.connect(done); }));
  auto facts = get<QemuFacts>([&](auto done) { a.preflight_facts(done); });
  ASSERT_TRUE(facts.has_value()) << facts.error().text;
  EXPECT_EQ(facts->reconnect_delay, std::optional<bool>(true));
  EXPECT_EQ(command_line_has(0, "reconnect-delay"), std::nullopt) << "no process, no answer";
}

// Ownership may return only when the destination is proved dead: a wrong proof means two running guests.
TEST_P(QmpQemuTest, DeathIsProvedByThePidfdNotByTheSocket) {
  source = start("a");
  QmpQemu a(*reactor, source->socket());
  bool dead = false;
  a.set_events({.run_state = {}, .migration_state = {}, .connection_lost = {}, .process_dead = [&] { dead = true; }});
  ASSERT_TRUE(wait([&](auto done) { a.connect(done); }));
  const ProcessIdentity identity = a.identity();
  EXPECT_EQ(identity.pid, source->pid());
  EXPECT_EQ(a.fate(identity), ProcessFate::Alive);
  ProcessIdentity other = identity;
  ++other.start_time;
  EXPECT_EQ(a.fate(other), ProcessFate::Dead) << "its number belongs to another process now";
  other = identity;
  other.boot_id = "another boot";
  EXPECT_EQ(a.fate(other), ProcessFate::Dead);
  EXPECT_EQ(a.fate({}), ProcessFate::Unknown);
  ASSERT_TRUE(wait([&](auto done) { a.kill(done); }));
  EXPECT_TRUE(dead);
  EXPECT_EQ(a.fate(identity), ProcessFate::Dead);
  QmpQemu fresh(*reactor, source->socket());
  EXPECT_EQ(fresh.fate(identity), ProcessFate::Dead) << "a zombie is dead, also for a restarted daemon";
  EXPECT_FALSE(wait([&](auto done) { fresh.connect(done); }));
}

TEST_P(QmpQemuTest, QuitEndsQemuAndALostConnectionIsReported) {
  source = start("a");
  QmpQemu a(*reactor, source->socket());
  bool lost = false;
  bool dead = false;
  a.set_events({.run_state = {},
                .migration_state = {},
                .connection_lost = [&] { lost = true; },
                .process_dead = [&] { dead = true; }});
  ASSERT_TRUE(wait([&](auto done) { a.connect(done); }));
  EXPECT_TRUE(wait([&](auto done) { a.quit(done); }));
  EXPECT_TRUE(reactor->run_until([&] { return lost && dead; }, 10 * kSecond));
  EXPECT_FALSE(a.connected());
  EXPECT_FALSE(wait([&](auto done) { a.cont(done); }));
}

// A stopped (hung) QEMU neither greets nor dies, and yet its process has to be known to be killed.
TEST_P(QmpQemuTest, HungQemuIsIdentifiedAndKilled) {
  source = start("a");
  ::kill(source->pid(), SIGSTOP);
  QmpQemu a(*reactor, source->socket());
  const Status status = wait([&](auto done) { a.connect(done); });
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().kind, ErrorKind::Timeout);
  EXPECT_EQ(a.identity().pid, source->pid());
  EXPECT_EQ(a.fate(a.identity()), ProcessFate::Alive);
  EXPECT_TRUE(wait([&](auto done) { a.kill(done); }));
}

// A vhost-user-blk disk that is not found would not be compared between the two QEMUs.
constexpr const char* kPeripherals =
    R"([{"name":"vd0","type":"child<vhost-user-blk-pci>"},{"name":"type","type":"string"},
    {"name":"vd1","type":"child<virtio-blk-pci>"},{"name":"vd2","type":"child<vhost-user-blk-pci-transitional>"},
    {"name":"x","type":"link<vhost-user-blk-pci>"},{"type":"child<vhost-user-blk-pci>"},7])";
constexpr const char* kChardevs =
    R"([{"label":"a","filename":"unix:/run/a.sock"},{"label":"b","filename":"disconnected:unix:/run/b,c.sock"},
    {"label":"c","filename":"unix:/run/c.sock,server=on"},{"label":"d","filename":"file"},{"label":"e"},null])";

TEST(QemuFacts, VhostDisksAndTheirSockets) {
  EXPECT_EQ(parse_vhost_devices(Json::parse(kPeripherals)), (std::vector<std::string>{"vd0", "vd2"}));
  EXPECT_TRUE(parse_vhost_devices(Json::object()).empty());
  EXPECT_EQ(parse_chardev_sockets(Json::parse(kChardevs)),
            (std::map<std::string, std::string>{{"a", "/run/a.sock"}, {"b", "/run/b,c.sock"}, {"c", "/run/c.sock"}}));
  EXPECT_TRUE(parse_chardev_sockets(nullptr).empty());
}

TEST(QemuFacts, DiskFileNamesOfEveryForm) {
  const auto parse = [](const std::string& file) {
    QemuDisk disk;
    disk.file = file;
    parse_disk_file(disk);
    return disk;
  };
  EXPECT_EQ(parse("nbd+unix:///vda?socket=/run/a%20b.sock").nbd_socket, "/run/a b.sock");
  EXPECT_EQ(parse("nbd+unix:///vda?socket=/run/a.sock").nbd_export, "vda");
  EXPECT_EQ(parse("nbd+unix://?socket=/run/a.sock").nbd_export, "");
  EXPECT_EQ(parse("nbd://127.0.0.1:10810/vdb").nbd_port, 10810);
  EXPECT_EQ(parse("nbd://host/vdb").nbd_port, 10809);
  EXPECT_EQ(parse("nbd://[::1]:5/x").nbd_host, "::1");
  EXPECT_EQ(parse(R"(json:{"driver":"nbd","server":{"type":"unix","path":"/s"},"export":"e"})").nbd_socket, "/s");
  EXPECT_EQ(parse(R"(json:{"driver":"raw","file":{"driver":"nbd","server.path":"/s","export":"e"}})").nbd_socket, "/s");
  EXPECT_EQ(parse(R"(json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"7"}})").nbd_port, 7);
  for (const char* other : {"/a/b", "", "json:", "json:{", "json:[]", "nbd://", "nbd+unix://x", "nbd://h:99999/x"})
    EXPECT_FALSE(parse(other).is_nbd()) << other;
}

}  // namespace
}  // namespace vmferry
