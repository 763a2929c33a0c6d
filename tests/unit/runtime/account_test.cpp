// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/account.h"

#include <gtest/gtest.h>

namespace vmferry {
namespace {

// An owner that is read wrongly gives the guest's disk to somebody else.
TEST(FindOwner, TakesNamesAndNumbersOfUsersAndGroups) {
  EXPECT_EQ(find_owner("root").value().user, 0U);
  EXPECT_FALSE(find_owner("root").value().group);
  EXPECT_EQ(find_owner("root:root").value().group, 0U);
  EXPECT_EQ(find_owner("1234:5678").value().user, 1234U);
  EXPECT_EQ(find_owner("1234:5678").value().group, 5678U);
  EXPECT_EQ(find_owner(":5678").value().group, 5678U);
  EXPECT_FALSE(find_owner(":5678").value().user);
  for (const char* bad :
       {"", ":", "root:", "no-such-user-here", "root:no-such-group-here", "4294967295", "-1", "0x1"}) {
    EXPECT_FALSE(find_owner(bad)) << bad;
  }
  EXPECT_FALSE(find_owner(std::string_view("root\0x", 6)));
}

TEST(ParseSocketMode, IsOctalAndKeepsTheOwnersAccess) {
  EXPECT_EQ(parse_socket_mode("0600").value(), 0600U);
  EXPECT_EQ(parse_socket_mode("660").value(), 0660U);
  EXPECT_EQ(parse_socket_mode("0777").value(), 0777U);
  for (const char* bad : {"", "0", "0400", "0060", "1777", "0800", "rw", "0o660", "-600", "0660 "}) {
    EXPECT_FALSE(parse_socket_mode(bad)) << bad;
  }
}

}  // namespace
}  // namespace vmferry
