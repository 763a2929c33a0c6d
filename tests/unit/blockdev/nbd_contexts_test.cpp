// SPDX-License-Identifier: Apache-2.0
//
// BLOCK_STATUS for contexts beside base:allocation: one chunk for each, with the right id, or one error.
#include <gtest/gtest.h>

#include "blockdev/nbd/nbd_server.h"
#include "tests/unit/blockdev/nbd_test_support.h"

namespace vmferry {
namespace {

using namespace nbd_test;

constexpr const char* kDirty = "test:dirty";
constexpr const char* kEpoch = "test:epoch";

class Source final : public NbdStatusSource {
 public:
  std::vector<std::string> contexts() const override { return {kDirty, kEpoch}; }
  bool status(std::string_view context, ByteRange range, size_t runs_max,
              std::vector<nbd::StatusDescriptor>& runs) const override {
    asked.emplace_back(context);
    if (gone) return false;
    runs.push_back({context == kDirty ? 4096U : 8192U, 1});
    if (runs_max > 1) runs.push_back({range.length - runs.back().length, 0});
    return true;
  }
  bool gone = false;
  mutable std::vector<std::string> asked;
};

class NbdContextsServer : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(server_->add_export({.name = "vda", .device = &disk_, .status = &source_}).has_value());
  }
  void TearDown() override {
    server_->drain([] {});
    executor_.advance(60 * kSecond);
    EXPECT_EQ(server_->stats().inflight_bytes, 0U);
  }
  void go(const std::vector<std::string>& contexts, bool extended = false) {
    client_.send(client_flags(3));
    client_.send(option(extended ? kOptExtendedHeaders : kOptStructuredReply));
    client_.send(option(kOptSetMeta, meta_data("vda", contexts)));
    client_.send(option(kOptGo, go_data("vda")));
    const auto answers = option_answers(client_.wire().received);
    ASSERT_TRUE(answers && !answers->empty());
    EXPECT_EQ(answers->back().type, kRepAck);
    client_.wire().received.clear();
  }
  struct Chunk {
    uint32_t id = 0;
    std::vector<std::pair<uint32_t, uint32_t>> runs;
    bool operator==(const Chunk&) const = default;
  };
  // All chunks of one reply with 32-bit lengths.
  std::vector<Chunk> chunks() {
    std::vector<Chunk> all;
    while (const auto reply = client_.reply()) {
      EXPECT_EQ(reply->type, 5);
      ByteReader in(reply->data);
      Chunk chunk;
      chunk.id = in.be32();
      while (in.remaining() > 0) {
        const uint32_t length = in.be32();
        chunk.runs.emplace_back(length, in.be32());
      }
      all.push_back(chunk);
      if (reply->flags == 1) break;
    }
    EXPECT_TRUE(client_.wire().received.empty()) << "DONE is on the last chunk";
    return all;
  }

  ManualExecutor executor_;
  RamDevice disk_{executor_, 1 << 20};
  Source source_;
  std::unique_ptr<NbdServer> server_ = std::make_unique<NbdServer>(executor_, NbdLimits{});
  Client client_{executor_, *server_};
};

// A client waits for exactly one chunk for each context it set.
TEST_F(NbdContextsServer, EveryContextHasItsChunkAndTheLastOneEndsTheReply) {
  go({"base:allocation", kEpoch, kDirty});
  client_.send(request(kCmdBlockStatus, 0, 3, 0, 65536));
  EXPECT_EQ(chunks(),
            (std::vector<Chunk>{{1, {{65536, 3}}}, {2, {{4096, 1}, {61440, 0}}}, {3, {{8192, 1}, {57344, 0}}}}));
}

TEST_F(NbdContextsServer, WithoutBaseAllocationTheDeviceIsNotAsked) {
  // The store would seek through the file for an answer that nobody reads.
  go({kDirty});
  client_.send(request(kCmdBlockStatus, 0, 3, 0, 65536));
  EXPECT_EQ(chunks(), (std::vector<Chunk>{{2, {{4096, 1}, {61440, 0}}}}));
  EXPECT_TRUE(disk_.extents_asked.empty());
  client_.send(request(kCmdBlockStatus, kFlagReqOne, 4, 0, 1000));
  EXPECT_EQ(chunks(), (std::vector<Chunk>{{2, {{1000, 1}}}})) << "one run, not longer than asked";
}

// Role and peer may change while a tool is connected: then "nothing is dirty" would be a lie.
TEST_F(NbdContextsServer, AContextThatIsGoneFailsTheWholeRequest) {
  go({"base:allocation", kDirty});
  source_.gone = true;
  EXPECT_EQ(client_.ask(kCmdBlockStatus, 0, 0, 4096), kEio);
  EXPECT_TRUE(client_.wire().received.empty()) << "no chunk beside the error";
  source_.gone = false;
  client_.send(request(kCmdBlockStatus, 0, 9, 0, 65536));
  EXPECT_EQ(chunks().size(), 2U) << "and the session goes on";
}

TEST_F(NbdContextsServer, ALimitedRequestIsAnsweredForTheContextsThatItNames) {
  // With extended headers (proto.md, BLOCK_STATUS_PAYLOAD).
  go({"base:allocation", kDirty, kEpoch}, true);
  Bytes payload;
  ByteWriter(payload).be64(65536).be32(3);
  client_.send(extended_request(kCmdBlockStatus, kFlagPayload, 7, 0, payload.size(), payload));
  const auto reply = client_.reply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->flags, 1);
  ByteReader in(reply->data);
  EXPECT_EQ(in.be32(), 3U);
  EXPECT_EQ(source_.asked, std::vector<std::string>{kEpoch});
}

// An operation that ends after its client left must not touch the connection's stream.
TEST_F(NbdContextsServer, AClientThatLeavesBeforeTheAnswerIsNoHarm) {
  go({kDirty});
  MemoryStream::deliver(client_.wire(), request(kCmdBlockStatus, 0, 3, 0, 65536));
  client_.disconnect();
  EXPECT_TRUE(client_.wire().received.empty());
}

}  // namespace
}  // namespace vmferry
