// SPDX-License-Identifier: Apache-2.0
//
// Messages of the vhost-user protocol: what a front-end (QEMU) sends, what a back-end answers.
//
// Flow: the channel reads a header, then its payload with the descriptors that came along; decode() checks all three
// against the message's rules and gives a typed body. Nothing about sessions here: what is allowed when is the
// back-end's business. Source of truth: QEMU's docs/interop/vhost-user.rst. All integers little-endian.
// Threads: values.
#pragma once

#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/result.h"

namespace vmferry::vhost {

enum class Request : uint32_t {
  GetFeatures = 1,
  SetFeatures = 2,
  SetOwner = 3,
  ResetOwner = 4,
  SetMemTable = 5,
  SetLogBase = 6,
  SetLogFd = 7,
  SetVringNum = 8,
  SetVringAddr = 9,
  SetVringBase = 10,
  GetVringBase = 11,
  SetVringKick = 12,
  SetVringCall = 13,
  SetVringErr = 14,
  GetProtocolFeatures = 15,
  SetProtocolFeatures = 16,
  GetQueueNum = 17,
  SetVringEnable = 18,
  SetBackendReqFd = 21,
  GetConfig = 24,
  SetConfig = 25,
  GetInflightFd = 31,
  SetInflightFd = 32,
  ResetDevice = 34,
  GetMaxMemSlots = 36,
  AddMemReg = 37,
  RemMemReg = 38,
  SetStatus = 39,
  GetStatus = 40,
};
std::string_view to_string(Request request) noexcept;  // "unknown" for a number without a name

// From the back-end, on the socket of SetBackendReqFd.
enum class BackendRequest : uint32_t { ConfigChange = 2 };

inline constexpr uint64_t kFeatureLogAll = 1ULL << 26;
inline constexpr uint64_t kFeatureProtocolFeatures = 1ULL << 30;

enum ProtocolFeature : uint64_t {
  kProtocolMq = 1ULL << 0,
  kProtocolLogShmfd = 1ULL << 1,
  kProtocolReplyAck = 1ULL << 3,
  kProtocolBackendReq = 1ULL << 5,
  kProtocolConfig = 1ULL << 9,
  kProtocolInflightShmfd = 1ULL << 12,
  kProtocolResetDevice = 1ULL << 13,
  kProtocolConfigureMemSlots = 1ULL << 15,
  kProtocolStatus = 1ULL << 16,
};

inline constexpr size_t kHeaderSize = 12;
inline constexpr uint32_t kFlagVersionMask = 3;
inline constexpr uint32_t kFlagVersion = 1;
inline constexpr uint32_t kFlagReply = 1U << 2;
inline constexpr uint32_t kFlagNeedReply = 1U << 3;

inline constexpr size_t kRegionsMax = 8;       // of one SetMemTable, by the specification
inline constexpr size_t kMemSlotsMax = 32;     // of AddMemReg; ours
inline constexpr size_t kConfigSizeMax = 256;  // of a configuration space, by the specification
inline constexpr size_t kPayloadSizeMax = 12 + kConfigSizeMax;
inline constexpr size_t kDescriptorsMax = 8;  // with one message
static_assert(kPayloadSizeMax >= 8 + kRegionsMax * 32);

struct Header {
  uint32_t request = 0;
  uint32_t flags = 0;
  uint32_t payload_size = 0;
  bool need_reply() const { return (flags & kFlagNeedReply) != 0; }
};
// Corrupt for another version, an unknown flag, a reply, or a payload over the limit.
Result<Header> decode_header(ByteSpan bytes);  // kHeaderSize bytes
void append_header(Bytes& out, uint32_t request, uint32_t flags, size_t payload_size);

struct NumberBody {  // features, queue number, status
  uint64_t value = 0;
};
struct VringState {
  uint32_t index = 0;
  uint32_t number = 0;
};
inline constexpr uint32_t kVringFlagLog = 1;
struct VringAddress {
  uint32_t index = 0;
  uint32_t flags = 0;
  uint64_t descriptor = 0;  // user addresses, not guest addresses
  uint64_t used = 0;
  uint64_t available = 0;
  uint64_t log = 0;  // where the first byte of the used ring is logged
};
struct VringFd {  // kick, call, err; without a descriptor: polling
  uint8_t index = 0;
  bool has_fd = false;
};
struct MemoryRegion {
  uint64_t guest_address = 0;
  uint64_t size = 0;
  uint64_t user_address = 0;
  uint64_t mmap_offset = 0;
};
struct MemoryTable {
  std::vector<MemoryRegion> regions;
};
struct LogArea {
  uint64_t size = 0;
  uint64_t offset = 0;
};
struct ConfigAccess {
  uint32_t offset = 0;
  uint32_t size = 0;
  uint32_t flags = 0;
  Bytes data;  // `size` bytes
};
inline constexpr uint32_t kConfigFlagMigration = 1;
struct Inflight {
  uint64_t mmap_size = 0;
  uint64_t mmap_offset = 0;
  uint16_t queues = 0;
  uint16_t queue_size = 0;
};

using Body = std::variant<std::monostate, NumberBody, VringState, VringAddress, VringFd, MemoryRegion, MemoryTable,
                          LogArea, ConfigAccess, Inflight>;

struct Message {
  Request request{};
  bool need_reply = false;
  Body body;
};

// Corrupt when the payload's size, a count, a sum of offset and size, or the number of descriptors is wrong;
// NotFound for a request that this back-end does not know.
Result<Message> decode(const Header& header, ByteSpan payload, size_t fd_count);

// Both directions: what a front-end sends, and what a back-end answers (flags: kFlagReply).
void encode(Bytes& out, Request request, uint32_t flags, const Body& body);
void encode_number_reply(Bytes& out, Request request, uint64_t value);

// The answer to `request` as a front-end sees it; Corrupt when it is not one.
Result<Body> decode_reply(const Header& header, ByteSpan payload, Request request);

}  // namespace vmferry::vhost
