// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include "tests/unit/replicate/peer_test_daemon.h"

namespace vmferry::test {
namespace {

using ::testing::HasSubstr;
using PeerPairing = PeerTest;

// Without this no two daemons ever meet.
TEST_F(PeerPairing, JoinPinsBothKeysAndEitherSideKnowsTheOther) {
  make_daemons();
  const auto joined = join(*b, invite({.replicate_in = true, .verify = true, .migrate_in = false}), "ay");
  ASSERT_TRUE(joined.has_value()) << joined.error().text;
  EXPECT_EQ(joined->name, "ay");
  EXPECT_EQ(joined->their_name_for_us, "bee");
  EXPECT_FALSE(joined->granted_to_us.migrate_in);
  EXPECT_TRUE(joined->granted_to_them.migrate_in);

  ASSERT_NE(a->service->find("bee"), nullptr);
  EXPECT_EQ(a->service->find("bee")->key, b->identity()->key_hash());
  EXPECT_EQ(b->service->find("ay")->key, a->identity()->key_hash());
  EXPECT_TRUE(a->service->check_right("bee", &PeerRights::verify).has_value());
  EXPECT_EQ(a->service->check_right("bee", &PeerRights::migrate_in).error().kind, ErrorKind::Denied);
  EXPECT_TRUE(executor.run_until([&] { return both_connected(); }));
}

// The joiner tells where it listens; without that only one side could ever dial.
TEST_F(PeerPairing, InviterCanDialTheJoinerAtThePortItNamed) {
  PeerServiceOptions options;
  options.listen_port = 4410;
  options.listen_addresses = {"192.0.2.2:4410"};
  make_daemons({}, options);
  pair_daemons();
  const std::vector<std::string> expected = {"192.0.2.7:4410",
                                             "192.0.2.2:4410"};  // as seen by the inviter, then as told
  EXPECT_EQ(a->service->find("bee")->addresses, expected);
  b->service->stop();
  b->restart();
  EXPECT_TRUE(executor.run_until([&] { return both_connected(); }));
}

// A token that works twice lets whoever finds it later in a shell history in.
TEST_F(PeerPairing, AUsedTokenIsRefusedOnBothSides) {
  make_daemons();
  const std::string token = invite();
  ASSERT_TRUE(join(*b, token, "ay").has_value());
  TestDaemon c(executor, net, "192.0.2.3:4410");
  const auto second = join(c, token, "ay", "cee");
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().kind, ErrorKind::Denied);
  EXPECT_THAT(second.error().text, HasSubstr("used already, by peer 'bee'"));
  EXPECT_THAT(last_refusal(*a), HasSubstr("used already"));
  EXPECT_EQ(a->service->find("cee"), nullptr);
  EXPECT_EQ(c.service->find("ay"), nullptr);
}

TEST_F(PeerPairing, AnExpiredTokenIsRefusedOnBothSides) {
  // 15 minutes is the promise that `invite` prints.
  make_daemons();
  const std::string token = invite();
  executor.run_for((InviteBook::kLifetimeS + 1) * kSecond);
  const auto joined = join(*b, token, "ay");
  ASSERT_FALSE(joined.has_value());
  EXPECT_THAT(joined.error().text, HasSubstr("expired"));
  EXPECT_THAT(last_refusal(*a), HasSubstr("expired"));
}

TEST_F(PeerPairing, ATokenStillWorksJustBeforeItExpires) {
  make_daemons();
  const std::string token = invite();
  executor.run_for((InviteBook::kLifetimeS - 2) * kSecond);
  EXPECT_TRUE(join(*b, token, "ay").has_value());
}

// Guessing at the secret must end; and the tries must not come back with a restart of the inviter.
TEST_F(PeerPairing, FiveWrongTriesKillTheTokenEvenAcrossARestart) {
  make_daemons();
  const std::string good = invite();
  PairingToken wrong = decode_token(good).value();
  wrong.secret[0] ^= 1;
  for (int attempt = 1; attempt <= 5; ++attempt) {
    const auto joined = join(*b, encode_token(wrong), "ay");
    ASSERT_FALSE(joined.has_value());
    EXPECT_THAT(joined.error().text, HasSubstr(fmt::format("{} tries are left", 5 - attempt)));
    if (attempt == 3) a->restart();
  }
  for (const std::string& token : {encode_token(wrong), good}) {
    const auto joined = join(*b, token, "ay");
    ASSERT_FALSE(joined.has_value());
    EXPECT_THAT(joined.error().text, HasSubstr("dead after 5 wrong tries"));
  }
  EXPECT_EQ(a->service->find("bee"), nullptr);
}

TEST_F(PeerPairing, FourWrongTriesLeaveTheTokenAlive) {
  make_daemons();
  const std::string good = invite();
  PairingToken wrong = decode_token(good).value();
  wrong.secret[31] ^= 0x80;
  for (int attempt = 0; attempt < 4; ++attempt) EXPECT_FALSE(join(*b, encode_token(wrong), "ay").has_value());
  EXPECT_TRUE(join(*b, good, "ay").has_value());
}

// Somebody else answering at the address must learn neither the secret nor a usable proof.
TEST_F(PeerPairing, JoinStopsWhenTheAddressHasAnotherKey) {
  make_daemons();
  PairingToken token = decode_token(invite()).value();
  token.inviter_key[0] ^= 1;
  const auto joined = join(*b, encode_token(token), "ay");
  ASSERT_FALSE(joined.has_value());
  EXPECT_THAT(joined.error().text, HasSubstr("is pinned"));
  EXPECT_THAT(last_refusal(*a), HasSubstr("expects another key"));
}

TEST_F(PeerPairing, AnUnknownTokenIsRefusedOnBothSides) {
  make_daemons();
  PairingToken token = decode_token(invite()).value();
  token.id[0] ^= 1;
  const auto joined = join(*b, encode_token(token), "ay");
  ASSERT_FALSE(joined.has_value());
  EXPECT_THAT(joined.error().text, HasSubstr("not known here"));
}

// A mistyped token must not cost one of the five tries.
TEST_F(PeerPairing, AMistypedTokenIsFoundWithoutAskingTheInviter) {
  make_daemons();
  std::string token = invite();
  token[40] = token[40] == 'A' ? 'B' : 'A';
  const int before = net.dialled;
  const auto joined = join(*b, token, "ay");
  ASSERT_FALSE(joined.has_value());
  EXPECT_EQ(joined.error().kind, ErrorKind::InvalidArgument);
  EXPECT_EQ(net.dialled, before);
}

TEST_F(PeerPairing, NamesAreCheckedBeforeAnythingIsSent) {
  make_daemons();
  const std::string token = invite();
  EXPECT_EQ(join(*b, token, "../ay").error().kind, ErrorKind::InvalidArgument);
  EXPECT_EQ(join(*b, token, "ay", "a b").error().kind, ErrorKind::InvalidArgument);
  EXPECT_EQ(join(*a, token, "self").error().kind, ErrorKind::InvalidArgument);
  EXPECT_TRUE(join(*b, token, "ay").has_value()) << "the refused calls must not have used it up";
}

// Two hosts with one host name are common; the second must not replace the first.
TEST_F(PeerPairing, ATakenNameIsMadeUniqueAtTheInviter) {
  make_daemons();
  ASSERT_TRUE(join(*b, invite(), "ay").has_value());
  TestDaemon c(executor, net, "192.0.2.3:4410");
  const auto joined = join(c, invite(), "ay");
  ASSERT_TRUE(joined.has_value());
  EXPECT_EQ(joined->their_name_for_us, "bee-2");
  const auto conflict =
      join(*b, encode_token({.inviter_key = c.identity()->key_hash(), .addresses = {c.address()}}), "ay");
  EXPECT_EQ(conflict.error().kind, ErrorKind::Exists);
}

TEST_F(PeerPairing, PairingAgainKeepsOneRecord) {
  make_daemons();
  pair_daemons();
  const auto again = join(*b, invite({.replicate_in = true, .verify = false, .migrate_in = false}), "ay", "other");
  ASSERT_TRUE(again.has_value()) << again.error().text;
  EXPECT_EQ(again->their_name_for_us, "bee");
  EXPECT_EQ(a->service->list().size(), 1U);
  EXPECT_FALSE(a->service->find("bee")->rights.migrate_in);
}

// The joiner must not believe that it is paired when the inviter forgets it at the next restart.
TEST_F(PeerPairing, NothingIsPairedWhenTheInviterCannotStoreIt) {
  make_daemons();
  const std::string token = invite();
  a->save_fails = true;
  const auto joined = join(*b, token, "ay");
  ASSERT_FALSE(joined.has_value());
  EXPECT_THAT(joined.error().text, HasSubstr("disk full"));
  EXPECT_EQ(a->service->find("bee"), nullptr);
  EXPECT_EQ(b->service->find("ay"), nullptr);
}

TEST_F(PeerPairing, ASecretIsNeitherStoredNorLogged) {
  make_daemons();
  const std::string token = invite();
  const PairingToken decoded = decode_token(token).value();
  ASSERT_TRUE(join(*b, token, "ay").has_value());
  const std::string hex = to_hex(decoded.secret);
  EXPECT_EQ(a->saved.dump().find(hex), std::string::npos);
  EXPECT_FALSE(logged(hex));
  EXPECT_FALSE(logged(token.substr(9)));
}

TEST_F(PeerPairing, PeersSurviveARestartOfBoth) {
  make_daemons();
  pair_daemons();
  a->restart();
  b->restart();
  EXPECT_TRUE(executor.run_until([&] { return both_connected(); }));
}

// A removed peer's key must open nothing, and both operators must see why.
TEST_F(PeerPairing, ARemovedPeerIsRefusedWithTheReasonOnBothSides) {
  make_daemons();
  pair_daemons();
  Status removed = fail(ErrorKind::Internal, "never");
  a->service->remove("bee", [&](const Status& status) { removed = status; });
  executor.run_for(2 * kSecond);
  EXPECT_TRUE(removed.has_value());
  EXPECT_EQ(a->service->link("bee"), nullptr);
  EXPECT_EQ(a->removed, 1);
  EXPECT_FALSE(b->service->link("ay")->connected());
  EXPECT_THAT(b->service->link("ay")->last_error(), HasSubstr("not paired here"));
  EXPECT_THAT(last_refusal(*a), HasSubstr(to_hex(b->identity()->key_hash())));
}

TEST_F(PeerPairing, AReplacedStateDirectoryIsRefusedWithTheReasonOnBothSides) {
  make_daemons();
  pair_daemons();
  a->service->stop();
  a->identity_ = std::make_shared<TlsIdentity>(TlsIdentity::generate().value());
  a->restart();
  executor.run_for(15 * kSecond);
  EXPECT_FALSE(b->service->link("ay")->connected());
  EXPECT_THAT(b->service->link("ay")->last_error(), HasSubstr("is pinned"));
  EXPECT_THAT(last_refusal(*a), HasSubstr("expects another key"));
  EXPECT_THAT(a->service->link("bee")->last_error(), HasSubstr("expects another key"));
}

TEST_F(PeerPairing, AnOldProtocolVersionIsRefusedWithTheReasonOnBothSides) {
  PeerServiceOptions newer;
  newer.version_min = 2;
  newer.version_max = 3;
  make_daemons();
  pair_daemons();
  b->service->stop();
  b->options_.version_min = newer.version_min;
  b->options_.version_max = newer.version_max;
  b->restart();
  executor.run_for(3 * kSecond);
  EXPECT_FALSE(both_connected());
  EXPECT_THAT(a->service->link("bee")->last_error(), HasSubstr("have none in common"));
  EXPECT_THAT(b->service->link("ay")->last_error(), HasSubstr("have none in common"));
  TestDaemon c(executor, net, "192.0.2.3:4410", newer);
  const auto joined = join(c, invite(), "ay", "cee");
  ASSERT_FALSE(joined.has_value());
  EXPECT_EQ(joined.error().kind, ErrorKind::Mismatch);
  EXPECT_THAT(joined.error().text, HasSubstr("1..1"));
}

TEST_F(PeerPairing, AMissingRequiredFeatureIsRefused) {
  PeerServiceOptions demanding;
  demanding.features = kFeaturesKnown | 1ULL << 40;
  demanding.features_required = 1ULL << 40;
  make_daemons();
  pair_daemons();
  b->service->stop();
  b->options_.features = demanding.features;
  b->options_.features_required = demanding.features_required;
  b->restart();
  executor.run_for(3 * kSecond);
  EXPECT_THAT(a->service->link("bee")->last_error(), HasSubstr("feature bits 0x10000000000"));
}

// Strangers that connect and say nothing must neither stay for ever nor keep others out.
TEST_F(PeerPairing, StallingStrangersDoNotKeepAPeerOut) {
  PeerServiceOptions options;
  options.strangers_max = 8;
  make_daemons(options);
  std::vector<std::unique_ptr<ByteStream>> stalled;
  for (int i = 0; i < 40; ++i) {
    net.connect(a->address(),
                [&](Result<std::unique_ptr<ByteStream>> stream) { stalled.push_back(std::move(*stream)); });
  }
  executor.run_for(kSecond);
  EXPECT_EQ(stalled.size(), 40U);
  EXPECT_TRUE(join(*b, invite(), "ay").has_value());
  EXPECT_TRUE(executor.run_until([&] { return both_connected(); }));
}

TEST_F(PeerPairing, RubbishFromAStrangerClosesOnlyItsConnection) {
  make_daemons();
  std::unique_ptr<ByteStream> rubbish;
  net.connect(a->address(), [&](Result<std::unique_ptr<ByteStream>> stream) {
    rubbish = std::move(*stream);
    rubbish->write(as_bytes("GET / HTTP/1.1\r\nHost: example\r\n\r\n"));
  });
  executor.run_for(kSecond);
  EXPECT_THAT(last_refusal(*a), HasSubstr("TLS"));
  pair_daemons();
}

// The handshakes of TLS, Hello and pairing must not depend on how the network cuts the stream.
TEST_F(PeerPairing, WorksWithDeliveryOfSingleBytes) {
  net.wire.piece = 1;
  make_daemons();
  pair_daemons();
  EXPECT_EQ(a->disconnected + b->disconnected, 0);
}

}  // namespace
}  // namespace vmferry::test
