// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/memory_messages.h"

#include <gtest/gtest.h>

namespace vmferry {
namespace {

// Layouts are a contract with daemons of other versions: written out here byte by byte.
TEST(MemoryMessages, RoundTripAndLayout) {
  Id128 attempt;
  attempt.bytes.fill(7);
  const Bytes coded = {1, 2, 3};
  const Bytes data = encode(MemoryData{attempt, 0x01020304, 0x1122334455, coded});
  ASSERT_EQ(data.size(), 31U);
  EXPECT_EQ(data[16], 0x04);
  EXPECT_EQ(data[20], 0x55);
  EXPECT_EQ(data[28], 1);
  const auto decoded = decode_memory_data(data);
  ASSERT_TRUE(decoded.has_value());
  EXPECT_EQ(decoded->generation, 0x01020304U);
  EXPECT_EQ(decoded->offset, 0x1122334455U);
  EXPECT_TRUE(std::equal(coded.begin(), coded.end(), decoded->coded.begin(), decoded->coded.end()));
  const MemoryEnd end{attempt, 99, sha256(coded)};
  EXPECT_EQ(*decode_memory_end(encode(end)), end);
  const MemoryAck ack{attempt, 10, 9};
  EXPECT_EQ(*decode_memory_ack(encode(ack)), ack);
}

TEST(MemoryMessages, TruncationTrailingBytesAndNonsenseAreRefused) {
  Id128 attempt;
  attempt.bytes.fill(7);
  const Bytes end = encode(MemoryEnd{attempt, 99, {}});
  const Bytes ack = encode(MemoryAck{attempt, 10, 9});
  const Bytes data = encode(MemoryData{attempt, 1, 2, {}});
  for (size_t size = 0; size < end.size(); ++size) EXPECT_FALSE(decode_memory_end(ByteSpan(end).first(size))) << size;
  for (size_t size = 0; size < ack.size(); ++size) EXPECT_FALSE(decode_memory_ack(ByteSpan(ack).first(size))) << size;
  for (size_t size = 0; size < data.size(); ++size)
    EXPECT_FALSE(decode_memory_data(ByteSpan(data).first(size))) << size;
  EXPECT_TRUE(decode_memory_data(data));
  for (Bytes longer : {end, ack}) {
    longer.push_back(0);
    EXPECT_FALSE(decode_memory_end(longer));
    EXPECT_FALSE(decode_memory_ack(longer));
  }
  EXPECT_FALSE(decode_memory_ack(encode(MemoryAck{attempt, 9, 10}))) << "delivered more than received";
  EXPECT_FALSE(decode_memory_ack(encode(MemoryAck{{}, 0, 0}))) << "no attempt";
  EXPECT_FALSE(decode_memory_end(encode(MemoryEnd{attempt, UINT64_MAX, {}})));
  EXPECT_FALSE(decode_memory_data(encode(MemoryData{attempt, 1, 2, Bytes(kMemoryCodedSizeMax + 1)})));
  EXPECT_TRUE(decode_memory_data(encode(MemoryData{attempt, 1, 2, Bytes(kMemoryCodedSizeMax)})));
}

}  // namespace
}  // namespace vmferry
