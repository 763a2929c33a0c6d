// SPDX-License-Identifier: Apache-2.0
//
// The NBD server at its limits (I9): it stops reading, is fair, goes on, and gets rid of those who only take up room.
#include <gtest/gtest.h>

#include "blockdev/nbd/nbd_server.h"
#include "tests/unit/blockdev/nbd_test_support.h"

namespace vmferry {
namespace {

using namespace nbd_test;

constexpr uint64_t kDiskSize = 128_MiB;
constexpr uint32_t kLarge = 16 << 20;

class NbdLimitsTest : public ::testing::Test {
 protected:
  void start(const NbdLimits& limits) {
    server_ = std::make_unique<NbdServer>(executor_, limits);
    ASSERT_TRUE(server_->add_export({.name = "vda", .device = &disk_}).has_value());
  }
  std::unique_ptr<Client> connected() {
    auto client = std::make_unique<Client>(executor_, *server_);
    EXPECT_TRUE(client->go());
    return client;
  }
  void TearDown() override {
    disk_.holding = false;
    disk_.release_all();
    executor_.run();
    bool drained = false;
    server_->drain([&] { drained = true; });
    executor_.advance(60 * kSecond);
    EXPECT_TRUE(drained);
    EXPECT_EQ(server_->stats().inflight_bytes, 0U);
  }

