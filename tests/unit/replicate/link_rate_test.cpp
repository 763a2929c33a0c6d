// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/link_rate.h"

#include <gtest/gtest.h>

namespace vmferry {
namespace {

// A ping that stood in a cut of 5 s says nothing about the link after it; believed, it keeps a guest from being handed
// over for half a minute.
TEST(RttMeter, APingFromACutDoesNotMakeTheLinkLong) {
  RttMeter meter;
  EXPECT_EQ(meter.rtt(), 0);
  meter.saw(5 * kSecond);
  EXPECT_EQ(meter.rtt(), 5 * kSecond);
  meter.saw(20 * kMillisecond);
  EXPECT_EQ(meter.rtt(), 20 * kMillisecond);
  meter.saw(5 * kSecond);
  EXPECT_EQ(meter.rtt(), 20 * kMillisecond);
}

// A path that became longer must be believed some time, or every prediction stays too short.
TEST(RttMeter, ALongerPathIsBelievedAfterEightPings) {
  RttMeter meter;
  meter.saw(20 * kMillisecond);
  for (int ping = 0; ping < 7; ++ping) meter.saw(100 * kMillisecond);
  EXPECT_EQ(meter.rtt(), 20 * kMillisecond);
  meter.saw(100 * kMillisecond);
  EXPECT_EQ(meter.rtt(), 100 * kMillisecond);
}

}  // namespace
}  // namespace vmferry
