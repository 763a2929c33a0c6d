// SPDX-License-Identifier: Apache-2.0
//
// One packet as it came from a TUN device, possibly a TCP super-packet that stands for up to 45 segments.
//
// With offload the kernel hands over up to 64 KiB of TCP with one header and the size at which a network card would
// cut it. The link treats each segment by itself (wire time, queue, loss, counters), then passes neighbours that leave
// at nearly the same time on together: render() makes the header of such a run.
//
// Flow: Emulator reads a frame -> Packet::parse -> Link -> Emulator writes head and body to the other TUN.
// Sources: virtio 1.2, 5.1.6 (header); RFC 9293 and the kernel's tcp_gso_segment for what differs between segments.
// Threads: a Packet never changes after parse().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "engine/base/result.h"

namespace vmferry::wan {

// What TUN puts before each packet (IFF_VNET_HDR): virtio 1.2, 5.1.6, without num_buffers, in the byte order of the
// host. Written out here because <linux/virtio_net.h> of newer kernels does not compile as C++ (a member called
// `class`).
struct FrameHeader {
  uint8_t flags;         // bit 0: checksum to be completed
  uint8_t gso_type;      // kGsoNone, kGsoTcp4
  uint16_t header_size;  // a hint; not relied on
  uint16_t gso_size;     // TCP payload of each segment
  uint16_t checksum_start;
  uint16_t checksum_offset;
};
static_assert(sizeof(FrameHeader) == 10);
constexpr uint8_t kGsoNone = 0;
constexpr uint8_t kGsoTcp4 = 1;

constexpr size_t kFrameHeaderSize = sizeof(FrameHeader);
constexpr size_t kFrameSizeMax = kFrameHeaderSize + 65'535;
// virtio header, then the longest IPv4 and TCP headers.
constexpr size_t kHeadSizeMax = kFrameHeaderSize + 60 + 60;

class Packet {
 public:
  // `frame` is what read() on the TUN returned: virtio header and IP packet. Copied. Invalid when shorter than an IP
  // header, or when it claims to be a super-packet of any other kind than TCP over IPv4 (never asked for).
  static Result<std::shared_ptr<const Packet>> parse(std::span<const std::byte> frame);

  uint32_t segment_count() const { return segment_count_; }
  // IP bytes of segment `index` on the wire, its own header included.
  uint32_t segment_size(uint32_t index) const;

  struct Slice {
    std::span<const std::byte> head;  // in `scratch` of render(), or in the packet
    std::span<const std::byte> body;  // in the packet
  };
  // Frame for the segments [first, first + count), for writev() in this order.
  Slice render(uint32_t first, uint32_t count, std::array<std::byte, kHeadSizeMax>& scratch) const;

 private:
  Packet() = default;

  std::unique_ptr<std::byte[]> frame_;
  uint32_t frame_size_ = 0;
  uint32_t segment_count_ = 1;
  // The rest only when segment_count_ > 1.
  uint32_t ip_header_size_ = 0;
  uint32_t headers_size_ = 0;     // IP and TCP
  uint32_t segment_payload_ = 0;  // of each segment but the last
};

}  // namespace vmferry::wan
