// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/frame.h"

#include <gtest/gtest.h>

#include "engine/base/hash.h"
#include "tests/unit/netproto/golden_repl.h"

namespace vmferry {
namespace {

struct Message {
  MessageType type;
  Bytes payload;
  friend bool operator==(const Message&, const Message&) = default;
};

struct Decoded {
  std::vector<Message> messages;
  Status status;
  bool at_boundary = true;
};

Decoded decode(ByteSpan stream, size_t piece) {
  FrameDecoder decoder;
  Decoded out;
  for (size_t at = 0; at < stream.size() && out.status; at += piece) {
    out.status =
        decoder.feed(stream.subspan(at, std::min(piece, stream.size() - at)), [&](MessageType type, ByteSpan payload) {
          out.messages.push_back({type, Bytes(payload.begin(), payload.end())});
          return true;
        });
  }
  out.at_boundary = decoder.at_boundary();
  return out;
}

// A header with a right checksum, whatever it says.
Bytes raw_header(uint32_t magic, uint16_t type, uint16_t flags, uint32_t size) {
  Bytes out;
  ByteWriter(out).le32(magic).le16(type).le16(flags).le32(size);
  ByteWriter(out).le32(crc32c(ByteSpan(out)));
  return out;
}

// Three messages: one whole, one in two fragments of lane 3 with a third message of lane 0 between them.
Bytes interleaved() {
  Bytes out;
  append_frame({.type = MessageType::Ping}, Bytes{1, 2, 3, 4, 5, 6, 7, 8}, out);
  append_frame({.type = MessageType::EpochData, .continues = true, .lane = 3}, Bytes(20, 0xaa), out);
  append_frame({.type = MessageType::Go}, Bytes{9}, out);
  append_frame({.type = MessageType::EpochData, .lane = 3}, Bytes(4, 0xbb), out);
  return out;
}

std::vector<Message> interleaved_messages() {
  Bytes whole(20, 0xaa);
  whole.insert(whole.end(), 4, 0xbb);
  return {{MessageType::Ping, {1, 2, 3, 4, 5, 6, 7, 8}}, {MessageType::Go, {9}}, {MessageType::EpochData, whole}};
}

// The bytes on the wire are a contract with other versions: a refactoring must not move one of them.
TEST(Frame, BytesAreAsDocumented) {
  EXPECT_EQ(to_hex(interleaved()), to_hex(golden_repl("frame_fragments.bin", interleaved())));
  Bytes empty;
  append_frame({.type = MessageType::Go, .lane = 1}, {}, empty);
  EXPECT_EQ(to_hex(ByteSpan(empty).first(12)), "564d46318300110000000000");
}

// TCP delivers any pieces: a decoder that needs whole frames works on loopback and fails on a WAN.
TEST(Frame, DeliveryInPiecesOfEverySizeIsTheSame) {
  const Bytes stream = interleaved();
  for (size_t piece = 1; piece <= stream.size(); ++piece) {
    const Decoded decoded = decode(stream, piece);
    ASSERT_TRUE(decoded.status.has_value()) << piece;
    EXPECT_EQ(decoded.messages, interleaved_messages()) << piece;
    EXPECT_TRUE(decoded.at_boundary);
  }
}

// A cut must never deliver a part of a message, and must be told from an orderly end.
TEST(Frame, EveryTruncationDeliversWholeMessagesOnly) {
  const Bytes stream = interleaved();
  const std::vector<Message> all = interleaved_messages();
  for (size_t size = 0; size < stream.size(); ++size) {
    const Decoded decoded = decode(ByteSpan(stream).first(size), 7);
    ASSERT_TRUE(decoded.status.has_value());
    ASSERT_LT(decoded.messages.size(), all.size());
    for (size_t i = 0; i < decoded.messages.size(); ++i) EXPECT_EQ(decoded.messages[i], all[i]);
    const bool boundary = size == 0 || size == kFrameHeaderSize + 8;
    EXPECT_EQ(decoded.at_boundary, boundary) << size;
  }
}

TEST(Frame, EveryFlippedBitOfAHeaderIsNoticed) {
  // A header that is believed although it is damaged shifts everything after it.
  const Bytes good = interleaved();
  for (size_t bit = 0; bit < kFrameHeaderSize * 8; ++bit) {
    Bytes bad = good;
    bad[bit / 8] ^= static_cast<uint8_t>(1U << bit % 8);
    const Decoded decoded = decode(bad, bad.size());
    ASSERT_FALSE(decoded.status.has_value()) << bit;
    EXPECT_TRUE(decoded.messages.empty());
  }
}

TEST(Frame, HostileHeadersAreRefused) {
  // Each of them with a right checksum, as a peer that means harm would send it.
  struct Row {
    const char* name;
    Bytes stream;
    ErrorKind kind;
  };
  Bytes mixed;
  append_frame({.type = MessageType::EpochData, .continues = true, .lane = 2}, Bytes(1), mixed);
  append_frame({.type = MessageType::EpochEnd, .lane = 2}, Bytes(1), mixed);
  const uint16_t critical = kFrameCritical;
  const std::vector<Row> rows = {
      {"magic of another protocol", raw_header(0x31464d57, 3, critical, 0), ErrorKind::Corrupt},
      {"reserved bit 1", raw_header(kFrameMagic, 3, critical | 2, 0), ErrorKind::Corrupt},
      {"reserved bit 15", raw_header(kFrameMagic, 3, critical | 0x8000, 0), ErrorKind::Corrupt},
      {"one byte too long", raw_header(kFrameMagic, 3, critical, kFramePayloadSizeMax + 1), ErrorKind::LimitExceeded},
      {"4 GiB - 1", raw_header(kFrameMagic, 3, critical, UINT32_MAX), ErrorKind::LimitExceeded},
      {"unknown critical type", raw_header(kFrameMagic, 999, critical, 0), ErrorKind::Mismatch},
      {"type 0", raw_header(kFrameMagic, 0, critical, 0), ErrorKind::Mismatch},
      {"empty fragment", raw_header(kFrameMagic, 65, critical | kFrameContinues, 0), ErrorKind::Corrupt},
      {"another type inside a message", mixed, ErrorKind::Corrupt},
  };
  for (const Row& row : rows) {
    const Decoded decoded = decode(row.stream, row.stream.size());
    ASSERT_FALSE(decoded.status.has_value()) << row.name;
    EXPECT_EQ(decoded.status.error().kind, row.kind) << row.name << ": " << decoded.status.error().text;
    EXPECT_TRUE(decoded.messages.empty()) << row.name;
  }
}

// The limit is of the message, not of the frame: otherwise fragments would be a way around it.
TEST(Frame, FragmentsTogetherObeyTheLimit) {
  Bytes stream;
  for (int i = 0; i < 4; ++i) {
    append_frame({.type = MessageType::EpochData, .continues = true, .lane = 3}, Bytes(1_MiB), stream);
  }
  EXPECT_TRUE(decode(stream, stream.size()).status.has_value());
  Bytes over = stream;
  append_frame({.type = MessageType::EpochData, .lane = 3}, Bytes(1), over);
  EXPECT_EQ(decode(over, over.size()).status.error().kind, ErrorKind::LimitExceeded);
  append_frame({.type = MessageType::EpochData, .lane = 3}, {}, stream);
  const Decoded decoded = decode(stream, 100'000);
  ASSERT_EQ(decoded.messages.size(), 1U);
  EXPECT_EQ(decoded.messages[0].payload.size(), kFramePayloadSizeMax);
}

// A later version may add messages that an older one is free to ignore, also large ones in fragments.
TEST(Frame, UnknownNonCriticalMessagesAreSkipped) {
  Bytes stream;
  append_frame({.type = static_cast<MessageType>(999), .critical = false}, Bytes(100), stream);
  append_frame({.type = static_cast<MessageType>(998), .critical = false, .continues = true, .lane = 3}, Bytes(9),
               stream);
  append_frame({.type = MessageType::Go}, Bytes{1}, stream);
  append_frame({.type = static_cast<MessageType>(998), .critical = false, .lane = 3}, Bytes(9), stream);
  append_frame({.type = MessageType::EpochData, .lane = 3}, Bytes{2}, stream);
  const Decoded decoded = decode(stream, 5);
  ASSERT_TRUE(decoded.status.has_value()) << decoded.status.error().text;
  EXPECT_EQ(decoded.messages, (std::vector<Message>{{MessageType::Go, {1}}, {MessageType::EpochData, {2}}}));
}

// Whoever stops (because it was destroyed) must not be called again.
TEST(Frame, ASinkThatStopsGetsNothingMore) {
  for (const size_t piece : {size_t{1}, size_t{1000}}) {
    const Bytes stream = interleaved();
    auto decoder = std::make_unique<FrameDecoder>();
    int calls = 0;
    for (size_t at = 0; at < stream.size() && decoder; at += piece) {
      const Status fed =
          decoder->feed(ByteSpan(stream).subspan(at, std::min(piece, stream.size() - at)), [&](MessageType, ByteSpan) {
            ++calls;
            decoder.reset();
            return false;
          });
      EXPECT_TRUE(fed.has_value());
    }
    EXPECT_EQ(calls, 1);
  }
}

}  // namespace
}  // namespace vmferry
