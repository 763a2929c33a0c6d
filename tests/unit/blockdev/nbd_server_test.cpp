// SPDX-License-Identifier: Apache-2.0
//
// The NBD server with its device: every command, every error path, disconnects and draining.
#include "blockdev/nbd/nbd_server.h"

#include <gtest/gtest.h>

#include "tests/unit/blockdev/nbd_test_support.h"

namespace vmferry {
namespace {

using namespace nbd_test;

constexpr uint64_t kDiskSize = 64_MiB;

Bytes pattern(size_t size, uint8_t seed) {
  Bytes bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(seed + i * 7 + i / 251);
  return bytes;
}

class NbdServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(server_->add_export({.name = "vda", .description = "first", .device = &disk_}).has_value());
  }
  void TearDown() override {
    disk_.holding = false;
    disk_.release_all();
    executor_.run();
    bool drained = false;
    server_->drain([&] { drained = true; });
    executor_.advance(kMinuteLong);
    EXPECT_TRUE(drained);
    EXPECT_EQ(server_->stats().inflight_bytes, 0U);
    EXPECT_EQ(server_->stats().connections, 0U);
    server_.reset();
    EXPECT_EQ(executor_.timer_count(), 0U);
  }
  static constexpr Nanoseconds kMinuteLong = 60 * kSecond;

  ManualExecutor executor_;
  RamDevice disk_{executor_, kDiskSize};
  std::unique_ptr<NbdServer> server_ = std::make_unique<NbdServer>(executor_, NbdLimits{});
};

TEST_F(NbdServerTest, WritesAndReadsBackWithSimpleReplies) {
  // The least that a disk has to do.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  const Bytes data = pattern(8192, 3);
  EXPECT_EQ(client.ask(kCmdWrite, 0, 4096, 8192, data), 0);
  client.send(request(kCmdRead, 0, 77, 4096, 8192));
  const auto reply = client.reply(8192);
  ASSERT_TRUE(reply.has_value());
  EXPECT_FALSE(reply->structured);
  EXPECT_EQ(reply->cookie, 77U);
  EXPECT_EQ(reply->data, data);
  EXPECT_TRUE(client.wire().received.empty());
}

// A content chunk never carries DONE while an error is still possible: ours is sent when all data is there.
TEST_F(NbdServerTest, StructuredReadIsOneContentChunkWithDone) {
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go({.structured = true}));
  const Bytes data = pattern(65536, 9);
  std::copy(data.begin(), data.end(), disk_.content().begin() + 512);
  for (const uint16_t flags : {uint16_t{0}, kFlagDf}) {
    client.send(request(kCmdRead, flags, 5, 512, 65536));
    const auto reply = client.reply();
    ASSERT_TRUE(reply.has_value());
    EXPECT_EQ(reply->type, 1);
    EXPECT_EQ(reply->flags, 1);
    ASSERT_EQ(reply->data.size(), 65536U + 8);
    EXPECT_EQ(ByteReader(reply->data).be64(), 512U);
    EXPECT_TRUE(std::equal(data.begin(), data.end(), reply->data.begin() + 8));
  }
}

TEST_F(NbdServerTest, ReadErrorsAreChunksOnceStructuredRepliesAreAgreed) {
  // A simple reply to a READ then is a protocol violation; data after an error would be read as the next reply.
  Client structured(executor_, *server_);
  ASSERT_TRUE(structured.go({.structured = true}));
  Client simple(executor_, *server_);
  ASSERT_TRUE(simple.go());
  disk_.next_error = EIO;
  structured.send(request(kCmdRead, 0, 1, 0, 4096));
  const auto chunk = structured.reply();
  ASSERT_TRUE(chunk.has_value());
  EXPECT_TRUE(chunk->structured);
  EXPECT_EQ(chunk->error, kEio);
  EXPECT_EQ(simple.ask(kCmdRead, 0, 0, 4096), kEio);
  EXPECT_TRUE(simple.wire().received.empty()) << "no payload after an error";
  structured.send(request(kCmdRead, 0, 1, kDiskSize, 4096));
  EXPECT_TRUE(structured.reply()->structured) << "also for a request that never reached the device";
  EXPECT_EQ(server_->stats().errors_total, 3U);
}

