// SPDX-License-Identifier: Apache-2.0
#include "perf/wan/packet.h"

#include <netinet/in.h>

#include <algorithm>
#include <cstring>

#include "engine/base/assert.h"

namespace vmferry::wan {
namespace {

constexpr size_t kIpHeaderSizeMin = 20;
constexpr size_t kTcpHeaderSizeMin = 20;

// Offsets within the IPv4 and TCP headers (RFC 791, RFC 9293).
constexpr size_t kIpTotalLength = 2;
constexpr size_t kIpId = 4;
constexpr size_t kIpProtocol = 9;
constexpr size_t kIpChecksum = 10;
constexpr size_t kIpAddresses = 12;
constexpr size_t kTcpSequence = 4;
constexpr size_t kTcpDataOffset = 12;
constexpr size_t kTcpFlags = 13;
constexpr size_t kTcpChecksum = 16;
constexpr uint8_t kTcpFin = 0x01;
constexpr uint8_t kTcpPush = 0x08;
constexpr uint8_t kTcpCwr = 0x80;

uint8_t load8(const std::byte* at) {
  return std::to_integer<uint8_t>(*at);
}
uint32_t load16(const std::byte* at) {
  return static_cast<uint32_t>(load8(at)) << 8 | load8(at + 1);
}
uint32_t load32(const std::byte* at) {
  return load16(at) << 16 | load16(at + 2);
}
void store16(std::byte* at, uint32_t value) {
  at[0] = static_cast<std::byte>(value >> 8 & 0xff);
  at[1] = static_cast<std::byte>(value & 0xff);
}
void store32(std::byte* at, uint32_t value) {
  store16(at, value >> 16);
  store16(at + 2, value & 0xffff);
}

uint32_t sum16(const std::byte* at, size_t size) {
  uint32_t sum = 0;
  for (size_t i = 0; i < size; i += 2) sum += load16(at + i);
  return sum;
}
uint32_t fold(uint32_t sum) {
  while (sum >> 16 != 0) sum = (sum & 0xffff) + (sum >> 16);
  return sum;
}

}  // namespace

Result<std::shared_ptr<const Packet>> Packet::parse(std::span<const std::byte> frame) {
  if (frame.size() < kFrameHeaderSize + kIpHeaderSizeMin || frame.size() > kFrameSizeMax) {
    return fail(ErrorKind::InvalidArgument, "frame of {} bytes", frame.size());
  }
  FrameHeader header;
  std::memcpy(&header, frame.data(), sizeof(header));
  const std::byte* const ip = frame.data() + kFrameHeaderSize;
  const size_t ip_size = frame.size() - kFrameHeaderSize;

  std::shared_ptr<Packet> packet(new Packet());
  packet->frame_size_ = static_cast<uint32_t>(frame.size());
  if (header.gso_type != kGsoNone) {
    const size_t ip_header_size = static_cast<size_t>(load8(ip) & 0x0f) * 4;
    if (header.gso_type != kGsoTcp4 || load8(ip) >> 4 != 4 || ip_header_size < kIpHeaderSizeMin ||
        ip_size < ip_header_size + kTcpHeaderSizeMin || load8(ip + kIpProtocol) != IPPROTO_TCP) {
      return fail(ErrorKind::InvalidArgument, "super-packet of type {} is not TCP over IPv4", header.gso_type);
    }
    const size_t tcp_header_size = static_cast<size_t>(load8(ip + ip_header_size + kTcpDataOffset) >> 4) * 4;
    const size_t headers_size = ip_header_size + tcp_header_size;
    if (tcp_header_size < kTcpHeaderSizeMin || ip_size <= headers_size || header.gso_size == 0) {
      return fail(ErrorKind::InvalidArgument, "super-packet with TCP header of {} bytes, segments of {}",
                  tcp_header_size, header.gso_size);
    }
    const size_t payload = ip_size - headers_size;
    packet->segment_count_ = static_cast<uint32_t>((payload + header.gso_size - 1) / header.gso_size);
    packet->ip_header_size_ = static_cast<uint32_t>(ip_header_size);
    packet->headers_size_ = static_cast<uint32_t>(headers_size);
    packet->segment_payload_ = header.gso_size;
  }
  packet->frame_ = std::make_unique_for_overwrite<std::byte[]>(frame.size());
  std::memcpy(packet->frame_.get(), frame.data(), frame.size());
  return packet;
}

uint32_t Packet::segment_size(uint32_t index) const {
  VF_ASSERT(index < segment_count_);
  const uint32_t ip_size = frame_size_ - static_cast<uint32_t>(kFrameHeaderSize);
  if (segment_count_ == 1) return ip_size;
  const uint32_t payload_before = index * segment_payload_;
  return headers_size_ + std::min(segment_payload_, ip_size - headers_size_ - payload_before);
}

Packet::Slice Packet::render(uint32_t first, uint32_t count, std::array<std::byte, kHeadSizeMax>& scratch) const {
  VF_ASSERT(count > 0 && first + count <= segment_count_);
  if (count == segment_count_) return {.head = {frame_.get(), frame_size_}, .body = {}};

  const size_t payload_begin = kFrameHeaderSize + headers_size_ + size_t{first} * segment_payload_;
  const size_t payload_end = std::min<size_t>(frame_size_, payload_begin + size_t{count} * segment_payload_);
  const size_t ip_size = headers_size_ + (payload_end - payload_begin);

  std::memcpy(scratch.data(), frame_.get(), kFrameHeaderSize + headers_size_);
  if (count == 1) {
    FrameHeader header;
    std::memcpy(&header, scratch.data(), sizeof(header));
    header.gso_type = kGsoNone;
    header.gso_size = 0;
    std::memcpy(scratch.data(), &header, sizeof(header));
  }
  std::byte* const ip = scratch.data() + kFrameHeaderSize;
  store16(ip + kIpTotalLength, static_cast<uint32_t>(ip_size));
  store16(ip + kIpId, (load16(ip + kIpId) + first) & 0xffff);
  store16(ip + kIpChecksum, 0);
  store16(ip + kIpChecksum, ~fold(sum16(ip, ip_header_size_)) & 0xffff);

  std::byte* const tcp = ip + ip_header_size_;
  store32(tcp + kTcpSequence, load32(tcp + kTcpSequence) + first * segment_payload_);
  uint8_t flags = load8(tcp + kTcpFlags);
  if (first + count < segment_count_) flags &= static_cast<uint8_t>(~(kTcpFin | kTcpPush));
  if (first > 0) flags &= static_cast<uint8_t>(~kTcpCwr);
  tcp[kTcpFlags] = static_cast<std::byte>(flags);
  // Checksum still to be completed by whoever needs it: the field holds the sum of the pseudo header, not inverted.
  const uint32_t tcp_size = static_cast<uint32_t>(ip_size) - ip_header_size_;
  store16(tcp + kTcpChecksum, fold(sum16(ip + kIpAddresses, 8) + IPPROTO_TCP + tcp_size));

  return {.head = {scratch.data(), kFrameHeaderSize + headers_size_},
          .body = {frame_.get() + payload_begin, payload_end - payload_begin}};
}

}  // namespace vmferry::wan
