// SPDX-License-Identifier: Apache-2.0
#include "blockdev/durable_record.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <optional>

#include "engine/base/hash.h"
#include "tests/sim/sim_disk.h"

namespace vmferry {
namespace {

constexpr DurableRecordPlace kPlace{.offset = 512, .slot_size = 1024, .kind = record_kind("TEST"), .version = 2};

class DurableRecordTest : public ::testing::Test {
 protected:
  using Loaded = Result<std::optional<Bytes>>;

  Loaded load(DurableRecord& record) {
    std::optional<Loaded> result;
    record.load([&](Loaded loaded) { result = std::move(loaded); });
    EXPECT_FALSE(result) << "never inline";
    EXPECT_TRUE(world.run_until([&] { return result.has_value(); }));
    return *result;
  }
  Loaded load_fresh() {
    DurableRecord record(disk, kPlace);
    return load(record);
  }
  Status save(DurableRecord& record, Bytes payload) {
    std::optional<Status> result;
    record.save(std::move(payload), [&](Status status) { result = std::move(status); });
    EXPECT_TRUE(world.run_until([&] { return result.has_value(); }));
    return *result;
  }

  sim::SimWorld world{1};
  sim::SimExecutor& executor = world.add_executor("daemon");
  sim::SimDisk disk{executor, 8192};
};

// "Nothing was ever saved" and "what was saved is damaged" lead to opposite decisions.
TEST_F(DurableRecordTest, EmptyIsNotCorrupt) {
  DurableRecord record(disk, kPlace);
  const Loaded empty = load(record);
  ASSERT_TRUE(empty);
  EXPECT_FALSE(*empty);
  disk.poke(kPlace.offset + 700, Bytes(1, 1));
  const Loaded torn_first = load_fresh();
  ASSERT_TRUE(torn_first) << "a first save that was cut short was never reported";
  EXPECT_FALSE(*torn_first);
  disk.poke(kPlace.offset + kPlace.slot_size, Bytes(1, 1));
  const Loaded corrupt = load_fresh();
  ASSERT_FALSE(corrupt);
  EXPECT_EQ(corrupt.error().kind, ErrorKind::Corrupt);
}

// A daemon that comes back with an older role than it acted upon is a second primary.
TEST_F(DurableRecordTest, EverySaveIsFoundAfterAPowerCut) {
  DurableRecord record(disk, kPlace);
  ASSERT_TRUE(load(record));
  for (uint8_t i = 1; i < 10; ++i) {
    ASSERT_TRUE(save(record, Bytes(i, i)));
    disk.power_cut();
    const Loaded found = load_fresh();
    ASSERT_TRUE(found && *found);
    EXPECT_EQ(**found, Bytes(i, i));
  }
}

// Whatever a torn write leaves in one slot, the other one still says what was durable before.
TEST_F(DurableRecordTest, TornAtEveryByteLeavesTheOlderOrTheNewer) {
  DurableRecord record(disk, kPlace);
  ASSERT_TRUE(load(record));
  ASSERT_TRUE(save(record, Bytes(100, 1)));
  ASSERT_TRUE(save(record, Bytes(200, 2)));
  ASSERT_TRUE(save(record, Bytes(200, 2)));
  const Bytes before = disk.content();
  ASSERT_TRUE(save(record, Bytes(300, 3)));
  const Bytes after = disk.content();
  for (size_t torn = 0; torn <= kPlace.slot_size; ++torn) {
    Bytes mixed = before;
    std::copy_n(after.begin() + 512, torn, mixed.begin() + 512);
    disk.poke(0, mixed);
    const Loaded found = load_fresh();
    ASSERT_TRUE(found && *found) << torn;
    EXPECT_TRUE(**found == Bytes(200, 2) || **found == Bytes(300, 3)) << torn;
  }
  disk.poke(0, after);
  EXPECT_EQ(**load_fresh(), Bytes(300, 3));
}

// A daemon that cannot start because its very first record was torn would need an operator for nothing.
TEST_F(DurableRecordTest, CutInTheMiddleOfASaveKeepsOneOfTheTwo) {
  for (uint64_t seed = 1; seed < 200; ++seed) {
    sim::SimWorld other(seed);
    sim::SimExecutor& process = other.add_executor("daemon");
    sim::SimDisk device(process, 8192);
    std::optional<uint8_t> durable;
    {
      DurableRecord record(device, kPlace);
      record.load([&](Loaded) {
        for (uint8_t i = 1; i < 20; ++i) {
          record.save(Bytes(900, i), [&durable, i](Status status) {
            EXPECT_TRUE(status);
            EXPECT_EQ(durable.value_or(0) + 1, i) << "saves complete in order";
            durable = i;
          });
        }
      });
      const uint64_t steps = other.random().below(40);
      for (uint64_t step = 0; step < steps; ++step) other.step();
      process.kill();
    }
    device.power_cut();
    DurableRecord record(device, kPlace);
    std::optional<Loaded> found;
    record.load([&](Loaded loaded) { found = std::move(loaded); });
    ASSERT_TRUE(other.run_until([&] { return found.has_value(); }));
    ASSERT_TRUE(*found) << "seed=" << seed;
    if (!durable) continue;  // nothing was promised yet
    ASSERT_TRUE(**found) << "seed=" << seed;
    const uint8_t value = (***found)[0];
    EXPECT_TRUE(value == *durable || value == *durable + 1) << "seed=" << seed;
  }
}

// A daemon that dies while it saves leaves the record in the host's cache; the next one acts on it, and a power cut
// then must not bring back the one before: that was two owners in the simulator.
TEST_F(DurableRecordTest, WhatWasLoadedIsDurable) {
  uint64_t newer_seen = 0;
  for (uint64_t seed = 1; seed < 100; ++seed) {
    sim::SimWorld other(seed);
    sim::SimExecutor& process = other.add_executor("daemon");
    sim::SimDisk device(process, 8192);
    const auto load_from = [&](DurableRecord& record) {
      std::optional<Loaded> found;
      record.load([&](Loaded loaded) { found = std::move(loaded); });
      EXPECT_TRUE(other.run_until([&] { return found.has_value(); }));
      return (**found).value_or(Bytes{0})[0];
    };
    {
      DurableRecord record(device, kPlace);
      load_from(record);
      bool first = false;
      record.save(Bytes(8, 1), [&](Status) { first = true; });
      ASSERT_TRUE(other.run_until([&] { return first; }));
      record.save(Bytes(8, 2), [](Status) {});
      process.kill();
    }
    device.daemon_died();
    DurableRecord second(device, kPlace);
    const uint8_t seen = load_from(second);
    newer_seen += seen == 2 ? 1U : 0U;
    process.kill();
    device.power_cut();
    DurableRecord third(device, kPlace);
    EXPECT_EQ(load_from(third), seen) << "seed=" << seed;
  }
  EXPECT_GT(newer_seen, 10U);
}

// A program that overwrites what a newer one wrote destroys what it cannot read.
TEST_F(DurableRecordTest, NewerVersionIsRefusedBeforeAnythingIsWritten) {
  DurableRecordPlace newer = kPlace;
  newer.version = 3;
  DurableRecord writer(disk, newer);
  ASSERT_TRUE(load(writer));
  ASSERT_TRUE(save(writer, Bytes(10, 1)));
  const Bytes before = disk.content();
  DurableRecord record(disk, kPlace);
  const Loaded refused = load(record);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::Mismatch);
  const Status saved = save(record, Bytes(1, 1));
  ASSERT_FALSE(saved);
  EXPECT_EQ(saved.error().kind, ErrorKind::Mismatch);
  EXPECT_EQ(disk.content(), before);
}

TEST_F(DurableRecordTest, AnotherKindOfRecordIsCorrupt) {
  DurableRecordPlace other = kPlace;
  other.kind = record_kind("OTHR");
  DurableRecord writer(disk, other);
  ASSERT_TRUE(load(writer));
  ASSERT_TRUE(save(writer, Bytes(10, 1)));
  const Loaded found = load_fresh();
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().kind, ErrorKind::Corrupt);
}

