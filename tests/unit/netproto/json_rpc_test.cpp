// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "netproto/rpc/json_rpc.h"

namespace vmferry {
namespace {

// A message cut anywhere by the socket has to come out as if it had come whole.
TEST(JsonLines, EverySplitGivesTheSameValues) {
  const std::string text = "{\"a\":1}\n\n[2,\"x\\n\"]\n";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    JsonLineReader reader;
    std::vector<Json> values;
    ASSERT_TRUE(reader.feed(as_bytes(std::string_view(text).substr(0, cut)), values));
    ASSERT_TRUE(reader.feed(as_bytes(std::string_view(text).substr(cut)), values));
    ASSERT_EQ(values.size(), 2U) << cut;
    EXPECT_EQ(values[0]["a"], 1);
    EXPECT_EQ(values[1][1], "x\n");
  }
}

// Without limits a client of the control socket could make the daemon hold or recurse without bound.
TEST(JsonLines, LimitsEndTheConversation) {
  std::vector<Json> values;
  JsonLineReader by_size({.line_size_max = 16, .depth_max = 32});
  EXPECT_FALSE(by_size.feed(as_bytes("[1,2,3,4,5,6,7,8,9]"), values));
  EXPECT_FALSE(by_size.feed(as_bytes("1\n"), values));
  JsonLineReader by_depth({.line_size_max = 1000, .depth_max = 3});
  EXPECT_TRUE(by_depth.feed(as_bytes("[[[1]]]\n"), values));
  EXPECT_TRUE(by_depth.feed(as_bytes("[\"[[[[[\"]\n"), values));
  EXPECT_FALSE(by_depth.feed(as_bytes("[[[[1]]]]\n"), values));
  EXPECT_EQ(values.size(), 2U);
}

TEST(JsonLines, GarbageIsAnErrorNotAThrow) {
  std::vector<Json> values;
  JsonLineReader reader;
  EXPECT_FALSE(reader.feed(as_bytes("{nope}\n"), values));
  EXPECT_TRUE(values.empty());
  EXPECT_EQ(to_json_line(Json("\xff")), "\"\xef\xbf\xbd\"\n");
}

// A request that is taken although malformed would act on defaults that nobody asked for.
TEST(JsonRpc, MalformedRequestsAreRefused) {
  const char* bad[] = {"[]",
                       "1",
                       R"({"method":"x"})",
                       R"({"jsonrpc":"1.0","method":"x"})",
                       R"({"jsonrpc":"2.0"})",
                       R"({"jsonrpc":"2.0","method":1})",
                       R"({"jsonrpc":"2.0","method":"x","id":{}})"};
  for (const char* text : bad) EXPECT_FALSE(rpc::decode_request(parse_json(text).value())) << text;
  const auto good = rpc::decode_request(rpc::encode_request(7, "status", {{"watch", true}}));
  ASSERT_TRUE(good);
  EXPECT_EQ(good->method, "status");
  EXPECT_EQ(good->params["watch"], true);
  EXPECT_FALSE(good->notification);
  EXPECT_FALSE(good->params_refused);
  for (const char* params : {"[1]", "1", "null"}) {
    const auto refused = rpc::decode_request(
        parse_json(fmt::format(R"({{"jsonrpc":"2.0","method":"x","id":7,"params":{}}})", params)).value());
    ASSERT_TRUE(refused) << params;
    EXPECT_TRUE(refused->params_refused) << params;
    EXPECT_EQ(refused->id, 7);
    EXPECT_TRUE(refused->params.is_object());
  }
}

TEST(JsonRpc, ErrorsKeepKindAndText) {
  const auto response = rpc::decode_response(rpc::encode_error("a", Error{ErrorKind::Fenced, "term 3 is behind 4"}));
  ASSERT_TRUE(response);
  EXPECT_TRUE(response->is_error);
  EXPECT_EQ(response->kind, "fenced");
  EXPECT_EQ(response->text, "term 3 is behind 4");
  EXPECT_FALSE(rpc::decode_response(parse_json(R"({"id":1})").value()));
}

}  // namespace
}  // namespace vmferry