TEST_F(NbdServerTest, ErrorsOfTheDeviceReachTheClientAsWhatTheyAre) {
  // A secondary that refuses writes must say EPERM, a full disk ENOSPC: guests act on the difference.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  const Bytes data(512);
  const struct {
    Errno error;
    uint32_t expected;
  } rows[] = {{EPERM, kEperm},         {EIO, kEio},      {ENOSPC, kEnospc}, {EINVAL, kEinval}, {ENODEV, kEio},
              {ESHUTDOWN, kEshutdown}, {ENOMEM, kEnomem}};
  for (const auto& row : rows) {
    disk_.next_error = row.error;
    EXPECT_EQ(client.ask(kCmdWrite, 0, 0, 512, data), row.expected) << row.error;
  }
  disk_.next_error = 0;
  EXPECT_EQ(client.ask(kCmdWrite, 0, 0, 512, data), 0) << "an error does not end the session";
}

TEST_F(NbdServerTest, FuaFlushAndTrimReachTheDevice) {
  // FUA or FLUSH lost on the way is data lost at the next power cut (I3).
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  const Bytes data(4096, 1);
  EXPECT_EQ(client.ask(kCmdWrite, 0, 0, 4096, data), 0);
  EXPECT_FALSE(disk_.seen.back().fua);
  EXPECT_EQ(client.ask(kCmdWrite, kFlagFua, 0, 4096, data), 0);
  EXPECT_TRUE(disk_.seen.back().fua);
  EXPECT_EQ(client.ask(kCmdFlush, 0, 0, 0), 0);
  EXPECT_EQ(disk_.seen.back().op, BlockOp::Flush);
  EXPECT_EQ(client.ask(kCmdTrim, kFlagFua, 0, 4096), 0);
  EXPECT_EQ(disk_.seen.back().op, BlockOp::WriteZeroes) << "a discarded block has one defined content";
  EXPECT_TRUE(disk_.seen.back().may_unmap);
  EXPECT_TRUE(disk_.seen.back().fua);
  EXPECT_EQ(disk_.content()[0], 0);
  EXPECT_EQ(client.ask(kCmdRead, kFlagFua, 0, 512), 0) << "FUA on a read is accepted";
  EXPECT_EQ(client.ask(kCmdFlush, kFlagFua, 0, 0), 0);
  EXPECT_EQ(client.ask(kCmdCache, kFlagFua, 0, 4096), 0);
}

// NO_HOLE is mandatory once WRITE_ZEROES is advertised.
TEST_F(NbdServerTest, NoHoleKeepsTheBlocksAllocated) {
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  EXPECT_EQ(client.ask(kCmdWriteZeroes, kFlagNoHole, 0, 4096), 0);
  EXPECT_FALSE(disk_.seen.back().may_unmap);
  EXPECT_EQ(client.ask(kCmdWriteZeroes, 0, 0, 4096), 0);
  EXPECT_TRUE(disk_.seen.back().may_unmap);
  EXPECT_FALSE(disk_.seen.back().fast_only);
}

// A client told ENOTSUP relies on unchanged content; without the flag the answer is forbidden.
TEST_F(NbdServerTest, FastZeroFailsWithNotSupportedAndLeavesTheContent) {
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  disk_.content()[5] = 42;
  disk_.limits().can_fast_zero = false;
  EXPECT_EQ(client.ask(kCmdWriteZeroes, kFlagFastZero, 0, 4096), kEnotsup);
  EXPECT_EQ(disk_.content()[5], 42);
  disk_.next_error = ENOTSUP;
  EXPECT_EQ(client.ask(kCmdWriteZeroes, 0, 0, 4096), kEio);
  EXPECT_EQ(client.ask(kCmdTrim, 0, 0, 4096), kEio);
  disk_.next_error = 0;
  disk_.limits().can_fast_zero = true;
  EXPECT_EQ(client.ask(kCmdWriteZeroes, kFlagFastZero | kFlagNoHole, 0, 4096), 0);
  EXPECT_EQ(disk_.content()[5], 0);
}

