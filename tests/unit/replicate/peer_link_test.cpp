// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include "engine/base/random.h"
#include "tests/unit/replicate/peer_test_daemon.h"

namespace vmferry::test {
namespace {

using ::testing::HasSubstr;

class PeerLinkTest : public PeerTest {
 public:
  void pair_with_groups(const PeerServiceOptions& options = {}) {
    make_daemons(options, options);
    pair_daemons();
    a->open_group("bee");
    b->open_group("ay");
    executor.run_until([&] { return a->group_handler.connected > 0 && b->group_handler.connected > 0; });
  }
  static Bytes random_bytes(size_t size, uint64_t seed) {
    Random random(seed);
    Bytes out(size);
    for (uint8_t& byte : out) byte = static_cast<uint8_t>(random.next());
    return out;
  }
  const std::vector<std::pair<MessageType, Bytes>>& at_b() { return b->group_handler.messages; }
};

// What arrives must be what was sent: type, group and bytes, also beyond one fragment, whatever pieces come in.
TEST_F(PeerLinkTest, GroupMessagesArriveWholeAndInOrder) {
  for (const size_t piece : {size_t{1}, size_t{17}, size_t{1448}, size_t{1} << 20}) {
    net.wire.piece = piece;
    pair_with_groups();
    std::vector<Bytes> sent;
    for (const size_t size : {size_t{0}, size_t{1}, size_t{65520}, size_t{65521}, size_t{200'000}}) {
      sent.push_back(random_bytes(piece == 1 ? size % 3000 : size, size + 1));
      a->channel->send(TrafficClass::Bulk, MessageType::EpochData, sent.back());
    }
    ASSERT_TRUE(executor.run_until([&] { return at_b().size() == sent.size(); })) << piece;
    for (size_t i = 0; i < sent.size(); ++i) EXPECT_EQ(at_b()[i].second, sent[i]) << i;
    EXPECT_EQ(a->disconnected, 0);
    a.reset();
    b.reset();
  }
}

TEST_F(PeerLinkTest, GroupsKnowWhatBothSidesHave) {
  // A message of a later feature ends the replication with a peer that does not know it.
  PeerServiceOptions older;
  older.features = kFeatureEpochs | kFeatureHandover | kFeatureMemoryStream;
  make_daemons({}, older);
  pair_daemons();
  a->open_group("bee");
  EXPECT_TRUE(a->channel->peer_has(kFeatureMemoryStream));
  EXPECT_FALSE(a->channel->peer_has(kFeatureSourceState));
  b->service->stop();
  executor.run_for(15 * kSecond);
  ASSERT_FALSE(a->channel->connected());
  EXPECT_FALSE(a->channel->peer_has(kFeatureMemoryStream));
  b->options_.features = kFeaturesKnown;
  b->restart();
  ASSERT_TRUE(executor.run_until([&] { return a->channel->connected(); }));
  EXPECT_TRUE(a->channel->peer_has(kFeatureSourceState));
}

TEST_F(PeerLinkTest, TheLargestMessageArrives) {
  pair_with_groups();
  const Bytes largest = random_bytes(kFramePayloadSizeMax - 16, 3);
  a->channel->send(TrafficClass::Bulk, MessageType::EpochData, largest);
  ASSERT_TRUE(executor.run_until([&] { return at_b().size() == 1; }));
  EXPECT_EQ(at_b()[0].second, largest);
}

// A cut at any byte, in the handshake or in the middle of a frame, must end in a working link again, and what a group
// gets afterwards must not begin in the middle of something.
TEST_F(PeerLinkTest, ReconnectsAfterACutAtAnyPoint) {
  pair_with_groups();
  const Bytes payload = random_bytes(5000, 1);
  const uint64_t step = 97;
  for (uint64_t cut = 1; cut < 9000; cut += step) {
    net.wire.delivered = 0;
    net.wire.cut_after = cut;
    const int before = a->group_handler.connected;
    a->channel->send(TrafficClass::Bulk, MessageType::EpochData, payload);
    executor.run_for(500 * kMillisecond);
    if (net.wire.cut_after != 0) {  // the messages were shorter than that
      net.wire.cut_after = 0;
      net.cut_all();
    }
    ASSERT_TRUE(executor.run_until([&] { return a->group_handler.connected > before && both_connected(); })) << cut;
    executor.run_for(kSecond);
  }
  for (const auto& [type, bytes] : at_b()) EXPECT_EQ(bytes, payload);
  EXPECT_EQ(a->group_handler.connected, a->group_handler.disconnected + 1);
  EXPECT_EQ(b->group_handler.connected, b->group_handler.disconnected + 1);
}

TEST_F(PeerLinkTest, ReconnectsAfterACutInTheHandshake) {
  pair_with_groups();
  for (uint64_t cut = 1; cut < 3000; cut += 61) {
    net.cut_all();
    executor.run_for(10 * kMillisecond);  // both see it; nobody has dialled yet
    net.wire.delivered = 0;
    net.wire.cut_after = cut;
    ASSERT_TRUE(executor.run_until([&] { return net.wire.cut_after == 0 || both_connected(); })) << cut;
    net.wire.cut_after = 0;
    executor.run_for(15 * kSecond);
    ASSERT_TRUE(both_connected()) << cut;
  }
}

// A peer that is gone without a word must be noticed; otherwise the guest waits on a dead link until TCP gives up.
TEST_F(PeerLinkTest, ASilentPeerIsNoticedAndTheLinkComesBack) {
  pair_with_groups();
  net.wire.silent = true;
  const Nanoseconds since = executor.now();
  ASSERT_TRUE(executor.run_until([&] { return a->disconnected == 1 && b->disconnected == 1; }));
  EXPECT_LE(executor.now() - since, 12 * kSecond);
  EXPECT_GE(executor.now() - since, 9 * kSecond);
  EXPECT_THAT(a->last_disconnect, HasSubstr("nothing came from the peer"));
  executor.run_for(20 * kSecond);
  net.wire.silent = false;
  EXPECT_TRUE(executor.run_until([&] { return both_connected(); }, 16 * kSecond));
}

TEST_F(PeerLinkTest, AnIdleLinkStaysUp) {
  // Pings must count as life, or every quiet volume would flap.
  pair_with_groups();
  executor.run_for(600 * kSecond);
  EXPECT_EQ(a->disconnected + b->disconnected, 0);
}

TEST_F(PeerLinkTest, BackoffGrowsToItsLimitAndNotBeyond) {
  make_daemons();
  pair_daemons();
  a->service->stop();
  executor.run_for(60 * kSecond);
  const int before = net.dialled;
  executor.run_for(100 * kSecond);
  EXPECT_GE(net.dialled - before, 8);
  EXPECT_LE(net.dialled - before, 13);
}

// Both sides dial at once after a cut: two connections that replace each other for ever would never carry anything.
TEST_F(PeerLinkTest, TwoDiallersSettleOnOneConnection) {
  for (const Nanoseconds delay : {Nanoseconds{0}, 20 * kMillisecond, 150 * kMillisecond, 400 * kMillisecond}) {
    net.wire.delay = delay;
    PeerServiceOptions options;
    options.listen_addresses = {"192.0.2.2:4410"};
    make_daemons({}, options);
    pair_daemons();
    for (int round = 0; round < 5; ++round) {
      net.cut_all();
      executor.run_for(30 * kSecond);
      ASSERT_TRUE(both_connected());
      const int connects = a->connected + b->connected;
      executor.run_for(30 * kSecond);
      EXPECT_EQ(a->connected + b->connected, connects) << "still flapping with delay " << delay;
    }
    EXPECT_EQ(a->connected, a->disconnected + 1);
    a.reset();
    b.reset();
  }
}

// A peer that restarted must not be refused because of its own dead connection.
TEST_F(PeerLinkTest, ARestartedPeerReplacesItsDeadConnection) {
  pair_with_groups();
  net.wire.silent = true;  // the end of the old connection never arrives
  b->channel.reset();
  b->service->stop();
  executor.run_for(10 * kMillisecond);
  net.wire.silent = false;
  b->restart();
  ASSERT_TRUE(executor.run_until([&] { return b->connected == 2; }, 2 * kSecond));
  EXPECT_THAT(a->last_disconnect, HasSubstr("replaced"));
}

TEST_F(PeerLinkTest, AMessageForAnUnknownGroupLetsTheDaemonOpenIt) {
  make_daemons();
  pair_daemons();
  b->open_unknown = true;
  a->open_group("bee");
  a->channel->send(TrafficClass::Control, MessageType::GroupHello, {1, 2, 3});
  a->channel->send(TrafficClass::Control, MessageType::GroupHello, {4});
  ASSERT_TRUE(executor.run_until([&] { return at_b().size() == 2; }));
  EXPECT_EQ(b->unknown_groups, 1);
  EXPECT_EQ(b->group_handler.connected, 1);
  EXPECT_EQ(at_b()[0].second, (Bytes{1, 2, 3}));
}

TEST_F(PeerLinkTest, AMessageForAGroupThatStaysUnknownIsDropped) {
  make_daemons();
  pair_daemons();
  a->open_group("bee");
  a->channel->send(TrafficClass::Control, MessageType::GroupHello, {1});
  executor.run_for(kSecond);
  EXPECT_EQ(b->unknown_groups, 1);
  EXPECT_EQ(b->disconnected, 0);
}

// A group may be closed, or its peer removed, while messages are on the way.
TEST_F(PeerLinkTest, ClosingAGroupInItsOwnCallbackIsSafe) {
  pair_with_groups();
  b->group_handler.on_message = [&](MessageType, ByteSpan) { b->channel.reset(); };
  for (int i = 0; i < 3; ++i) a->channel->send(TrafficClass::Control, MessageType::EpochAck, {1});
  executor.run_for(kSecond);
  EXPECT_EQ(at_b().size(), 1U);
  EXPECT_EQ(b->unknown_groups, 2);
}

TEST_F(PeerLinkTest, RemovingThePeerInACallbackIsSafe) {
  pair_with_groups();
  b->group_handler.on_message = [&](MessageType, ByteSpan) { b->service->remove("ay", [](const Status&) {}); };
  a->channel->send(TrafficClass::Control, MessageType::EpochAck, {1});
  executor.run_for(kSecond);
  EXPECT_EQ(b->group_handler.disconnected, 1);
  EXPECT_FALSE(b->channel->connected());
  b->channel->send(TrafficClass::Bulk, MessageType::EpochData, {1});  // a dead channel swallows
  EXPECT_EQ(b->channel->queued_bytes(TrafficClass::Bulk), 0U);
}

// Without a connection nothing may pile up: it would be sent in a wrong order to a peer with another state.
TEST_F(PeerLinkTest, MessagesSentWhileDisconnectedAreDropped) {
  pair_with_groups();
  net.cut_all();
  executor.run_until([&] { return a->disconnected == 1; });
  a->channel->send(TrafficClass::Bulk, MessageType::EpochData, {1});
  EXPECT_EQ(a->channel->queued_bytes(TrafficClass::Bulk), 0U);
  ASSERT_TRUE(executor.run_until([&] { return both_connected(); }));
  executor.run_for(kSecond);
  EXPECT_TRUE(at_b().empty());
}

TEST_F(PeerLinkTest, RequestsAreAnsweredAlsoLaterAndOutOfOrder) {
  make_daemons();
  pair_daemons();
  std::vector<PeerRequests::Answer> open;
  a->on_request = [&](const std::string&, const std::string&, PeerRequests::Answer answer) {
    open.push_back(std::move(answer));
  };
  std::map<int, std::string> answers;
  for (int i = 0; i < 3; ++i) {
    b->service->link("ay")->request(
        "preflight", fmt::format("{{\"n\":{}}}", i), [&answers, i](const Result<std::string>& r) {
          answers[i] = r ? *r : std::string(to_string(r.error().kind)) + ":" + r.error().text;
        });
  }
  ASSERT_TRUE(executor.run_until([&] { return open.size() == 3; }));
  open[2](std::string("\"two\""));
  open[0](fail(ErrorKind::Denied, "no"));
  open[1](std::string(2_MiB, 'x'));
  open[2](std::string("again"));  // only the first answer counts
  ASSERT_TRUE(executor.run_until([&] { return answers.size() == 3; }));
  EXPECT_EQ(answers[0], "denied:no");
  EXPECT_THAT(answers[1], HasSubstr("limit-exceeded"));
  EXPECT_EQ(answers[2], "\"two\"");
  EXPECT_EQ(a->disconnected, 0);
}

TEST_F(PeerLinkTest, RequestsFailOnTimeoutOnLossAndWithoutConnection) {
  make_daemons();
  pair_daemons();
  std::vector<PeerRequests::Answer> open;
  a->on_request = [&](const std::string&, const std::string&, PeerRequests::Answer answer) {
    open.push_back(std::move(answer));
  };
  PeerLink& link = *b->service->link("ay");
  std::vector<ErrorKind> errors;
  const auto note = [&](const Result<std::string>& result) {
    errors.push_back(result ? ErrorKind::Internal : result.error().kind);
  };
  link.request("slow", "{}", note, kSecond);
  ASSERT_TRUE(executor.run_until([&] { return errors.size() == 1; }));
  open[0](std::string("late"));  // is no violation of the protocol
  executor.run_for(kSecond);
  EXPECT_EQ(b->disconnected, 0);
  link.request("lost", "{}", note);
  executor.run_for(kMillisecond);
  net.cut_all();
  ASSERT_TRUE(executor.run_until([&] { return errors.size() == 2; }));
  link.request("none", "{}", note);
  ASSERT_TRUE(executor.run_until([&] { return errors.size() == 3; }));
  link.request("long", std::string(kPeerRequestTextMax + 1, ' '), note);
  ASSERT_TRUE(executor.run_until([&] { return both_connected(); }));
  open[1](std::string("to a connection that is gone"));
  executor.run_for(kSecond);
  EXPECT_EQ(b->disconnected, 1);
  EXPECT_THAT(errors, ::testing::ElementsAre(ErrorKind::Timeout, ErrorKind::Unavailable, ErrorKind::Unavailable,
                                             ErrorKind::Unavailable));
}

TEST_F(PeerLinkTest, PingMeasuresTheRoundTripAndWaitsForAConnection) {
  net.wire.delay = 20 * kMillisecond;
  make_daemons();
  pair_daemons();
  Nanoseconds rtt = 0;
  a->service->ping("bee", [&](const Result<Nanoseconds>& result) { rtt = result.value(); });
  ASSERT_TRUE(executor.run_until([&] { return rtt != 0; }));
  EXPECT_EQ(rtt, 40 * kMillisecond);
  EXPECT_EQ(a->service->link("bee")->figures().rtt, 40 * kMillisecond);
  net.cut_all();
  executor.run_for(kMillisecond);
  rtt = 0;
  b->service->ping("ay", [&](const Result<Nanoseconds>& result) { rtt = result.value(); });
  EXPECT_TRUE(executor.run_until([&] { return rtt != 0; }, 4 * kSecond));
  std::optional<ErrorKind> error;
  b->service->ping("nobody", [&](const Result<Nanoseconds>& result) { error = result.error().kind; });
  executor.run_for(kMillisecond);
  EXPECT_EQ(error, ErrorKind::NotFound);
}

// GO behind megabytes of bulk data is a guest that stands still for seconds.
TEST_F(PeerLinkTest, AControlMessageOvertakesQueuedData) {
  pair_with_groups();
  net.wire.rate = 1'250'000;  // 10 Mbit/s
  for (int i = 0; i < 4; ++i) a->channel->send(TrafficClass::Bulk, MessageType::EpochData, Bytes(1_MiB));
  executor.run_for(200 * kMillisecond);
  ASSERT_TRUE(at_b().empty()) << "the first frame is still on its way";
  const Nanoseconds since = executor.now();
  a->channel->send(TrafficClass::Control, MessageType::Go, {1});
  a->channel->send(TrafficClass::Urgent, MessageType::EpochData, {2});
  ASSERT_TRUE(executor.run_until([&] { return at_b().size() == 2; }));
  EXPECT_EQ(at_b()[0].first, MessageType::Go);
  EXPECT_EQ(at_b()[1].second, Bytes{2});
  // 192 KiB at 10 Mbit/s: what was in the stream already.
  EXPECT_LE(executor.now() - since, 220 * kMillisecond);
}

TEST_F(PeerLinkTest, MemoryAndBulkShareByWeight) {
  PeerServiceOptions options;
  options.link.weights = {.memory = 3, .bulk = 1};
  pair_with_groups(options);
  b->group_handler.keep_payloads = false;
  std::map<MessageType, uint64_t> bytes;
  b->group_handler.on_message = [&](MessageType type, ByteSpan payload) { bytes[type] += payload.size(); };
  const auto feed = [&](TrafficClass traffic) {
    const auto type = traffic == TrafficClass::Memory ? MessageType::MemoryData : MessageType::EpochData;
    while (a->channel->queued_bytes(traffic) < a->channel->queue_limit(traffic))
      a->channel->send(traffic, type, Bytes(64000));
  };
  a->group_handler.on_writable = feed;
  net.wire.rate = 12'500'000;
  feed(TrafficClass::Memory);
  feed(TrafficClass::Bulk);
  executor.run_for(10 * kSecond);
  const double share =
      static_cast<double>(bytes[MessageType::MemoryData]) / static_cast<double>(bytes[MessageType::EpochData]);
  EXPECT_NEAR(share, 3.0, 0.2);
}

// The cap is a promise to whoever else uses the line.
TEST_F(PeerLinkTest, TheRateLimitIsObeyedWithinFivePercent) {
  for (const uint64_t rate : {125'000U, 1'250'000U, 12'500'000U, 125'000'000U}) {
    pair_with_groups();
    b->group_handler.keep_payloads = false;
    PeerLink& link = *a->service->link("bee");
    link.set_rate_limit(rate);
    const auto feed = [&](TrafficClass traffic) {
      while (a->channel->queued_bytes(traffic) < a->channel->queue_limit(traffic)) {
        a->channel->send(traffic, MessageType::EpochData, Bytes(60'000));
      }
    };
    a->group_handler.on_writable = feed;
    feed(TrafficClass::Bulk);
    const uint64_t before = link.figures().sent_bytes;
    const Nanoseconds since = executor.now();
    executor.run_for(rate > 100'000'000 ? kSecond : 5 * kSecond);
    const double measured =
        static_cast<double>(link.figures().sent_bytes - before) / (static_cast<double>(executor.now() - since) / 1e9);
    EXPECT_NEAR(measured / static_cast<double>(rate), 0.975, 0.025) << rate;
    EXPECT_NEAR(static_cast<double>(link.figures().send_rate) / static_cast<double>(rate), 0.975, 0.05) << rate;
    link.set_rate_limit(rate);
    EXPECT_GT(link.figures().send_rate, 0U) << "the same cap: still true";
    link.set_rate_limit(0);
    EXPECT_EQ(link.figures().send_rate, 0U) << "what another cap allowed says nothing about the link";
    a.reset();
    b.reset();
  }
}

TEST_F(PeerLinkTest, ProducersAreToldOnceTheQueueIsHalfEmpty) {
  pair_with_groups();
  net.wire.rate = 12'500'000;
  int told = 0;
  a->group_handler.on_writable = [&](TrafficClass traffic) {
    EXPECT_EQ(traffic, TrafficClass::Bulk);
    EXPECT_LE(a->channel->queued_bytes(traffic), a->channel->queue_limit(traffic) / 2);
    ++told;
  };
  a->channel->send(TrafficClass::Bulk, MessageType::EpochData, Bytes(1_MiB));
  executor.run_for(kSecond);
  EXPECT_EQ(told, 0) << "the limit was never reached";
  for (int i = 0; i < 4; ++i) a->channel->send(TrafficClass::Bulk, MessageType::EpochData, Bytes(1_MiB));
  executor.run_for(5 * kSecond);
  EXPECT_EQ(told, 1);
}

// A producer that ignores the limit must not eat the memory of the host.
TEST_F(PeerLinkTest, AQueueBeyondAllLimitsEndsTheConnection) {
  pair_with_groups();
  net.wire.silent = true;
  for (int i = 0; i < 40; ++i) a->channel->send(TrafficClass::Bulk, MessageType::EpochData, Bytes(1_MiB));
  executor.run_for(kSecond);
  EXPECT_EQ(a->disconnected, 1);
  EXPECT_THAT(a->last_disconnect, HasSubstr("beyond all limits"));
  EXPECT_EQ(a->channel->queued_bytes(TrafficClass::Bulk), 0U);
}

}  // namespace
}  // namespace vmferry::test
