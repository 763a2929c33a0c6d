// SPDX-License-Identifier: Apache-2.0
//
// The client's handshake, against our server's codec and against servers that lie.
#include "netproto/nbd/client_handshake.h"

#include <gtest/gtest.h>

#include "netproto/nbd/handshake.h"

namespace vmferry::nbd {
namespace {

using State = ClientHandshake::State;

class OneExport final : public ExportCatalog {
 public:
  std::optional<ExportInfo> find_export(std::string_view name) const override {
    if (name != "vda") return std::nullopt;
    return ExportInfo{.name = "vda", .size = 1 << 20};
  }
  std::vector<ExportInfo> list_exports() const override { return {*find_export("vda")}; }
};

Bytes greeting(uint16_t flags = 3, uint64_t magic = kInitMagic, uint64_t style = kOptionMagic) {
  Bytes out;
  ByteWriter(out).be64(magic).be64(style).be16(flags);
  return out;
}

Bytes reply(uint32_t type, const Bytes& data = {}, uint32_t option = 7, uint64_t magic = kOptionReplyMagic) {
  Bytes out;
  ByteWriter(out).be64(magic).be32(option).be32(type).be32(static_cast<uint32_t>(data.size())).raw(data);
  return out;
}

Bytes export_info(uint64_t size = 4096, uint16_t flags = kHasFlags | kSendFlush) {
  Bytes out;
  ByteWriter(out).be16(0).be64(size).be16(flags);
  return out;
}

Bytes operator+(Bytes left, const Bytes& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

// What a client makes of all that a server says.
ClientHandshake after(const Bytes& bytes) {
  ClientHandshake client("vda");
  Bytes out;
  client.feed(bytes, out);
  return client;
}

const Bytes kGood = greeting() + reply(3, export_info()) + reply(1);

// Whatever the two sides agree on is what the kernel believes; a difference would show as I/O errors much later.
TEST(NbdClientHandshake, AgreesWithOurServer) {
  const OneExport catalog;
  Handshake server(catalog, HandshakeLimits{});
  ClientHandshake client("vda");
  Bytes to_client;
  server.greet(to_client);
  while (!client.is_final() && !to_client.empty()) {
    Bytes to_server;
    const Bytes said = std::exchange(to_client, {});
    EXPECT_EQ(client.feed(said, to_server), said.size());
    server.feed(to_server, to_client);
  }
  ASSERT_EQ(client.state(), State::Transmission) << client.reason();
  EXPECT_EQ(server.state(), Handshake::State::Transmission);
  EXPECT_EQ(client.facts().size, 1U << 20);
  EXPECT_EQ(client.facts().flags, transmission_flags(*catalog.find_export("vda"), HeaderStyle::Simple));
  EXPECT_FALSE(server.session().structured_replies) << "nbd.ko does not understand them";
}

// The cause of a failed attach is in the server's refusal; without it the operator knows nothing.
TEST(NbdClientHandshake, AnUnknownExportIsSaidWithTheServersWords) {
  const OneExport catalog;
  Handshake server(catalog, HandshakeLimits{});
  ClientHandshake client("vdb");
  Bytes to_client;
  Bytes to_server;
  server.greet(to_client);
  client.feed(std::exchange(to_client, {}), to_server);
  server.feed(to_server, to_client);
  client.feed(to_client, to_server);
  EXPECT_EQ(client.state(), State::Failed);
  EXPECT_NE(client.reason().find("'vdb': no such export"), std::string::npos) << client.reason();
}

// A cut connection must never look like an agreed one.
TEST(NbdClientHandshake, EveryTruncationWaitsAndEveryCutGivesTheSame) {
  for (size_t cut = 0; cut < kGood.size(); ++cut) {
    ClientHandshake client("vda");
    Bytes out;
    EXPECT_EQ(client.feed(ByteSpan(kGood).first(cut), out), cut);
    EXPECT_FALSE(client.is_final()) << "after " << cut << " of " << kGood.size() << " bytes";
    EXPECT_EQ(client.feed(ByteSpan(kGood).subspan(cut), out), kGood.size() - cut);
    EXPECT_EQ(client.state(), State::Transmission) << "cut at " << cut;
    EXPECT_EQ(client.facts().size, 4096U);
  }
  EXPECT_EQ(after(kGood).state(), State::Transmission);
}

// Bytes behind the acknowledgement are replies to requests that the kernel has not made: they are left to the caller.
TEST(NbdClientHandshake, TakesNothingBehindTheAcknowledgement) {
  ClientHandshake client("vda");
  Bytes out;
  EXPECT_EQ(client.feed(kGood + Bytes{1, 2, 3}, out), kGood.size());
  EXPECT_EQ(client.state(), State::Transmission);
  EXPECT_EQ(client.feed(Bytes{1}, out), 0U);
}

TEST(NbdClientHandshake, OtherInformationIsIgnored) {
  Bytes block_size;
  ByteWriter(block_size).be16(3).be32(1).be32(4096).be32(1 << 20);
  EXPECT_EQ(after(greeting() + reply(3, block_size) + reply(3, export_info()) + reply(1)).state(), State::Transmission);
}

// NO_ZEROES is only said to a server that offered it.
TEST(NbdClientHandshake, AnswersTheFlagsThatWereOffered) {
  for (const uint16_t flags : {uint16_t{1}, uint16_t{3}}) {
    ClientHandshake client("vda");
    Bytes out;
    client.feed(greeting(flags), out);
    Bytes expected;
    ByteWriter(expected).be32(flags).be64(kOptionMagic).be32(7).be32(9).be32(3).raw(as_bytes("vda")).be16(0);
    EXPECT_EQ(out, expected);
  }
}

struct Lie {
  const char* name;
  Bytes bytes;
  const char* reason;
};

class NbdClientHandshakeLie : public ::testing::TestWithParam<Lie> {};

// What comes out becomes a block device: nothing half-right may pass.
TEST_P(NbdClientHandshakeLie, IsRefused) {
  const ClientHandshake client = after(GetParam().bytes);
  EXPECT_EQ(client.state(), State::Failed);
  EXPECT_NE(client.reason().find(GetParam().reason), std::string::npos) << client.reason();
}

INSTANTIATE_TEST_SUITE_P(
    Of, NbdClientHandshakeLie,
    ::testing::Values(Lie{"OtherProtocol", greeting(3, 0x5353482d322e302d), "no NBD server"},
                      Lie{"OldStyle", greeting(3, kInitMagic, 0x00420281861253), "not fixed newstyle"},
                      Lie{"NotFixed", greeting(2), "not fixed newstyle"},
                      Lie{"ReplyMagic", greeting() + reply(1, {}, 7, 1), "wrong magic"},
                      Lie{"ReplyToAnotherOption", greeting() + reply(1, {}, 6), "option 6"},
                      Lie{"ReplyTooLong", greeting() + reply(3, Bytes(ClientHandshake::kReplySizeMax + 1)), "at most"},
                      Lie{"AckWithoutExport", greeting() + reply(1), "without the export's size"},
                      Lie{"AckWithData", greeting() + reply(3, export_info()) + reply(1, {0}), "with data"},
                      Lie{"InfoWithoutType", greeting() + reply(3, {0}), "without a type"},
                      Lie{"ExportInfoShort", greeting() + reply(3, Bytes(11)), "11 bytes"},
                      Lie{"ExportInfoLong", greeting() + reply(3, Bytes(13)), "13 bytes"},
                      Lie{"SizeNegative", greeting() + reply(3, export_info(uint64_t{1} << 63)), "an export of"},
                      Lie{"NoFlags", greeting() + reply(3, export_info(4096, kSendFlush)), "HAS_FLAGS"},
                      Lie{"UnknownType", greeting() + reply(2), "unknown type 2"},
                      Lie{"ErrorWithForeignText", greeting() + reply(0x80000002, {'a', '\n', '\'', 0x1b}),
                          "refused by policy: a?'?"},
                      Lie{"TlsRequired", greeting() + reply(0x80000005), "requires TLS"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(NbdClientHandshake, InformationWithoutEndIsCutOff) {
  Bytes bytes = greeting();
  for (uint32_t i = 0; i <= ClientHandshake::kReplyCountMax; ++i) bytes = bytes + reply(3, export_info());
  EXPECT_EQ(after(bytes).state(), State::Failed);
}

}  // namespace
}  // namespace vmferry::nbd