TEST_F(NbdServerTest, CacheReadsTheWholeRangeInBoundedSteps) {
  // One buffer of the size of the range would let a client ask for 4 GiB of memory.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  EXPECT_EQ(client.ask(kCmdCache, 0, 4096, 5 << 20), 0);
  uint64_t next = 4096;
  for (const BlockRequest& step : disk_.seen) {
    EXPECT_EQ(step.op, BlockOp::Read);
    EXPECT_EQ(step.range.offset, next);
    EXPECT_LE(step.range.length, 1_MiB);
    next = step.range.end();
  }
  EXPECT_EQ(next, 4096 + 5_MiB);
  disk_.next_error = EIO;
  EXPECT_EQ(client.ask(kCmdCache, 0, 0, 5 << 20), kEio);
  EXPECT_EQ(client.error(), -1) << "one reply, not one for each step";
}

TEST_F(NbdServerTest, BlockStatusIsOneChunkOfMergedExtentsWithinTheRequest) {
  // Lengths beyond the request, or two chunks for one context, make clients drop the connection.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go({.structured = true, .base_allocation = true}));
  const Bytes data(8192, 1);
  EXPECT_EQ(client.ask(kCmdWrite, 0, 8192, 8192, data), 0);
  disk_.extents_too_long = true;
  client.send(request(kCmdBlockStatus, 0, 3, 0, 65536));
  const auto reply = client.reply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_TRUE(client.wire().received.empty());
  EXPECT_EQ(reply->type, 5);
  EXPECT_EQ(reply->flags, 1);
  ByteReader in(reply->data);
  in.be32();
  std::vector<std::pair<uint32_t, uint32_t>> extents;
  while (in.remaining() > 0) {
    const uint32_t length = in.be32();
    extents.emplace_back(length, in.be32());
  }
  EXPECT_EQ(extents, (std::vector<std::pair<uint32_t, uint32_t>>{{8192, 3}, {8192, 0}, {49152, 3}}));
}

TEST_F(NbdServerTest, ReqOneGivesOneExtentNotLongerThanAsked) {
  Client client(executor_, *server_);  // without the clip a client computes a wrong next offset
  ASSERT_TRUE(client.go({.structured = true, .base_allocation = true}));
  disk_.extents_too_long = true;
  client.send(request(kCmdBlockStatus, kFlagReqOne, 3, 100, 1000));
  const auto reply = client.reply();
  ASSERT_TRUE(reply.has_value());
  ASSERT_EQ(reply->data.size(), 12U);
  ByteReader in(reply->data);
  in.be32();
  EXPECT_EQ(in.be32(), 1000U);
  EXPECT_EQ(disk_.extents_asked.back(), 1U);
  disk_.fail_extents = true;
  EXPECT_EQ(client.ask(kCmdBlockStatus, 0, 0, 4096), kEio);
}

TEST_F(NbdServerTest, BlockStatusWithoutTheContextIsInvalid) {
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go({.structured = true}));
  EXPECT_EQ(client.ask(kCmdBlockStatus, 0, 0, 4096), kEinval);  // and not a chunk with a context id of our own
}

// A payload of 32 MiB is not an attack; one byte more is refused, but read, or the stream is out of step.
TEST_F(NbdServerTest, LargestPayloadPassesAndOneByteMoreIsRefusedInStep) {
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  const Bytes data = pattern(32_MiB + 1, 5);
  EXPECT_EQ(client.ask(kCmdWrite, 0, 0, 32 << 20, ByteSpan(data).first(32_MiB)), 0);
  EXPECT_TRUE(std::equal(data.begin(), data.end() - 1, disk_.content().begin()));
  EXPECT_EQ(client.ask(kCmdWrite, 0, 0, (32 << 20) + 1, data), kEinval);
  EXPECT_EQ(disk_.seen.size(), 1U);
  client.send(request(kCmdRead, 0, 9, 0, 32 << 20));
  const auto reply = client.reply(32_MiB);
  ASSERT_TRUE(reply.has_value());
  EXPECT_TRUE(std::equal(reply->data.begin(), reply->data.end(), data.begin()));
}

