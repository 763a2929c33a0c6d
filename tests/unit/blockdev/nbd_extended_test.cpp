// SPDX-License-Identifier: Apache-2.0
//
// The NBD server with extended headers: payloads, effects beyond 4 GiB, limited block status.
#include <gtest/gtest.h>

#include "blockdev/nbd/nbd_server.h"
#include "tests/unit/blockdev/nbd_test_support.h"

namespace vmferry {
namespace {

using namespace nbd_test;

class NbdExtendedServer : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(server_->add_export({.name = "vda", .device = &disk_}).has_value());
    ASSERT_TRUE(client_.go({.extended = true, .base_allocation = true}));
  }
  void TearDown() override {
    bool drained = false;
    server_->drain([&] { drained = true; });
    executor_.advance(60 * kSecond);
    EXPECT_TRUE(drained);
    EXPECT_EQ(server_->stats().inflight_bytes, 0U);
  }
  // The error of the one chunk that answers.
  int64_t ask(uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, ByteSpan payload = {}) {
    client_.send(extended_request(command, flags, ++cookie_, offset, length, payload));
    const auto reply = client_.reply();
    if (!reply) return -1;
    EXPECT_EQ(reply->cookie, cookie_);
    EXPECT_EQ(reply->flags, 1) << "one chunk, with DONE";
    last_ = *reply;
    return reply->error;
  }
  static Bytes limited(uint64_t length, std::initializer_list<uint32_t> contexts) {
    Bytes out;
    ByteWriter writer(out);
    writer.be64(length);
    for (const uint32_t context : contexts) writer.be32(context);
    return out;
  }

  ManualExecutor executor_;
  RamDevice disk_{executor_, 64_MiB};
  std::unique_ptr<NbdServer> server_ = std::make_unique<NbdServer>(executor_, NbdLimits{});
  Client client_{executor_, *server_};
  Reply last_;
  uint64_t cookie_ = 100;
};

TEST_F(NbdExtendedServer, WritesAndReadsBack) {
  const Bytes data(8192, 0x5a);
  EXPECT_EQ(ask(kCmdWrite, kFlagPayload, 4096, data.size(), data), 0);
  EXPECT_EQ(last_.type, 0);
  EXPECT_EQ(ask(kCmdRead, 0, 4096, data.size()), 0);
  EXPECT_EQ(last_.type, 1);
  EXPECT_EQ(ByteReader(last_.data).be64(), 4096U);
  EXPECT_EQ(Bytes(last_.data.begin() + 8, last_.data.end()), data);
  EXPECT_EQ(ask(kCmdFlush, 0, 0, 0), 0);
}

TEST_F(NbdExtendedServer, WriteWithoutThePayloadFlagStaysInStep) {
  // Early clients forgot the flag; to take their payload for a header would end the session.
  const Bytes data(512, 1);
  EXPECT_EQ(ask(kCmdWrite, 0, 0, data.size(), data), 0);
  EXPECT_EQ(ask(kCmdFlush, 0, 0, 0), 0);
}

TEST_F(NbdExtendedServer, PayloadOfACommandThatHasNoneIsSkippedAndRefused) {
  EXPECT_EQ(ask(kCmdTrim, kFlagPayload, 0, 1000, Bytes(1000, 7)), kEinval);
  EXPECT_EQ(ask(kCmdRead, kFlagPayload, 0, 10, Bytes(10, 7)), kEinval);
  EXPECT_EQ(ask(kCmdFlush, 0, 0, 0), 0) << "still in step";
}

TEST_F(NbdExtendedServer, AbsurdPayloadDropsTheConnectionInsteadOfReadingForEver) {
  client_.send(extended_request(kCmdWrite, kFlagPayload, 1, 0, 1ULL << 60));
  EXPECT_FALSE(client_.open());
}

TEST_F(NbdExtendedServer, EffectBeyondTheEndIsRefusedWholly) {
  EXPECT_EQ(ask(kCmdWriteZeroes, 0, 4096, 1ULL << 33), kEnospc);
  EXPECT_EQ(ask(kCmdTrim, 0, 0, UINT64_MAX), kEinval);
}

TEST_F(NbdExtendedServer, BlockStatusHasWideDescriptors) {
  EXPECT_EQ(ask(kCmdWrite, kFlagPayload, 8192, 8192, Bytes(8192, 1)), 0);
  EXPECT_EQ(ask(kCmdBlockStatus, 0, 0, 1_MiB), 0);
  EXPECT_EQ(last_.type, 6);
  ByteReader in(last_.data);
  EXPECT_EQ(in.be32(), 1U) << "context";
  EXPECT_EQ(in.be32(), 3U) << "number of descriptors";
  const std::vector<std::pair<uint64_t, uint64_t>> expected = {{8192, 3}, {8192, 0}, {1_MiB - 16384, 3}};
  for (const auto& [length, flags] : expected) {
    EXPECT_EQ(in.be64(), length);
    EXPECT_EQ(in.be64(), flags);
  }
  EXPECT_TRUE(in.done());
}

TEST_F(NbdExtendedServer, LimitedStatusAnswersTheContextsThatItNames) {
  EXPECT_EQ(ask(kCmdBlockStatus, kFlagPayload, 4096, 12, limited(8192, {1})), 0);
  ASSERT_EQ(last_.data.size(), 8U + 16U);
  ByteReader in(last_.data);
  in.be64();
  EXPECT_EQ(in.be64(), 8192U) << "the length of the payload, not of the header";
  EXPECT_EQ(ask(kCmdBlockStatus, kFlagPayload, 4096, 12, limited(8192, {2})), kEinval);
  EXPECT_EQ(ask(kCmdBlockStatus, kFlagPayload, 4096, 8, limited(8192, {})), kEinval);
  EXPECT_EQ(ask(kCmdBlockStatus, kFlagPayload, 64_MiB, 12, limited(8192, {1})), kEinval) << "beyond the end";
  EXPECT_EQ(ask(kCmdBlockStatus, kFlagPayload, 0, 4000, Bytes(4000, 0)), kEinval) << "longer than any could be";
  EXPECT_EQ(ask(kCmdFlush, 0, 0, 0), 0) << "still in step";
}

}  // namespace
}  // namespace vmferry