  ManualExecutor executor_;
  RamDevice disk_{executor_, kDiskSize};
  std::unique_ptr<NbdServer> server_;
};

TEST_F(NbdLimitsTest, AtItsOwnLimitAConnectionStopsReadingAndGoesOnInOrder) {
  // Without the stop one client takes all memory; without the resume it hangs.
  start({.connection_inflight_bytes_max = 48_MiB});
  auto client = connected();
  disk_.holding = true;
  Bytes batch;
  for (uint64_t i = 0; i < 6; ++i) {
    const Bytes one = request(kCmdRead, 0, i, 0, kLarge);
    batch.insert(batch.end(), one.begin(), one.end());
  }
  client->send(batch);
  EXPECT_EQ(disk_.held.size(), 2U) << "the third does not fit with its overhead";
  EXPECT_TRUE(client->wire().paused);
  EXPECT_LE(server_->stats().inflight_bytes, 48_MiB);
  for (uint64_t i = 0; i < 6; ++i) {
    ASSERT_FALSE(disk_.held.empty());
    disk_.release_one();
    executor_.run();
    EXPECT_EQ(client->reply(kLarge)->cookie, i);
  }
  EXPECT_FALSE(client->wire().paused);
}

// The kernel's client gives a silent connection up, sends the same write over another one, and then a newer one. The
// old one, carried out last, would undo the newer.
TEST_F(NbdLimitsTest, WhatAGoneClientLeftUnreadIsNotCarriedOut) {
  start({.drop_requests_of_gone_clients = true});
  auto client = connected();
  EXPECT_EQ(client->ask(kCmdWrite, 0, 0, 4, Bytes(4, 1)), 0);
  client->wire().client_gone = true;
  client->send(request(kCmdWrite, 0, 9, 0, 4, Bytes(4, 2)));
  EXPECT_EQ(disk_.content()[0], 1);
  EXPECT_FALSE(client->open());
}

// Others close right after their last request, and mean it.
TEST_F(NbdLimitsTest, ByDefaultWhatAGoneClientLeftIsCarriedOut) {
  start({});
  auto client = connected();
  client->wire().client_gone = true;
  client->send(request(kCmdWrite, 0, 9, 0, 4, Bytes(4, 2)));
  EXPECT_EQ(disk_.content()[0], 2);
}

// Read before its client went, but kept back by a limit: the same as unread.
TEST_F(NbdLimitsTest, AHeldRequestOfAGoneClientIsNotCarriedOut) {
  for (const bool own_limit : {true, false}) {
    NbdLimits limits{.drop_requests_of_gone_clients = true};
    (own_limit ? limits.connection_inflight_bytes_max : limits.inflight_bytes_max) = 48_MiB;
    start(limits);
    auto client = connected();
    disk_.holding = true;
    Bytes batch;
    for (uint64_t i = 0; i < 3; ++i) {
      const Bytes one = request(kCmdRead, 0, i, 0, kLarge);
      batch.insert(batch.end(), one.begin(), one.end());
    }
    client->send(batch);
    ASSERT_EQ(disk_.held.size(), 2U);
    const size_t seen = disk_.seen.size();
    client->wire().client_gone = true;
    disk_.release_all();
    executor_.run();
    EXPECT_EQ(disk_.seen.size(), seen);
    EXPECT_FALSE(client->open());
    TearDown();
  }
}

// A request of one byte takes pages for its data. Counted as one byte, a client with requests that wait for a slow disk
// has the daemon hold 16 times what the limit says.
TEST_F(NbdLimitsTest, TinyRequestsCountWithTheMemoryThatTheyTake) {
  constexpr uint64_t kLimit = 48_MiB;
  constexpr uint64_t kPagesOfOne = TransferBuffers::kSizeMin + TransferBuffers::kHeadroom;
  start({.connection_inflight_bytes_max = kLimit});
  auto client = connected();
  disk_.holding = true;
  Bytes batch;
  for (uint64_t i = 0; i < 2 * kLimit / kPagesOfOne; ++i) {
    const Bytes one = request(kCmdRead, 0, i, i, 1);
    batch.insert(batch.end(), one.begin(), one.end());
  }
  client->send(batch);
  EXPECT_GT(disk_.held.size(), 1000U);
  EXPECT_LE(disk_.held.size() * kPagesOfOne, kLimit);
  EXPECT_TRUE(client->wire().paused);
}

// Requests without data cost memory and, below, time with the square of their number.
TEST_F(NbdLimitsTest, RequestsWithoutDataAreBoundedInNumber) {
  start({.connection_inflight_bytes_max = 64_MiB});
  auto client = connected();
  disk_.holding = true;
  Bytes batch;
  for (uint64_t i = 0; i < 20'000; ++i) {
    const Bytes one = request(kCmdTrim, 0, i, 0, 4096);
    batch.insert(batch.end(), one.begin(), one.end());
  }
  client->send(batch);
  EXPECT_GT(disk_.held.size(), 1000U);
  EXPECT_LE(disk_.held.size(), 8192U);
  EXPECT_TRUE(client->wire().paused);
}

// A fragmented disk has millions of extents: a reply with all of them breaks clients and takes memory without a limit.
TEST_F(NbdLimitsTest, BlockStatusOfAFragmentedDiskIsCutAtTheLimit) {
  start({.status_extents_max = 100});
  Client client(executor_, *server_);
  ASSERT_TRUE(client.go({.structured = true, .base_allocation = true}));
  const Bytes block(4096, 1);
  for (uint64_t i = 0; i < 300; ++i) ASSERT_EQ(client.ask(kCmdWrite, 0, i * 8192, 4096, block), 0);
  client.send(request(kCmdBlockStatus, 0, 1, 0, kDiskSize));
  const auto reply = client.reply();
  ASSERT_TRUE(reply.has_value());
  ASSERT_EQ(reply->data.size(), 4U + 8 * 100);
  ByteReader in(reply->data);
  in.be32();
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(in.be32(), 4096U);
    EXPECT_EQ(in.be32(), i % 2 == 0 ? 0U : 3U);
  }
}

TEST_F(NbdLimitsTest, RepliesThatAreNotTakenCountAsWell) {
  // A client that sends requests and never reads would otherwise fill the memory with answers.
  start({.connection_inflight_bytes_max = 48_MiB});
  auto client = connected();
  client->wire().client_reads = false;
  for (uint64_t i = 0; i < 6; ++i) client->send(request(kCmdRead, 0, i, 0, kLarge));
  EXPECT_TRUE(client->wire().paused);
  EXPECT_LE(client->wire().unsent.size(), 48_MiB);
  EXPECT_LE(server_->stats().inflight_bytes, 48_MiB + 64_KiB);
  client->read_again();
  for (uint64_t i = 0; i < 6; ++i) EXPECT_EQ(client->reply(kLarge)->cookie, i);
}

TEST_F(NbdLimitsTest, ErrorRepliesThatAreNotTakenCountAsWell) {
  // Refused requests cost no data, but their answers do.
  start({});
  auto client = connected();
  client->wire().client_reads = false;
  Bytes batch;
  for (uint64_t i = 0; i < 100'000; ++i) {
    const Bytes one = request(99, 0, i, 0, 0);
    batch.insert(batch.end(), one.begin(), one.end());
  }
  for (int i = 0; i < 60 && !client->wire().paused; ++i) client->send(batch);
  EXPECT_TRUE(client->wire().paused);
  EXPECT_LE(client->wire().unsent.size(), 64_MiB + 64_KiB);
}

TEST_F(NbdLimitsTest, ServerWideMemoryIsSharedInTheOrderOfAsking) {
  // Served by size or luck, a large request could wait for ever behind small ones.
  start({.inflight_bytes_max = 40_MiB});
  auto first = connected();
  auto second = connected();
  auto third = connected();
  disk_.holding = true;
  first->send(request(kCmdRead, 0, 1, 0, 32 << 20));
  second->send(request(kCmdRead, 0, 2, 0, 32 << 20));
  third->send(request(kCmdRead, 0, 3, 0, 4096));
  EXPECT_EQ(disk_.held.size(), 1U) << "the third would fit, but the second asked before it";
  EXPECT_TRUE(second->wire().paused);
  EXPECT_TRUE(third->wire().paused);
  disk_.release_one();
  executor_.run();
  EXPECT_EQ(disk_.held.size(), 2U);
  EXPECT_EQ(first->reply(32 << 20)->cookie, 1U);
  disk_.release_all();
  executor_.run();
  EXPECT_EQ(second->reply(32 << 20)->cookie, 2U);
  EXPECT_EQ(third->reply(4096)->cookie, 3U);
}

TEST_F(NbdLimitsTest, WaiterThatGoesDoesNotBlockTheNext) {
  // A queue entry of a closed connection would stop everyone behind it.
  start({.inflight_bytes_max = 40_MiB});
  auto holder = connected();
  auto quitter = connected();
  auto patient = connected();
  disk_.holding = true;
  holder->send(request(kCmdRead, 0, 1, 0, 32 << 20));
  quitter->send(request(kCmdRead, 0, 2, 0, 32 << 20));
  patient->send(request(kCmdRead, 0, 3, 0, 4096));
  quitter->disconnect();
  EXPECT_EQ(disk_.held.size(), 2U) << "the small one fits at once";
  disk_.release_all();
  executor_.run();
  EXPECT_EQ(patient->reply(4096)->cookie, 3U);
}

TEST_F(NbdLimitsTest, WritesBehindTheLimitKeepTheirPayloadInStep) {
  // The bytes behind a held request are kept; one lost or doubled shifts the stream.
  start({.connection_inflight_bytes_max = 48_MiB});
  auto client = connected();
  disk_.holding = true;
  Bytes stream;
  for (uint64_t i = 0; i < 5; ++i) {
    const Bytes one = request(kCmdWrite, 0, i, i * kLarge, kLarge, Bytes(kLarge, static_cast<uint8_t>(i + 1)));
    stream.insert(stream.end(), one.begin(), one.end());
  }
  client->send(stream);
  for (uint64_t i = 0; i < 5; ++i) {
    ASSERT_FALSE(disk_.held.empty()) << i;
    disk_.release_one();
    executor_.run();
    EXPECT_EQ(client->reply()->cookie, i);
  }
  for (uint64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(disk_.content()[i * kLarge], i + 1);
    EXPECT_EQ(disk_.content()[(i + 1) * kLarge - 1], i + 1);
  }
}

TEST_F(NbdLimitsTest, ClientThatHoldsMemoryAndStallsIsClosedOnlyWhenOthersWait) {
  // Half a payload holds memory for as long as the client likes: a denial of service, unless somebody needs it.
  start({.inflight_bytes_max = 40_MiB, .stall_time_max = 10 * kSecond});
  auto stalled = connected();
  stalled->send(request(kCmdWrite, 0, 1, 0, 32 << 20, Bytes(1000)));
  executor_.advance(100 * kSecond);
  EXPECT_TRUE(stalled->open()) << "nobody waits: a client may be slow";
  auto waiting = connected();
  waiting->send(request(kCmdRead, 0, 2, 0, 16 << 20));
  executor_.advance(9 * kSecond);
  EXPECT_TRUE(stalled->open());
  EXPECT_FALSE(waiting->reply(16 << 20).has_value());
  executor_.advance(2 * kSecond);
  EXPECT_FALSE(stalled->open());
  EXPECT_EQ(waiting->reply(16 << 20)->cookie, 2U);
}

TEST_F(NbdLimitsTest, SlowClientThatMovesIsNotClosed) {
  // Slow is not stalled: a WAN client sends 32 MiB over minutes.
  start({.inflight_bytes_max = 40_MiB, .stall_time_max = 10 * kSecond});
  auto slow = connected();
  slow->send(request(kCmdWrite, 0, 1, 0, 32 << 20, Bytes(1000)));
  auto waiting = connected();
  waiting->send(request(kCmdRead, 0, 2, 0, 16 << 20));
  for (int i = 0; i < 10; ++i) {
    executor_.advance(5 * kSecond);
    slow->send(Bytes(1));
  }
  EXPECT_TRUE(slow->open());
  slow->disconnect();
  EXPECT_EQ(waiting->reply(16 << 20)->cookie, 2U);
}

TEST_F(NbdLimitsTest, HandshakeHasATimeLimitAndTransmissionHasNone) {
  start({.handshake_time_max = 10 * kSecond});
  Client silent(executor_, *server_);
  auto idle = connected();
  executor_.advance(9 * kSecond);
  EXPECT_TRUE(silent.open());
  executor_.advance(2 * kSecond);
  EXPECT_FALSE(silent.open());  // otherwise silent connections pile up
  executor_.advance(3600 * kSecond);
  EXPECT_TRUE(idle->open()) << "an idle guest keeps its disk";
}

// 40 clients that stall in the handshake must not block the 41st.
TEST_F(NbdLimitsTest, StalledHandshakesGiveWayToNewcomers) {
  start({.handshakes_max = 40});
  std::vector<std::unique_ptr<Client>> stalled;
  for (int i = 0; i < 40; ++i) stalled.push_back(std::make_unique<Client>(executor_, *server_));
  EXPECT_EQ(server_->stats().handshakes, 40U);
  auto newcomer = connected();
  EXPECT_EQ(newcomer->ask(kCmdRead, 0, 0, 512), 0);
  EXPECT_FALSE(stalled.front()->open()) << "the oldest went";
  EXPECT_TRUE(stalled.back()->open());
  EXPECT_EQ(server_->stats().refused_total, 1U);
}

TEST_F(NbdLimitsTest, ConnectionsOverTheLimitAreClosedAndOthersStay) {
  start({.connections_max = 3});
  auto a = connected();
  auto b = connected();
  auto c = connected();
  Client d(executor_, *server_);
  EXPECT_FALSE(d.open());  // memory per connection is bounded only if their number is
  EXPECT_EQ(a->ask(kCmdRead, 0, 0, 512), 0);
  b->disconnect();
  EXPECT_TRUE(connected()->open());
}

// Silent connections would lock everybody out of an export with few places, for as long as somebody likes.
TEST_F(NbdLimitsTest, AtTheLimitOfConnectionsTheOldestHandshakeGivesWayOnceItHasHadItsTime) {
  start({.connections_max = 3});
  auto working = connected();
  Client older(executor_, *server_);
  executor_.advance(kSecond / 2);
  Client younger(executor_, *server_);
  {
    Client hasty(executor_, *server_);
    EXPECT_FALSE(hasty.open()) << "those before it may be at work";
  }
  executor_.advance(kSecond / 2);
  auto newcomer = connected();
  EXPECT_EQ(newcomer->ask(kCmdRead, 0, 0, 512), 0);
  EXPECT_FALSE(older.open());
  EXPECT_TRUE(younger.open());
  executor_.advance(kSecond);
  auto next = connected();
  EXPECT_FALSE(younger.open());
  Client last(executor_, *server_);
  EXPECT_FALSE(last.open()) << "sessions do not give way";
  for (Client* client : {working.get(), newcomer.get(), next.get()}) EXPECT_EQ(client->ask(kCmdRead, 0, 0, 512), 0);
  EXPECT_EQ(server_->stats().refused_total, 4U);
}

TEST_F(NbdLimitsTest, HagglerThatDoesNotReadIsClosed) {
  // LIST answers are larger than the question.
  start({});
  for (int i = 0; i < 200; ++i) {
    ASSERT_TRUE(
        server_->add_export({.name = "x" + std::to_string(i), .description = std::string(2000, 'd'), .device = &disk_})
            .has_value());
  }
  Client client(executor_, *server_);
  client.wire().client_reads = false;
  client.send(client_flags(3));
  for (int i = 0; i < 10 && client.open(); ++i) client.send(option(kOptList));
  EXPECT_FALSE(client.open());
  EXPECT_LE(client.wire().unsent.size(), 2_MiB);
}

TEST_F(NbdLimitsTest, ClientThatNeverTakesItsRepliesCannotHoldUpTheDrain) {
  // SIGTERM would hang.
  start({.drain_time_max = 5 * kSecond});
  auto client = connected();
  client->wire().client_reads = false;
  client->send(request(kCmdRead, 0, 1, 0, 4096));
  bool drained = false;
  server_->drain([&] { drained = true; });
  executor_.advance(2 * kSecond);
  EXPECT_FALSE(drained);
  executor_.advance(5 * kSecond);
  EXPECT_TRUE(drained);
}

// A connection with nothing under way is gone at once, from inside the walk over all connections: at the stop of a
// daemon with two clients the walk went on in freed memory.
TEST_F(NbdLimitsTest, ADrainThatIsNotAnsweredClosesEveryConnectionAtOnce) {
  start({.drain_unanswered = true});
  auto first = connected();
  auto second = connected();
  auto working = connected();
  auto last = connected();
  disk_.holding = true;
  working->send(request(kCmdRead, 0, 1, 0, 512));
  bool drained = false;
  server_->drain([&] { drained = true; });
  executor_.run();
  EXPECT_FALSE(first->open());
  EXPECT_FALSE(second->open());
  EXPECT_TRUE(working->open()) << "its request is under way";
  EXPECT_FALSE(last->open());
  EXPECT_FALSE(drained);
  disk_.holding = false;
  disk_.release_all();
  executor_.run();
  EXPECT_EQ(working->error(512), 0);
  EXPECT_TRUE(drained);
}

TEST_F(NbdLimitsTest, AnExportThatIsNotAnsweredIsRemovedOnceWithIdleConnections) {
  start({.drain_unanswered = true});
  auto first = connected();
  auto second = connected();
  auto third = connected();
  int removed = 0;
  ASSERT_TRUE(server_->remove_export("vda", [&] { ++removed; }).has_value());
  executor_.run();
  EXPECT_EQ(removed, 1);
  EXPECT_FALSE(first->open() || second->open() || third->open());
  EXPECT_FALSE(server_->find_export("vda").has_value());
}

TEST(TransferBuffers, ClassesAreReusedAndTheCacheIsBounded) {
  // Unbounded caching keeps the peak for ever; no reuse costs an mmap per large request.
  TransferBuffers buffers(64_KiB);
  uint8_t* address = nullptr;
  {
    const TransferBuffer a = buffers.take(1);
    address = a.data();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(address) % TransferBuffers::kAlignment, 0U);
  }
  EXPECT_EQ(buffers.cached_bytes(), 4_KiB);
  {
    const TransferBuffer b = buffers.take(4096);
    EXPECT_EQ(b.data(), address);
    const TransferBuffer c = buffers.take(4097);
    EXPECT_NE(c.data(), address);
    const TransferBuffer d = buffers.take(TransferBuffers::kSizeMax);
    d.data()[TransferBuffers::kSizeMax - 1] = 1;
    EXPECT_EQ(buffers.in_use(), 3U);
  }
  EXPECT_EQ(buffers.in_use(), 0U);
  EXPECT_EQ(buffers.cached_bytes(), 12_KiB) << "the largest went back to the system";
}

}  // namespace
}  // namespace vmferry