TEST_F(NbdServerTest, RefusedWritesAreReadToTheirEnd) {
  // The payload of a refused write must not be taken for requests.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  Bytes trap = request(kCmdTrim, 0, 666, 0, 4096);
  trap.resize(512);
  EXPECT_EQ(client.ask(kCmdWrite, 0, kDiskSize - 1, 512, trap), kEnospc);
  EXPECT_EQ(client.ask(kCmdWrite, kFlagDf, 0, 512, trap), kEinval);
  EXPECT_TRUE(disk_.seen.empty());
  EXPECT_EQ(client.ask(kCmdRead, 0, 0, 512), 0);
}

TEST_F(NbdServerTest, MinimumBlockSizeBindsOnlyWhoAskedForIt) {
  // Clients that never learned it (the kernel's) would get errors for valid requests.
  RamDevice other(executor_, 1_MiB);
  ASSERT_TRUE(server_->add_export({.name = "vdb", .device = &other, .block_size_min = 512}).has_value());
  {
    Client told(executor_, *server_);
    ASSERT_TRUE(told.go({.name = "vdb", .block_sizes = true}));
    Client untold(executor_, *server_);
    ASSERT_TRUE(untold.go({.name = "vdb"}));
    EXPECT_EQ(told.ask(kCmdRead, 0, 1, 100), kEinval);
    EXPECT_EQ(told.ask(kCmdRead, 0, 512, 512), 0);
    EXPECT_EQ(untold.ask(kCmdRead, 0, 1, 100), 0);
    told.disconnect();
    untold.disconnect();
  }
  ASSERT_TRUE(server_->remove_export("vdb", [] {}).has_value());
  executor_.run();
}

TEST_F(NbdServerTest, ReadOnlyExportRefusesEveryChange) {
  ASSERT_TRUE(server_->add_export({.name = "ro", .device = &disk_, .read_only = true}).has_value());
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go({.name = "ro"}));
  const Bytes data(512);
  EXPECT_EQ(client.ask(kCmdWrite, 0, 0, 512, data), kEperm);  // each of these would change a disk meant to stay
  EXPECT_EQ(client.ask(kCmdTrim, 0, 0, 512), kEperm);
  EXPECT_EQ(client.ask(kCmdWriteZeroes, 0, 0, 512), kEperm);
  EXPECT_EQ(client.ask(kCmdFlush, 0, 0, 0), 0);
  EXPECT_EQ(client.ask(kCmdRead, 0, 0, 512), 0);
}

// Requests that arrive in one piece all run at once: one at a time would waste the queue depth.
TEST_F(NbdServerTest, ManyRequestsInOneReadAreAllInFlight) {
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  disk_.holding = true;
  Bytes batch;
  for (uint64_t i = 0; i < 32; ++i) {
    const Bytes one = request(kCmdRead, 0, i, i * 4096, 4096);
    batch.insert(batch.end(), one.begin(), one.end());
  }
  client.send(batch);
  ASSERT_EQ(disk_.held.size(), 32U);
  std::reverse(disk_.held.begin(), disk_.held.end());
  disk_.release_all();
  executor_.run();
  for (uint64_t i = 32; i > 0; --i) EXPECT_EQ(client.reply(4096)->cookie, i - 1) << "in the order of completion";
}

// A client that said DISC may exit at once: what it wrote before must still reach the disk, and be answered.
TEST_F(NbdServerTest, DisconnectRequestCompletesWhatIsOutstanding) {
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  disk_.holding = true;
  const Bytes data(4096, 7);
  client.send(joined({request(kCmdWrite, 0, 1, 0, 4096, data), request(kCmdDisc, 0, 2, 0, 0),
                      request(kCmdWrite, 0, 3, 4096, 4096, data)}));
  EXPECT_TRUE(client.open()) << "the write is not done yet";
  disk_.release_all();
  executor_.run();
  EXPECT_EQ(client.error(), 0);
  EXPECT_FALSE(client.open());
  EXPECT_EQ(disk_.content()[0], 7);
  EXPECT_EQ(disk_.content()[4096], 0) << "nothing after DISC is carried out";
}

