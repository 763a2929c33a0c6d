// SPDX-License-Identifier: Apache-2.0
//
// A peer reaches the volumes of its own group and nothing else (design section 10): numbers and ranges beyond them are
// refused before any device is looked at.
#include <gtest/gtest.h>

#include "engine/base/hash.h"
#include "engine/delta/stream_codec.h"
#include "engine/replicate/epoch_apply.h"
#include "tests/unit/replicate/test_world.h"

namespace vmferry::testing {
namespace {

// One number too far is another tenant's device, or memory of ours.
TEST(ReceiverBounds, RunsBeyondTheVolumesOfTheGroupAreCorrupt) {
  auto options = small_world();
  options.host.volume_sizes = {1U << 20, 2U << 20};
  TestWorld world(options);
  start(world);
  const std::vector<ReplicaVolume> volumes = world.b.volumes();
  constexpr uint64_t kSmall = 1U << 20;
  constexpr uint64_t kLarge = 2U << 20;
  const auto literal = [](uint16_t volume, uint64_t offset) {
    return FrameRun{.kind = RunKind::Literal, .volume = volume, .range = {offset, 4096}};
  };
  const auto reference = [](uint16_t source, uint64_t offset) {
    return FrameRun{
        .kind = RunKind::Reference, .volume = 1, .range = {0, 4096}, .source_volume = source, .source_offset = offset};
  };
  struct Row {
    const char* name;
    FrameRun run;
    bool good;
  };
  for (const Row& row : {
           Row{"last block", literal(0, kSmall - 4096), true},
           Row{"past the end", literal(0, kSmall - 4095), false},
           Row{"offset that wraps", literal(0, UINT64_MAX - 4095), false},
           Row{"volume past the last", literal(2, 0), false},
           Row{"volume 65535", literal(UINT16_MAX, 0), false},
           Row{"reference to the last block", reference(0, kSmall - 4096), true},
           Row{"reference past the end of its volume", reference(0, kSmall - 4095), false},
           Row{"reference good in the other volume", reference(1, kLarge - 4096), true},
           Row{"reference to a volume past the last", reference(2, 0), false},
           Row{"reference to volume 65535", reference(UINT16_MAX, 0), false},
           Row{"reference with an offset that wraps", reference(0, UINT64_MAX - 4095), false},
       }) {
    const Status checked = check_runs({row.run}, volumes);
    EXPECT_EQ(checked.has_value(), row.good) << row.name;
    if (!checked) {
      EXPECT_EQ(checked.error().kind, ErrorKind::Corrupt) << row.name;
    }
  }
  EXPECT_FALSE(check_runs({literal(0, 0), reference(2, 0)}, volumes)) << "every run is looked at";
}

// The same where it counts: a frame of a peer that was taken over ends the epoch, and no byte of it is written.
TEST(ReceiverBounds, AReferenceOutsideTheGroupIsAProtocolError) {
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  const Bytes before = world.copy_image();
  world.link.a.tamper = [](MessageType type, Bytes& payload) {
    if (type != MessageType::EpochData) return;
    const auto message = decode_epoch_data(payload);
    ASSERT_TRUE(message.has_value());
    Bytes body;
    FrameBody frame;
    frame.runs.push_back(
        {.kind = RunKind::Reference, .volume = 0, .range = {0, 4096}, .source_volume = 1, .source_offset = 0});
    append_frame_body(frame, body);
    EpochData changed = *message;
    delta::StreamCompressor compressor({.window_log = 16});
    Bytes coded;
    compressor.compress(body, coded);
    changed.stream += 2;  // a compression history of its own
    changed.body_size = static_cast<uint32_t>(body.size());
    changed.body_hash = xxh3_128(body);
    changed.coded = coded;
    payload = encode(changed);
  };
  world.write(0, 0, pattern(4096, 5));
  ASSERT_TRUE(world.executor.run_until([&] { return world.writes_done(); }));
  world.a.sender->sync_now();
  ASSERT_TRUE(world.executor.run_until([&] { return world.protocol_error.has_value(); }, 60 * kSecond));
  EXPECT_EQ(world.protocol_error->kind, ErrorKind::Corrupt) << world.protocol_error->text;
  EXPECT_EQ(world.copy_image(), before);
}

// A digest of what lies behind the volume, or of another one, would be an answer about somebody else's data.
TEST(ReceiverBounds, VerificationOutsideTheGroupGetsNoDigest) {
  TestWorld world(small_world());
  start(world);
  ASSERT_TRUE(world.sync());
  std::vector<VerifyReply> replies;
  world.link.a.deliver = [&](MessageType type, const Bytes& payload) {
    if (type != MessageType::VerifyReply) return;
    const auto reply = decode_verify_reply(payload);
    ASSERT_TRUE(reply.has_value());
    replies.push_back(*reply);
  };
  struct Row {
    const char* name;
    uint16_t volume;
    ByteRange range;
    bool good;
  };
  constexpr uint64_t kSize = 1U << 20;
  uint64_t id = 100;
  for (const Row& row :
       {Row{"the last block", 0, {kSize - 4096, 4096}, true}, Row{"past the end", 0, {kSize - 4096, 4097}, false},
        Row{"a volume past the last", 1, {0, 4096}, false}, Row{"volume 65535", UINT16_MAX, {0, 4096}, false},
        Row{"an offset that wraps", 0, {UINT64_MAX - 4095, 4096}, false}}) {
    replies.clear();
    const Status taken = world.b.receiver->on_message(
        MessageType::VerifyRequest,
        encode(VerifyRequest{.id = ++id, .volume = row.volume, .range = row.range, .piece_size = 4096}));
    if (!taken) {
      EXPECT_FALSE(row.good) << row.name << ": " << taken.error().text;
      continue;
    }
    ASSERT_TRUE(world.executor.run_until([&] { return !replies.empty(); }, 60 * kSecond)) << row.name;
    EXPECT_EQ(replies.front().id, id);
    EXPECT_EQ(replies.front().digests.size(), row.good ? 1U : 0U) << row.name;
    EXPECT_EQ(replies.front().error.empty(), row.good) << row.name << ": " << replies.front().error;
    if (!row.good) {
      EXPECT_EQ(replies.front().error_kind, ErrorKind::InvalidArgument) << row.name;
    }
  }
}

}  // namespace
}  // namespace vmferry::testing
