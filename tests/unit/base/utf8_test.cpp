// SPDX-License-Identifier: Apache-2.0
#include "engine/base/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace vmferry {
namespace {

TEST(Utf8, TheShortestFormOfEveryCharacterIsTakenAndNothingElse) {
  struct Row {
    const char* name;
    std::string_view bytes;
    uint32_t code;
    size_t length;
  };
  for (const Row& row :
       {Row{"ASCII", "a", 'a', 1}, Row{"last of one byte", "\x7F", 0x7F, 1}, Row{"first of two", "\xC2\x80", 0x80, 2},
        Row{"last of two", "\xDF\xBF", 0x7FF, 2}, Row{"first of three", "\xE0\xA0\x80", 0x800, 3},
        Row{"last of three", "\xEF\xBF\xBF", 0xFFFF, 3}, Row{"first of four", "\xF0\x90\x80\x80", 0x10000, 4},
        Row{"last of all", "\xF4\x8F\xBF\xBF", 0x10FFFF, 4}}) {
    const auto character = first_utf8_character(std::string(row.bytes) + "rest");
    ASSERT_TRUE(character) << row.name;
    EXPECT_EQ(character->code, row.code) << row.name;
    EXPECT_EQ(character->length, row.length) << row.name;
    for (size_t cut = 1; cut < row.bytes.size(); ++cut)
      EXPECT_FALSE(first_utf8_character(row.bytes.substr(0, cut))) << row.name << " cut to " << cut;
  }
  for (const char* bad : {"\x80", "\xBF", "\xC0\xAF", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xED\xBF\xBF",
                          "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xC3\x28"})
    EXPECT_FALSE(first_utf8_character(bad)) << bad;
}

// An escape sequence in a name that a server lists is written into the terminal of whoever asks for the list.
TEST(Utf8, PlainTextHasNothingThatChangesItsSurroundings) {
  for (const char* good : {"", "disk 1, H\u00f4tel \u20ac", "\u00a0", "\U0001F600"})
    EXPECT_TRUE(is_plain_utf8(good)) << good;
  for (const std::string_view bad :
       {std::string_view("a\0b", 3), std::string_view("a\nb"), std::string_view("\x1b[2J"), std::string_view("\x7f"),
        std::string_view("\u0085"), std::string_view("\u009f"), std::string_view("a\u2028"), std::string_view("\u202e"),
        std::string_view("\u2066"), std::string_view("\u200f"), std::string_view("a\xff")})
    EXPECT_FALSE(is_plain_utf8(bad)) << bad;
}

}  // namespace
}  // namespace vmferry
