// SPDX-License-Identifier: Apache-2.0
//
// Several meta contexts: how they are listed, set and numbered, and what BLOCK_STATUS may ask about them.
#include <gtest/gtest.h>

#include "netproto/nbd/handshake.h"
#include "netproto/nbd/transmission.h"
#include "tests/unit/netproto/nbd_test_client.h"

namespace vmferry::nbd {
namespace {

using namespace nbd_test;

// "vda" with two contexts of its own, "vdb" with none.
class Catalog final : public ExportCatalog {
 public:
  std::optional<ExportInfo> find_export(std::string_view name) const override {
    for (const ExportInfo& info : list_exports())
      if (info.name == name) return info;
    return std::nullopt;
  }
  std::vector<ExportInfo> list_exports() const override {
    return {{.name = "vda", .size = 1 << 20, .contexts = {"vmferry:dirty-b", "vmferry:epoch"}},
            {.name = "vdb", .size = 1 << 20}};
  }
};

class NbdContexts : public ::testing::Test {
 protected:
  void SetUp() override {
    Bytes out;
    handshake_.feed(joined({client_flags(3), option(kOptStructuredReply)}), out);
  }
  // "id name" of every context in the answer.
  std::vector<std::string> ask(uint32_t number, const std::string& name, const std::vector<std::string>& queries) {
    Bytes out;
    handshake_.feed(option(number, meta_data(name, queries)), out);
    const std::vector<OptionAnswer> answers = option_answers(out).value();
    std::vector<std::string> contexts;
    for (const OptionAnswer& answer : answers) {
      if (answer.type != kRepMeta) continue;
      contexts.push_back(std::to_string(ByteReader(answer.data).be32()) + " " +
                         std::string(as_text(answer.data).substr(4)));
    }
    EXPECT_EQ(answers.back().type, kRepAck);
    return contexts;
  }
  const Session& go(const std::string& name) {
    Bytes out;
    handshake_.feed(option(kOptGo, go_data(name)), out);
    EXPECT_EQ(handshake_.state(), Handshake::State::Transmission);
    return handshake_.session();
  }

  Catalog catalog_;
  Handshake handshake_{catalog_, {}};
};

using Names = std::vector<std::string>;

// A tool that asks for "vmferry:" finds out what can be asked; proto.md: ids in a LIST mean nothing and are 0.
TEST_F(NbdContexts, ListKnowsTheNamespaceAsAWildcard) {
  const Names ours = {"0 vmferry:dirty-b", "0 vmferry:epoch"};
  EXPECT_EQ(ask(kOptListMeta, "vda", {"vmferry:"}), ours);
  EXPECT_EQ(ask(kOptListMeta, "vda", {}), (Names{"0 base:allocation", ours[0], ours[1]}));
  EXPECT_EQ(ask(kOptListMeta, "vda", {"vmferry:epoch", "base:"}), (Names{"0 base:allocation", "0 vmferry:epoch"}));
  EXPECT_EQ(ask(kOptListMeta, "vda", {"vmferry", "vmferry:dirty-", "vmferry:dirty-c", ":", ""}), Names{});
  EXPECT_EQ(ask(kOptListMeta, "vdb", {"vmferry:"}), Names{});
}

// The id in a reply is all that tells one map from the other.
TEST_F(NbdContexts, SetNumbersWhatWasChosen) {
  EXPECT_EQ(ask(kOptSetMeta, "vda", {"vmferry:"}), Names{}) << "no wildcard in SET";
  EXPECT_EQ(ask(kOptSetMeta, "vda", {"vmferry:epoch"}), Names{"2 vmferry:epoch"});
  EXPECT_EQ(ask(kOptSetMeta, "vda", {"vmferry:epoch", "vmferry:dirty-b", "base:allocation", "vmferry:epoch"}),
            (Names{"1 base:allocation", "2 vmferry:dirty-b", "3 vmferry:epoch"}));
  const Session& session = go("vda");
  EXPECT_TRUE(session.base_allocation);
  EXPECT_EQ(session.extra_contexts, (Names{"vmferry:dirty-b", "vmferry:epoch"}));
  EXPECT_EQ(RequestRules::from(session).contexts(), 7U);
}

TEST_F(NbdContexts, OneOfOursAloneIsEnoughForBlockStatus) {
  // QEMU's x-dirty-bitmap sets that one instead of base:allocation.
  EXPECT_EQ(ask(kOptSetMeta, "vda", {"vmferry:dirty-b"}), Names{"2 vmferry:dirty-b"});
  RequestRules rules = RequestRules::from(go("vda"));
  EXPECT_EQ(rules.contexts(), 2U);
  EXPECT_EQ(check_request({0, kCmdBlockStatus, 1, 0, 4096}, rules), WireError::None);
  rules.extra_contexts = 0;
  EXPECT_EQ(check_request({0, kCmdBlockStatus, 1, 0, 4096}, rules), WireError::Invalid);
}

// Ids of another export's contexts would name other maps.
TEST_F(NbdContexts, WhatWasSetForAnotherExportDoesNotCount) {
  ask(kOptSetMeta, "vda", {"vmferry:dirty-b", "base:allocation"});
  const Session& session = go("vdb");
  EXPECT_FALSE(session.base_allocation);
  EXPECT_TRUE(session.extra_contexts.empty());
}

TEST(NbdLimitedStatus, NamesOnlyWhatWasAgreed) {
  // A shift by a hostile id must not happen, nor an answer for a context that has no name.
  const RequestRules rules{.size = 1 << 20,
                           .structured_replies = true,
                           .extended_headers = true,
                           .base_allocation = false,
                           .extra_contexts = 2};
  const auto resolve = [&](std::initializer_list<uint32_t> ids) {
    Bytes payload;
    ByteWriter(payload).be64(4096);
    for (const uint32_t id : ids) ByteWriter(payload).be32(id);
    Request request{.command = kCmdBlockStatus, .length = payload.size(), .payload = true};
    return std::pair(resolve_limited_status(request, payload, rules), request.contexts);
  };
  EXPECT_EQ(resolve({3}), std::pair(WireError::None, 4U));
  EXPECT_EQ(resolve({3, 2}), std::pair(WireError::None, 6U));
  for (const uint32_t id : {0U, 1U, 4U, 16U, 17U, 33U, 34U, 0xffffffffU}) {
    EXPECT_EQ(resolve({id}).first, WireError::Invalid) << id;
    EXPECT_EQ(resolve({2, id}).first, WireError::Invalid) << id;
  }
  EXPECT_EQ(resolve({2, 2}).first, WireError::Invalid);
  EXPECT_EQ(resolve({}).first, WireError::Invalid);
}

}  // namespace
}  // namespace vmferry::nbd
