// SPDX-License-Identifier: Apache-2.0
//
// A real QEMU's stream through MemorySource and MemorySink into another real QEMU.
#include <gtest/gtest.h>

#include "engine/migrate/qmp_qemu.h"
#include "tests/unit/memory/loopback_channel.h"
#include "tests/unit/migrate/qemu_process.h"

namespace vmferry {
namespace {

class MemoryCarried : public testing::TestWithParam<QemuBinary> {
 protected:
  void SetUp() override {
    reactor = std::move(*Reactor::create());
    std::string pattern = "/tmp/vmferry-carried-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder); }
  template <typename T, typename Call>
  Result<T> get(Call call) {
    std::optional<Result<T>> result;
    call([&](Result<T> value) { result = std::move(value); });
    EXPECT_TRUE(reactor->run_until([&] { return result.has_value(); }, 30 * kSecond));
    return result ? std::move(*result) : Result<T>(fail(ErrorKind::Timeout, "no answer"));
  }
  QemuState state(QmpQemu& qemu) {
    return get<QemuState>([&](auto done) { qemu.query(done); }).value_or(QemuState{});
  }
  bool until(QmpQemu& qemu, MigrationState wanted) {
    for (int i = 0; i < 1000 && state(qemu).migration != wanted; ++i)
      reactor->run_until([] { return false; }, 10 * kMillisecond);
    return state(qemu).migration == wanted;
  }
  std::unique_ptr<Reactor> reactor;
  std::string folder;
};

INSTANTIATE_TEST_SUITE_P(Real, MemoryCarried, testing::ValuesIn(qemu_binaries()),
                         [](const auto& info) { return info.param.name; });

// The destination accepts the rebuilt stream only if it is byte-identical; the link is cut twice on the way.
TEST_P(MemoryCarried, GuestArrivesPausedAfterCutsOfTheLink) {
  QemuProcess source(GetParam().path, folder, "a", {"-m", "64"});
  QemuProcess destination(GetParam().path, folder, "b", {"-m", "64", "-incoming", "defer"});
  QmpQemu a(*reactor, source.socket());
  QmpQemu b(*reactor, destination.socket());
  ASSERT_TRUE(get<void>([&](auto done) { a.connect(done); }));
  ASSERT_TRUE(get<void>([&](auto done) { b.connect(done); }));
  auto to = get<std::unique_ptr<ByteStream>>([&](auto done) { b.migrate_in(done); });
  ASSERT_TRUE(to.has_value()) << to.error().text;
  auto from = get<std::unique_ptr<ByteStream>>([&](auto done) { a.migrate_out({}, done); });
  ASSERT_TRUE(from.has_value()) << from.error().text;

  const Id128 attempt = random_id();
  LoopbackLink link(*reactor, 2 * kMillisecond);
  link.connect();
  std::optional<bool> complete;
  bool ended = false;
  std::string error;
  MemorySink sink(*reactor, link.at_sink, std::move(*to), attempt,
                  {[&](bool equal) { complete = equal; }, [&](Error failure) { error = failure.text; }});
  link.sink = &sink;
  MemorySource carried(*reactor, link.at_source, std::move(*from), {.attempt = attempt, .held = true},
                       {[&] { ended = true; }, [&](Error failure) { error = failure.text; }});
  link.source = &carried;
  reactor->run_until([] { return false; }, 300 * kMillisecond);
  EXPECT_EQ(state(a).migration, MigrationState::Active) << "held: QEMU must not stop the guest";
  carried.hold(false);
  for (int i = 0; i < 2; ++i) {
    reactor->run_until([] { return false; }, 5 * kMillisecond);
    link.cut();
    reactor->run_until([] { return false; }, 5 * kMillisecond);
    link.connect();
  }
  ASSERT_TRUE(until(a, MigrationState::PreSwitchover)) << error;
  ASSERT_TRUE(get<void>([&](auto done) { a.migrate_continue(done); }));
  ASSERT_TRUE(until(a, MigrationState::Completed)) << error;
  EXPECT_EQ(state(a).run, RunState::PostMigrate);
  ASSERT_TRUE(reactor->run_until([&] { return complete.has_value(); }, 10 * kSecond)) << error;
  EXPECT_TRUE(*complete);
  EXPECT_TRUE(ended);
  ASSERT_TRUE(until(b, MigrationState::Completed)) << error;
  EXPECT_EQ(state(b).run, RunState::Paused);
  const MemorySourceFigures figures = carried.figures();
  EXPECT_EQ(figures.stream.total_bytes, figures.raw_bytes);
  EXPECT_GT(figures.stream.pages_zero, 10'000U);
  EXPECT_GT(figures.stream.tail_bytes, 10'000U);
  // Compressed to less than half, and each of the three connections may have carried all of it.
  EXPECT_LT(figures.wire_bytes, figures.raw_bytes / 2 * 3);
  EXPECT_LE(figures.delivered_bytes, figures.raw_bytes);
  ASSERT_TRUE(get<void>([&](auto done) { b.cont(done); }));
  EXPECT_EQ(state(b).run, RunState::Running);
}

}  // namespace
}  // namespace vmferry
