// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/hello.h"

#include <gtest/gtest.h>

#include "engine/base/hash.h"
#include "tests/unit/netproto/golden_repl.h"

namespace vmferry {
namespace {

Hello example_hello(uint8_t node = 1) {
  return {.version_min = 1,
          .version_max = 3,
          .features = 0x0102030405060708,
          .features_required = 0x8,
          .node_id = Id128{{node, 2, 3}},
          .boot_id = Id128{{7, 8, 9}},
          .daemon_version = "0.1.0",
          .your_name = "bee"};
}

// Both versions of a daemon must be able to read each other's first message for ever, or they cannot even refuse.
TEST(Hello, BytesAreAsDocumented) {
  const Bytes hello = encode(example_hello());
  EXPECT_EQ(to_hex(hello), to_hex(golden_repl("hello.bin", hello)));
  const Bytes reject =
      encode(HelloReject{.reason = RejectReason::KeyNotPinned, .version_min = 1, .version_max = 2, .text = "no"});
  EXPECT_EQ(to_hex(reject), to_hex(golden_repl("hello_reject.bin", reject)));
  const Bytes request = encode(PeerRequest{.id = 5, .method = "preflight", .json = "{\"a\":1}"});
  EXPECT_EQ(to_hex(request), to_hex(golden_repl("peer_request.bin", request)));
  const Bytes reply = encode(PeerReply{.id = 5, .ok = false, .error = ErrorKind::Denied, .text = "no"});
  EXPECT_EQ(to_hex(reply), to_hex(golden_repl("peer_reply.bin", reply)));
}

TEST(Hello, RoundTripKeepsEveryField) {
  const Hello hello = decode_hello(encode(example_hello())).value();
  EXPECT_EQ(hello.version_min, 1);
  EXPECT_EQ(hello.version_max, 3);
  EXPECT_EQ(hello.features, 0x0102030405060708U);
  EXPECT_EQ(hello.features_required, 8U);
  EXPECT_EQ(hello.node_id, example_hello().node_id);
  EXPECT_EQ(hello.boot_id, example_hello().boot_id);
  EXPECT_EQ(hello.daemon_version, "0.1.0");
  EXPECT_EQ(hello.your_name, "bee");
}

// A truncated message that is believed compares keys and versions with zeroes.
TEST(Hello, EveryTruncationIsRefused) {
  const auto check = [](const Bytes& whole, const auto& decode, const char* name) {
    EXPECT_TRUE(decode(whole)) << name;
    for (size_t size = 0; size < whole.size(); ++size)
      EXPECT_FALSE(decode(ByteSpan(whole).first(size))) << name << size;
  };
  check(
      encode(example_hello()), [](ByteSpan bytes) { return decode_hello(bytes).has_value(); }, "hello");
  check(
      encode(HelloReject{.text = "why"}), [](ByteSpan bytes) { return decode_hello_reject(bytes).has_value(); },
      "reject");
  check(
      encode(Ping{.stamp = 1}), [](ByteSpan bytes) { return decode_ping(bytes).has_value(); }, "ping");
  check(
      encode(PeerRequest{.id = 1, .method = "m"}),
      [](ByteSpan bytes) { return decode_peer_request(bytes).has_value(); }, "request");
  check(
      encode(PeerReply{.id = 1}), [](ByteSpan bytes) { return decode_peer_reply(bytes).has_value(); }, "reply");
}

TEST(Hello, AppendedFieldsOfALaterVersionAreIgnored) {
  // Otherwise a new field would end all contact with older daemons, without a reason that they could show.
  Bytes later = encode(example_hello());
  later.insert(later.end(), {1, 2, 3, 4});
  EXPECT_TRUE(decode_hello(later).has_value());
  Bytes long_ping = encode(Ping{});
  long_ping.push_back(0);
  EXPECT_FALSE(decode_ping(long_ping).has_value());
}

TEST(Hello, ImpossibleValuesAreRefused) {
  Hello hello = example_hello();
  hello.version_min = 0;
  EXPECT_FALSE(decode_hello(encode(hello)).has_value());
  hello.version_min = 4;
  EXPECT_FALSE(decode_hello(encode(hello)).has_value());
  hello = example_hello();
  hello.boot_id = {};
  EXPECT_FALSE(decode_hello(encode(hello)).has_value());
  hello = example_hello();
  hello.node_id = {};
  EXPECT_FALSE(decode_hello(encode(hello)).has_value());
}

// A peer's words end up on an operator's terminal and in log files.
TEST(Hello, TextFromThePeerCannotCarryControlCharacters) {
  const HelloReject reject = decode_hello_reject(encode(HelloReject{.text = "a\n\x1b[2Jb\x7f\xff"})).value();
  EXPECT_EQ(reject.text, "a??[2Jb??");
  EXPECT_EQ(encode(HelloReject{.text = std::string(10'000, 'x')}).size(), 6 + 2 + kHelloTextMax);
  Hello hello = example_hello();
  hello.daemon_version = "1\r\n2";
  EXPECT_EQ(decode_hello(encode(hello)).value().daemon_version, "1??2");
}

TEST(Hello, UnknownReasonsAndErrorKindsBecomeGeneralOnes) {
  Bytes reject = encode(HelloReject{.reason = RejectReason::Version, .text = "x"});
  reject[0] = 200;
  EXPECT_EQ(decode_hello_reject(reject).value().reason, RejectReason::Other);
  Bytes reply = encode(PeerReply{.id = 1, .error = ErrorKind::Denied, .text = "x"});
  reply[9] = 200;
  EXPECT_EQ(decode_peer_reply(reply).value().error, ErrorKind::Internal);
  reply[8] = 2;
  EXPECT_FALSE(decode_peer_reply(reply).has_value());
}

// Both sides must choose the same version, or each speaks its own.
TEST(Hello, NegotiationIsSymmetric) {
  struct Row {
    const char* name;
    uint16_t a_min, a_max, b_min, b_max;
    int version;  // 0: none
  };
  const Row rows[] = {{"equal", 1, 1, 1, 1, 1},
                      {"b is newer", 1, 2, 1, 5, 2},
                      {"overlap of one", 1, 2, 2, 5, 2},
                      {"b dropped ours", 1, 2, 3, 5, 0},
                      {"a dropped b's", 4, 5, 1, 3, 0}};
  for (const Row& row : rows) {
    Hello a = example_hello(1);
    Hello b = example_hello(2);
    a.version_min = row.a_min;
    a.version_max = row.a_max;
    b.version_min = row.b_min;
    b.version_max = row.b_max;
    b.features = 0xf8;
    const auto at_a = check_hello(a, b);
    const auto at_b = check_hello(b, a);
    ASSERT_EQ(at_a.has_value(), row.version != 0) << row.name;
    ASSERT_EQ(at_b.has_value(), row.version != 0) << row.name;
    if (row.version == 0) {
      EXPECT_EQ(at_a.error().reason, RejectReason::Version) << row.name;
      continue;
    }
    EXPECT_EQ(at_a->version, row.version) << row.name;
    EXPECT_EQ(at_b->version, row.version) << row.name;
    EXPECT_EQ(at_a->features, at_b->features);
    EXPECT_EQ(at_a->features, 0x08U);
  }
}

TEST(Hello, AMissingRequiredFeatureIsRefusedFromEitherSide) {
  Hello a = example_hello(1);
  Hello b = example_hello(2);
  b.features = 0;
  b.features_required = 0;
  EXPECT_EQ(check_hello(a, b).error().reason, RejectReason::Feature);
  EXPECT_EQ(check_hello(b, a).error().reason, RejectReason::Feature);
}

// A daemon whose address list holds its own address would become its own peer.
TEST(Hello, ADaemonDoesNotConnectToItself) {
  EXPECT_EQ(check_hello(example_hello(1), example_hello(1)).error().reason, RejectReason::SelfConnected);
}

}  // namespace
}  // namespace vmferry