TEST_F(NbdServerTest, ClientThatVanishesLeavesNothingBehind) {
  // A completion for a connection that is gone must find it, or at least not its memory.
  disk_.holding = true;
  for (const bool inside_payload : {false, true}) {
    Client client(executor_, *server_);
    ASSERT_TRUE(client.go({.structured = true}));
    client.send(joined({request(kCmdRead, 0, 1, 0, 65536), request(kCmdWrite, 0, 2, 0, 4096, Bytes(4096, 1))}));
    if (inside_payload) client.send(request(kCmdWrite, 0, 3, 0, 4096, Bytes(100)));
    const size_t submitted = disk_.seen.size();
    client.disconnect();
    EXPECT_EQ(disk_.seen.size(), submitted) << "half a payload is never written";
    EXPECT_GT(server_->stats().inflight_bytes, 0U);
    disk_.release_all();
    executor_.run();
    EXPECT_EQ(server_->stats().connections, 0U);
    EXPECT_EQ(server_->stats().inflight_bytes, 0U);
  }
}

TEST_F(NbdServerTest, BrokenStreamIsClosedAndOthersGoOn) {
  Client good(executor_, *server_);
  ASSERT_TRUE(good.go());
  Client bad(executor_, *server_);
  ASSERT_TRUE(bad.go());
  bad.send(Bytes(28, 0xff));
  EXPECT_FALSE(bad.open());  // every later byte would be a guess
  EXPECT_EQ(good.ask(kCmdRead, 0, 0, 512), 0);
}

TEST_F(NbdServerTest, EmptyNameIsTheFirstExportUnlessConfigured) {
  // qemu's nbd:unix:PATH has no name at all.
  RamDevice other(executor_, 1_MiB);
  EXPECT_FALSE(server_->set_default_export("vdb").has_value());
  ASSERT_TRUE(server_->add_export({.name = "vdb", .device = &other}).has_value());
  EXPECT_EQ(server_->find_export("")->name, "vda");
  ASSERT_TRUE(server_->set_default_export("vdb").has_value());
  EXPECT_EQ(server_->find_export("")->name, "vdb");
  EXPECT_EQ(server_->find_export("vda")->name, "vda");
  EXPECT_FALSE(server_->find_export("vdc").has_value());
  ASSERT_TRUE(server_->remove_export("vdb", [] {}).has_value());
  EXPECT_EQ(server_->find_export("")->name, "vda") << "a default that is gone gives way";
}

TEST_F(NbdServerTest, ExportNamesAreChecked) {
  EXPECT_EQ(server_->add_export({.name = "vda", .device = &disk_}).error().kind, ErrorKind::Exists);
  EXPECT_EQ(server_->add_export({.name = "", .device = &disk_}).error().kind, ErrorKind::InvalidArgument);
  EXPECT_EQ(server_->add_export({.name = std::string(4097, 'x'), .device = &disk_}).error().kind,
            ErrorKind::InvalidArgument);  // could not be listed
  EXPECT_EQ(server_->add_export({.name = "odd", .device = &disk_, .block_size_min = 3}).error().kind,
            ErrorKind::InvalidArgument);
  EXPECT_EQ(server_->remove_export("nosuch", [] {}).error().kind, ErrorKind::NotFound);
}

TEST_F(NbdServerTest, GrownDeviceIsUsableAtOnce) {
  // Bounds taken once at the start would refuse the new part until every client reconnects.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  EXPECT_EQ(client.ask(kCmdRead, 0, kDiskSize, 512), kEinval);
  disk_.content().resize(kDiskSize + 4096);
  EXPECT_EQ(client.ask(kCmdRead, 0, kDiskSize, 512), 0);
}

