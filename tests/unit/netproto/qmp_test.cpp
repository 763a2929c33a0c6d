// SPDX-License-Identifier: Apache-2.0
#include "netproto/qemu/qmp.h"

#include <gtest/gtest.h>

namespace vmferry::qmp {
namespace {

constexpr std::string_view kGreeting =
    R"({"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}})"
    "\r\n";

struct Conversation {
  Codec codec;
  std::vector<Message> messages;
  Status feed(std::string_view text) { return codec.feed(as_bytes(text), messages); }
  uint64_t command(std::string_view name) {
    uint64_t id = 0;
    codec.encode(name, nullptr, id);
    return id;
  }
};

// A reply paired with the wrong command would let a handover act on the answer to another question.
TEST(Qmp, GreetingRepliesAndEventsAreToldApart) {
  Conversation c;
  ASSERT_TRUE(c.feed(kGreeting));
  ASSERT_EQ(std::get<Greeting>(c.messages.at(0)).major, 7);
  EXPECT_EQ(std::get<Greeting>(c.messages.at(0)).micro, 22);
  const uint64_t first = c.command("stop");
  const uint64_t second = c.command("cont");
  EXPECT_NE(first, second);
  ASSERT_TRUE(c.feed(R"({"timestamp": {"seconds": 1}, "event": "MIGRATION", "data": {"status": "active"}})"
                     "\r\n"));
  EXPECT_EQ(std::get<Event>(c.messages.at(1)).name, "MIGRATION");
  EXPECT_EQ(text_of(std::get<Event>(c.messages.at(1)).data, "status"), "active");
  ASSERT_TRUE(c.feed(fmt::format(R"({{"return": {{"a": 1}}, "id": {}}})"
                                 "\n",
                                 second)));
  ASSERT_TRUE(c.feed(fmt::format(R"({{"id": {}, "error": {{"class": "GenericError", "desc": "no\nway"}}}})"
                                 "\n",
                                 first)));
  EXPECT_EQ(std::get<Reply>(c.messages.at(2)).id, second);
  EXPECT_EQ(number_of(*std::get<Reply>(c.messages.at(2)).value, "a"), 1U);
  EXPECT_EQ(std::get<Reply>(c.messages.at(3)).id, first);
  EXPECT_EQ(std::get<Reply>(c.messages.at(3)).value.error().text, "no way") << "no line breaks into the log";
}

// QEMU may be in its guest's hands, and its error texts are printed on the operator's terminal.
TEST(Qmp, ErrorTextsHoldNothingThatATerminalObeys) {
  Codec c;
  std::vector<Message> out;
  ASSERT_TRUE(c.feed(as_bytes(kGreeting), out));
  uint64_t id = 0;
  (void)c.encode("stop", {}, id);
  ASSERT_TRUE(
      c.feed(as_bytes(R"({"id": 1, "error": {"class": "GenericError", "desc": "\u001b[2J\u009b2J\u007f\u202e"}})"
                      "\n"),
             out));
  const auto& reply = std::get<Reply>(out.back());
  ASSERT_FALSE(reply.value);
  for (const char letter : reply.value.error().text) EXPECT_TRUE(letter >= 0x20 && letter <= 0x7e);
}

TEST(Qmp, AnyCutOfTheStreamGivesTheSameMessages) {
  const std::string text =
      std::string(kGreeting) + R"({"event": "STOP", "data": {}})" + "\r\n" + R"({"return": {}, "id": 1})" + "\r\n";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    Conversation c;
    c.command("x");
    ASSERT_TRUE(c.feed(text.substr(0, cut)));
    ASSERT_TRUE(c.feed(text.substr(cut)));
    ASSERT_EQ(c.messages.size(), 3U) << cut;
  }
}

TEST(Qmp, EncodedCommandIsOneLineWithItsArguments) {
  Codec codec;
  uint64_t id = 0;
  const std::string line = codec.encode("getfd", {{"fdname", "a\nb"}}, id);
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  EXPECT_TRUE(line.ends_with('\n'));
  const Json parsed = Json::parse(line);
  EXPECT_EQ(parsed["execute"], "getfd");
  EXPECT_EQ(parsed["arguments"]["fdname"], "a\nb");
  EXPECT_EQ(parsed["id"], id);
  EXPECT_FALSE(Json::parse(codec.encode("stop", nullptr, id)).contains("arguments"));
}

// A guest that took over its QEMU writes here whatever it likes.
TEST(Qmp, HostileInputEndsTheConversation) {
  struct Row {
    const char* name;
    std::string text;
    bool greeted = true;
  };
  const Row rows[] = {
      {"no greeting", R"({"return": {}, "id": 1})", false},
      {"not an object", "[1, 2]"},
      {"number", "7"},
      {"not JSON", "hello"},
      {"reply to nothing", R"({"return": {}, "id": 99})"},
      {"reply to id 0", R"({"return": {}, "id": 0})"},
      {"id of another type", R"({"return": {}, "id": "1"})"},
      {"negative id", R"({"return": {}, "id": -1})"},
      {"no id", R"({"return": {}})"},
      {"both", R"({"return": {}, "error": {}, "id": 1})"},
      {"neither", R"({"id": 1})"},
      {"event without name", R"({"event": 5})"},
      {"event with a long name", R"({"event": ")" + std::string(129, 'x') + R"("})"},
      {"error without id", R"({"error": {"class": "GenericError", "desc": "JSON parse error"}})"},
      {"deep nesting", std::string(5000, '[')},
      {"invalid UTF-8", "{\"event\": \"\xff\xfe\"}"},
  };
  for (const Row& row : rows) {
    Conversation c;
    c.command("x");
    if (row.greeted) {
      ASSERT_TRUE(c.feed(kGreeting));
    }
    const size_t before = c.messages.size();
    EXPECT_FALSE(c.feed(row.text + "\n")) << row.name;
    EXPECT_EQ(c.messages.size(), before) << row.name;
    EXPECT_FALSE(c.feed("\n")) << row.name << ": an error is final";
  }
}

TEST(Qmp, EndlessLineIsCutAtTheLimit) {
  Conversation c;
  ASSERT_TRUE(c.feed(kGreeting));
  const std::string piece(64 << 10, ' ');
  Status status;
  int pieces = 0;
  for (; status && pieces < 100; ++pieces) status = c.feed(piece);
  EXPECT_FALSE(status);
  EXPECT_EQ(pieces, 17) << "1 MiB is allowed, more is not";
}

TEST(Qmp, FieldsOfTheWrongTypeCountAsMissing) {
  const Json value = {{"text", 5}, {"number", -1}, {"flag", "true"}, {"object", Json::array()}, {"array", 1}};
  EXPECT_EQ(text_of(value, "text"), "");
  EXPECT_EQ(number_of(value, "number"), 0U);
  EXPECT_FALSE(flag_of(value, "flag"));
  EXPECT_TRUE(object_of(value, "object").empty() && object_of(value, "none").is_object());
  EXPECT_TRUE(array_of(value, "array").is_array());
  EXPECT_EQ(text_of(Json(5), "x"), "");
  EXPECT_EQ(number_of(Json::array(), "x"), 0U);
}

}  // namespace
}  // namespace vmferry::qmp