// After a failed write the slot may hold anything: the next save must not take the only intact one.
TEST_F(DurableRecordTest, FailedSaveKeepsTheIntactSlot) {
  DurableRecord record(disk, kPlace);
  ASSERT_TRUE(load(record));
  ASSERT_TRUE(save(record, Bytes(10, 1)));
  disk.on_submit = [](const BlockRequest& request) { return request.op == BlockOp::Write ? EIO : 0; };
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(save(record, Bytes(10, 2)));
  disk.on_submit = {};
  const Loaded found = load_fresh();
  ASSERT_TRUE(found && *found);
  EXPECT_EQ((**found)[0] == 1 || (**found)[0] == 2, true);
  ASSERT_TRUE(save(record, Bytes(10, 3)));
  EXPECT_EQ(**load_fresh(), Bytes(10, 3));
}

TEST_F(DurableRecordTest, BytesAreGolden) {
  DurableRecord record(disk, kPlace);
  ASSERT_TRUE(load(record));
  ASSERT_TRUE(save(record, Bytes{0xaa, 0xbb}));
  const ByteSpan slot = ByteSpan(disk.content()).subspan(512, 66);
  EXPECT_EQ(to_hex(slot.first(24)),
            "564d5244"
            "01000200"
            "54455354"
            "02000000"
            "0100000000000000");
  EXPECT_EQ(to_hex(slot.subspan(64)), "aabb");
  EXPECT_EQ(ByteReader(slot.subspan(60)).le32(), crc32c(slot.subspan(64), crc32c(slot.first(60))));
}

}  // namespace
}  // namespace vmferry