// CAN_MULTI_CONN: a FLUSH on one connection covers the completed writes of all, so it must reach the shared device.
TEST_F(NbdServerTest, ConnectionsShareOneDevice) {
  Client writer(executor_, *server_);
  ASSERT_TRUE(writer.go());
  Client other(executor_, *server_);
  ASSERT_TRUE(other.go());
  const Bytes data(512, 9);
  EXPECT_EQ(writer.ask(kCmdWrite, 0, 0, 512, data), 0);
  EXPECT_EQ(other.ask(kCmdFlush, 0, 0, 0), 0);
  EXPECT_EQ(disk_.seen.back().op, BlockOp::Flush);
  other.send(request(kCmdRead, 0, 1, 0, 512));
  EXPECT_EQ(other.reply(512)->data, data);
}

TEST_F(NbdServerTest, DrainAnswersNewRequestsWithShutdownAndFinishesTheOthers) {
  // SIGTERM must lose no accepted write, and tell clients why the rest was refused.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  Client haggling(executor_, *server_);
  haggling.send(client_flags(3));
  disk_.holding = true;
  const Bytes data(512, 1);
  client.send(request(kCmdWrite, 0, 1, 0, 512, data));
  bool drained = false;
  server_->drain([&] { drained = true; });
  executor_.run();
  EXPECT_EQ(client.ask(kCmdWrite, 0, 512, 512, data), kEshutdown);
  haggling.send(option(kOptGo, go_data("vda")));
  EXPECT_EQ(option_answers(haggling.wire().received)->back().type, kRepErrShutdown);
  Client late(executor_, *server_);
  EXPECT_FALSE(late.open());
  executor_.advance(kSecond);
  EXPECT_FALSE(haggling.open());
  EXPECT_FALSE(drained) << "a write is in flight";
  disk_.release_all();
  executor_.run();
  EXPECT_EQ(client.error(), 0);
  EXPECT_TRUE(drained);
  EXPECT_EQ(disk_.content()[0], 1);
  EXPECT_EQ(disk_.content()[512], 0);
}

TEST_F(NbdServerTest, RemovedExportLetsGoOfItsDeviceOnlyWhenIdle) {
  // The device is destroyed after `done`: a request still in flight would touch freed memory.
  RamDevice other(executor_, 1_MiB);
  ASSERT_TRUE(server_->add_export({.name = "vdb", .device = &other}).has_value());
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go({.name = "vdb"}));
  Client stays(executor_, *server_);
  ASSERT_TRUE(stays.go());
  other.holding = true;
  client.send(request(kCmdRead, 0, 1, 0, 512));
  bool removed = false;
  ASSERT_TRUE(server_->remove_export("vdb", [&] { removed = true; }).has_value());
  executor_.advance(kSecond);
  EXPECT_FALSE(removed);
  EXPECT_FALSE(server_->find_export("vdb").has_value());
  EXPECT_EQ(server_->remove_export("vdb", [] {}).error().kind, ErrorKind::NotFound);
  other.release_all();
  executor_.run();
  EXPECT_TRUE(removed);
  EXPECT_EQ(client.error(512), 0) << "the request under way was answered";
  EXPECT_FALSE(client.open());
  EXPECT_EQ(stays.ask(kCmdRead, 0, 0, 512), 0);
}

TEST_F(NbdServerTest, StatsCountRequestsAndBytes) {
  // What the metrics will show.
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go());
  const Bytes data(4096);
  client.ask(kCmdWrite, 0, 0, 4096, data);
  client.ask(kCmdRead, 0, 0, 512);
  const NbdStats stats = server_->stats();
  EXPECT_EQ(stats.connections, 1U);
  EXPECT_EQ(stats.handshakes, 0U);
  EXPECT_EQ(stats.requests_total, 2U);
  EXPECT_EQ(stats.written_bytes_total, 4096U);
  EXPECT_EQ(stats.read_bytes_total, 512U);
  EXPECT_EQ(stats.errors_total, 0U);
}

}  // namespace
}  // namespace vmferry
