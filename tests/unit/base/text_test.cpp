// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "engine/base/text.h"

namespace vmferry {
namespace {

// "20G" read as 20 bytes or as 20e9 would create a volume of the wrong size.
TEST(ParseSize, SuffixesArePowersOf1024) {
  EXPECT_EQ(parse_size("512").value(), 512U);
  EXPECT_EQ(parse_size("4K").value(), 4096U);
  EXPECT_EQ(parse_size("20G").value(), 20_GiB);
  EXPECT_EQ(parse_size("1.5GiB").value(), 1536_MiB);
  for (const char* bad : {"", "G", "-1", "1X", "1 G", "1.G", "0x10", "99999999999999999999", "9999999T"}) {
    EXPECT_FALSE(parse_size(bad)) << bad;
  }
}

TEST(ParseBitRate, DecimalBitsBecomeBytes) {
  EXPECT_EQ(parse_bit_rate("80Mbit").value(), 10'000'000U);
  EXPECT_EQ(parse_bit_rate("1Gbit").value(), 125'000'000U);
  EXPECT_FALSE(parse_bit_rate("80MB"));
  EXPECT_FALSE(parse_bit_rate("7"));
}

TEST(ParseDuration, UnitsAndPlainSeconds) {
  EXPECT_EQ(parse_duration("300ms").value(), 300 * kMillisecond);
  EXPECT_EQ(parse_duration("30m").value(), 1800 * kSecond);
  EXPECT_EQ(parse_duration("2").value(), 2 * kSecond);
  EXPECT_FALSE(parse_duration("2w"));
}

// A name that ends the line it is printed in forges the next one.
TEST(Printable, KeepsPlainTextAndReplacesTheRest) {
  EXPECT_EQ(printable("alice-01.example"), "alice-01.example");
  EXPECT_EQ(printable("a\nb\"c\\d\x7f\xc3\xa4"), "a?b?c?d???");
  EXPECT_EQ(printable(std::string(128, 'x')), std::string(128, 'x'));
  EXPECT_EQ(printable(std::string(129, 'x')), std::string(128, 'x') + "...");
}

}  // namespace
}  // namespace vmferry
