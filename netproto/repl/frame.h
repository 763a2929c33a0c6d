// SPDX-License-Identifier: Apache-2.0
//
// Frames: how messages between two daemons are laid into the byte stream. docs/replication-protocol.md section 2.
//
// A message is one frame, or several fragments of one lane (lane = traffic class) with frames of other lanes between
// them: that is how a small urgent message overtakes the rest of a large one. FrameDecoder puts them together again.
// Flow: PeerConnection, inside TLS. Threads: not shared.
#pragma once

#include <array>
#include <functional>
#include <type_traits>

#include "engine/base/bytes.h"
#include "engine/base/id.h"
#include "engine/base/result.h"
#include "engine/base/units.h"
#include "netproto/repl/message_types.h"

namespace vmferry {

inline constexpr uint32_t kFrameMagic = 0x31464d56;              // "VMF1"
inline constexpr size_t kFramePayloadSizeMax = 4 * 1024 * 1024;  // of a whole message
inline constexpr size_t kFrameLaneCount = 4;

// Flags of a frame. Bits 4 and 5 are the lane; all others (bit 1 is set aside for compression) must be zero.
inline constexpr unsigned kFrameCritical = 1 << 0;   // a receiver that does not know the type ends the connection
inline constexpr unsigned kFrameContinues = 1 << 2;  // more fragments of this message follow in this lane
inline constexpr unsigned kFrameLaneShift = 4;
inline constexpr unsigned kFrameFlagsKnown = kFrameCritical | kFrameContinues | (3U << kFrameLaneShift);

// All integers little-endian on the wire.
struct FrameHeader {
  uint32_t magic;         // kFrameMagic
  uint16_t type;          // MessageType
  uint16_t flags;         // kFrameCritical, kFrameContinues and the lane
  uint32_t payload_size;  // bytes after this header, <= kFramePayloadSizeMax
  uint32_t header_crc;    // CRC-32C of the 12 bytes above
};
static_assert(sizeof(FrameHeader) == 16);
static_assert(std::has_unique_object_representations_v<FrameHeader>);

inline constexpr size_t kFrameHeaderSize = sizeof(FrameHeader);

struct FrameStart {
  MessageType type = MessageType::Invalid;
  bool critical = true;
  bool continues = false;
  uint8_t lane = 0;
};

// Appends a header for a payload of `payload_size` bytes, which the caller appends next.
void append_frame_header(const FrameStart& start, size_t payload_size, Bytes& out);
// A whole message in one frame. payload.size() <= kFramePayloadSizeMax.
void append_frame(const FrameStart& start, ByteSpan payload, Bytes& out);

// Whether this version knows the type, in either direction.
bool is_known_message(uint16_t type);
// Types whose payload begins with the 16-byte id of a group.
constexpr bool is_group_message(MessageType type) {
  return static_cast<uint16_t>(type) >= 32;
}

// Finds messages in a stream of hostile bytes. Memory: at most one message per lane, and one more.
class FrameDecoder {
 public:
  // Return false to stop: the rest of the input stays undelivered, and the decoder must not be used again.
  using Sink = std::function<bool(MessageType type, ByteSpan payload)>;

  // Corrupt: magic, CRC, flags, size or order of fragments are wrong. Mismatch: unknown critical message.
  // After an error the stream cannot be read any further. The payload is valid during the call of `sink` only.
  Status feed(ByteSpan bytes, const Sink& sink);

  // True between messages: a connection that ends elsewhere was cut in the middle of one.
  bool at_boundary() const;

 private:
  struct Lane {
    bool open = false;
    uint16_t type = 0;
    bool critical = false;
    Bytes collected;
  };

  Result<FrameHeader> parse_header(ByteSpan bytes) const;
  bool fill_buffer(ByteSpan& bytes, size_t size);
  bool deliver(const FrameHeader& header, ByteSpan payload, const Sink& sink);

  Bytes buffer_;  // an incomplete frame
  std::array<Lane, kFrameLaneCount> lanes_;
};

}  // namespace vmferry
