// SPDX-License-Identifier: Apache-2.0
//
// STARTTLS in the handshake, byte by byte: proto.md "TLS support", and who may use which export.
#include <gtest/gtest.h>

#include "netproto/nbd/handshake.h"
#include "tests/unit/netproto/nbd_test_client.h"

namespace vmferry::nbd {
namespace {

using namespace nbd_test;
using State = Handshake::State;

constexpr uint32_t kRepErrPolicy = 0x80000002, kRepErrTlsRequired = 0x80000005;

// "open" for everybody (default), "closed" for alice and bob.
class Catalog final : public ExportCatalog {
 public:
  std::optional<ExportInfo> find_export(std::string_view name) const override {
    for (const ExportInfo& info : list_exports())
      if (info.name == name || (name.empty() && info.name == "open")) return info;
    return std::nullopt;
  }
  std::vector<ExportInfo> list_exports() const override {
    return {{.name = "open", .size = 4096}, {.name = "closed", .size = 4096, .tls_allow = {"alice", "bob"}}};
  }
};

class Haggling {
 public:
  explicit Haggling(TlsPolicy policy) : handshake(catalog_, {}, policy) {
    Bytes out;
    handshake.feed(client_flags(3), out);
  }
  // Types of all answers.
  std::vector<uint32_t> say(const Bytes& bytes) {
    Bytes out;
    used = handshake.feed(bytes, out);
    std::vector<uint32_t> types;
    const std::vector<OptionAnswer> answers = option_answers(out).value();
    for (const OptionAnswer& answer : answers) types.push_back(answer.type);
    return types;
  }
  std::vector<uint32_t> go(const std::string& name) { return say(option(kOptGo, go_data(name, {}))); }
  std::vector<uint32_t> info(const std::string& name) { return say(option(kOptInfo, go_data(name, {}))); }

 private:
  Catalog catalog_;

 public:
  Handshake handshake;
  size_t used = 0;
};

using Types = std::vector<uint32_t>;

// proto.md, NOTLS: "MUST NOT respond to any option request with NBD_REP_ERR_TLS_REQD".
TEST(NbdStartTls, OffAnswersPolicyAndServesWithout) {
  Haggling off(TlsPolicy::Off);
  EXPECT_EQ(off.say(option(kOptStartTls)), Types{kRepErrPolicy});
  EXPECT_EQ(off.info("closed"), Types{kRepErrPolicy}) << "an export that names its clients stays closed without TLS";
  EXPECT_EQ(off.go("open"), (Types{kRepInfo, kRepAck}));
}

// proto.md, FORCEDTLS: every other option, known or not, well-formed or not.
TEST(NbdStartTls, RequireAnswersNothingElseBeforeTls) {
  Haggling forced(TlsPolicy::Require);
  for (const uint32_t number : {0U, kOptList, kOptInfo, kOptGo, kOptStructuredReply, kOptListMeta, kOptSetMeta,
                                kOptExtendedHeaders, 12U, 0xffffffffU}) {
    EXPECT_EQ(forced.say(option(number, "whatever")), Types{kRepErrTlsRequired}) << number;
  }
  EXPECT_EQ(forced.say(option(kOptGo, Bytes(HandshakeLimits{}.option_size_max + 1))), Types{kRepErrTlsRequired});
  EXPECT_EQ(forced.say(option(kOptAbort)), Types{kRepAck});
  EXPECT_EQ(forced.handshake.state(), State::Finished);
}

TEST(NbdStartTls, RequireDropsExportNameBeforeTls) {
  // The option has no error reply: anything that is sent would be taken for the size of the export.
  Haggling forced(TlsPolicy::Require);
  EXPECT_EQ(forced.say(option(kOptExportName, "open")), Types{});
  EXPECT_EQ(forced.handshake.state(), State::Rejected);
}

// CVE-2011-0411 in other protocols: what was buffered behind STARTTLS is executed as if it had come through TLS.
TEST(NbdStartTls, NothingBehindStartTlsIsConsumed) {
  for (const TlsPolicy policy : {TlsPolicy::Allow, TlsPolicy::Require}) {
    Haggling client(policy);
    Bytes bytes = option(kOptStartTls);
    const size_t size = bytes.size();
    const Bytes injected = option(kOptStructuredReply);
    bytes.insert(bytes.end(), injected.begin(), injected.end());
    EXPECT_EQ(client.say(bytes), Types{kRepAck});
    EXPECT_EQ(client.used, size);
    EXPECT_EQ(client.handshake.state(), State::StartTls);
    EXPECT_EQ(client.say(injected), Types{}) << "and it stays so until TLS is there";
    EXPECT_EQ(client.used, 0U);
  }
}

// An attacker in the middle may have said anything before.
TEST(NbdStartTls, WhatWasAgreedInPlaintextIsForgotten) {
  for (const uint32_t style : {kOptStructuredReply, kOptExtendedHeaders}) {
    Haggling client(TlsPolicy::Allow);
    EXPECT_EQ(client.say(option(style)), Types{kRepAck});
    EXPECT_EQ(client.say(option(kOptSetMeta, meta_data("open", {"base:allocation"}))), (Types{kRepMeta, kRepAck}));
    EXPECT_EQ(client.say(option(kOptStartTls)), Types{kRepAck});
    client.handshake.tls_started("alice");
    EXPECT_EQ(client.say(option(kOptSetMeta, meta_data("open", {"base:allocation"}))), Types{kRepErrInvalid});
    EXPECT_EQ(client.go("open"), (Types{kRepInfo, kRepAck}));
    EXPECT_FALSE(client.handshake.session().structured_replies);
    EXPECT_FALSE(client.handshake.session().base_allocation);
  }
}

TEST(NbdStartTls, ASecondOneAndOneWithDataAreInvalid) {
  // proto.md: "MUST reply with NBD_REP_ERR_INVALID"; an acknowledgement would start TLS inside of TLS.
  for (const TlsPolicy policy : {TlsPolicy::Allow, TlsPolicy::Require}) {
    Haggling client(policy);
    EXPECT_EQ(client.say(option(kOptStartTls, "x")), Types{kRepErrInvalid});
    EXPECT_EQ(client.say(option(kOptStartTls)), Types{kRepAck});
    client.handshake.tls_started("alice");
    EXPECT_EQ(client.say(option(kOptStartTls)), Types{kRepErrInvalid});
    EXPECT_EQ(client.go("open"), (Types{kRepInfo, kRepAck}));
  }
}

TEST(NbdStartTls, WithoutFixedNewstyleThereIsNoTls) {
  Catalog catalog;
  Handshake handshake(catalog, {}, TlsPolicy::Require);
  Bytes out;
  handshake.feed(client_flags(0), out);
  handshake.feed(option(kOptStartTls), out);
  EXPECT_EQ(handshake.state(), State::Rejected);
  EXPECT_TRUE(out.empty());
}

// proto.md, SELECTIVETLS: an export for named clients is a TLS-only one.
TEST(NbdStartTls, AnExportForNamedClientsNeedsTlsAndOneOfTheNames) {
  Haggling plain(TlsPolicy::Allow);
  EXPECT_EQ(plain.info("closed"), Types{kRepErrTlsRequired});
  EXPECT_EQ(plain.go("closed"), Types{kRepErrTlsRequired});
  EXPECT_EQ(plain.say(option(kOptList)), (Types{kRepServer, kRepAck})) << "and it is not listed";
  EXPECT_EQ(plain.go("open"), (Types{kRepInfo, kRepAck}));

  for (const char* name : {"mallory", "", "alic", "alice2", "Alice"}) {
    Haggling other(TlsPolicy::Allow);
    other.say(option(kOptStartTls));
    other.handshake.tls_started(name);
    EXPECT_EQ(other.info("closed"), Types{kRepErrPolicy}) << name;
    EXPECT_NE(other.handshake.take_denial(), "");
    EXPECT_EQ(other.handshake.take_denial(), "") << "told once";
    EXPECT_EQ(other.say(option(kOptListMeta, meta_data("closed", {}))).back(), kRepErrInvalid);
    other.say(option(kOptStructuredReply));
    EXPECT_EQ(other.say(option(kOptListMeta, meta_data("closed", {}))), Types{kRepErrPolicy}) << name;
    EXPECT_EQ(other.say(option(kOptList)), (Types{kRepServer, kRepAck})) << name;
    EXPECT_EQ(other.say(option(kOptExportName, "closed")), Types{});
    EXPECT_EQ(other.handshake.state(), State::Rejected) << name;
  }
  for (const char* name : {"alice", "bob"}) {
    Haggling named(TlsPolicy::Require);
    named.say(option(kOptStartTls));
    named.handshake.tls_started(name);
    EXPECT_EQ(named.say(option(kOptList)), (Types{kRepServer, kRepServer, kRepAck})) << name;
    EXPECT_EQ(named.go("closed"), (Types{kRepInfo, kRepAck})) << name;
  }
}

}  // namespace
}  // namespace vmferry::nbd
