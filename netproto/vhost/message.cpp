// SPDX-License-Identifier: Apache-2.0
#include "netproto/vhost/message.h"

namespace vmferry::vhost {

namespace {

constexpr uint64_t kVringIndexMask = 0xff;
constexpr uint64_t kVringNoFd = 1U << 8;

// What a request carries. `fds`: descriptors that have to come along; MemoryTable and VringFd say so themselves.
enum class Shape : uint8_t { Nothing, Number, State, Address, Fd, Table, Region, Log, Config, Inflight };
struct Rule {
  Request request;
  Shape shape;
  size_t fds;
  std::string_view name;
};
constexpr Rule kRules[] = {
    {Request::GetFeatures, Shape::Nothing, 0, "GET_FEATURES"},
    {Request::SetFeatures, Shape::Number, 0, "SET_FEATURES"},
    {Request::SetOwner, Shape::Nothing, 0, "SET_OWNER"},
    {Request::ResetOwner, Shape::Nothing, 0, "RESET_OWNER"},
    {Request::SetMemTable, Shape::Table, 0, "SET_MEM_TABLE"},
    {Request::SetLogBase, Shape::Log, 1, "SET_LOG_BASE"},
    {Request::SetLogFd, Shape::Nothing, 1, "SET_LOG_FD"},
    {Request::SetVringNum, Shape::State, 0, "SET_VRING_NUM"},
    {Request::SetVringAddr, Shape::Address, 0, "SET_VRING_ADDR"},
    {Request::SetVringBase, Shape::State, 0, "SET_VRING_BASE"},
    {Request::GetVringBase, Shape::State, 0, "GET_VRING_BASE"},
    {Request::SetVringKick, Shape::Fd, 0, "SET_VRING_KICK"},
    {Request::SetVringCall, Shape::Fd, 0, "SET_VRING_CALL"},
    {Request::SetVringErr, Shape::Fd, 0, "SET_VRING_ERR"},
    {Request::GetProtocolFeatures, Shape::Nothing, 0, "GET_PROTOCOL_FEATURES"},
    {Request::SetProtocolFeatures, Shape::Number, 0, "SET_PROTOCOL_FEATURES"},
    {Request::GetQueueNum, Shape::Nothing, 0, "GET_QUEUE_NUM"},
    {Request::SetVringEnable, Shape::State, 0, "SET_VRING_ENABLE"},
    {Request::SetBackendReqFd, Shape::Nothing, 1, "SET_BACKEND_REQ_FD"},
    {Request::GetConfig, Shape::Config, 0, "GET_CONFIG"},
    {Request::SetConfig, Shape::Config, 0, "SET_CONFIG"},
    {Request::GetInflightFd, Shape::Inflight, 0, "GET_INFLIGHT_FD"},
    {Request::SetInflightFd, Shape::Inflight, 1, "SET_INFLIGHT_FD"},
    {Request::ResetDevice, Shape::Nothing, 0, "RESET_DEVICE"},
    {Request::GetMaxMemSlots, Shape::Nothing, 0, "GET_MAX_MEM_SLOTS"},
    {Request::AddMemReg, Shape::Region, 1, "ADD_MEM_REG"},
    {Request::RemMemReg, Shape::Region, 0, "REM_MEM_REG"},
    {Request::SetStatus, Shape::Number, 0, "SET_STATUS"},
    {Request::GetStatus, Shape::Nothing, 0, "GET_STATUS"},
};

const Rule* rule_of(uint32_t request) {
  for (const Rule& rule : kRules)
    if (static_cast<uint32_t>(rule.request) == request) return &rule;
  return nullptr;
}

tl::unexpected<Error> bad(const Rule& rule, std::string_view what) {
  return fail(ErrorKind::Corrupt, "vhost-user {}: {}", rule.name, what);
}

bool overflows(uint64_t start, uint64_t size) {
  return size > UINT64_MAX - start;
}

MemoryRegion read_region(ByteReader& reader) {
  MemoryRegion region;
  region.guest_address = reader.le64();
  region.size = reader.le64();
  region.user_address = reader.le64();
  region.mmap_offset = reader.le64();
  return region;
}

void write_region(ByteWriter& writer, const MemoryRegion& region) {
  writer.le64(region.guest_address).le64(region.size).le64(region.user_address).le64(region.mmap_offset);
}

std::string_view region_problem(const MemoryRegion& region) {
  if (region.size == 0) return "a region of no bytes";
  if (overflows(region.guest_address, region.size) || overflows(region.user_address, region.size) ||
      overflows(region.mmap_offset, region.size))
    return "a region that wraps around";
  return {};
}

Result<Body> read_table(const Rule& rule, ByteReader& reader, size_t fd_count) {
  const uint32_t count = reader.le32();
  reader.le32();  // padding
  if (count > kRegionsMax) return bad(rule, "too many regions");
  MemoryTable table;
  for (uint32_t i = 0; i < count; ++i) {
    table.regions.push_back(read_region(reader));
    if (!reader.ok()) return bad(rule, "payload is cut short");
    if (const auto problem = region_problem(table.regions.back()); !problem.empty()) return bad(rule, problem);
  }
  if (fd_count != count) return bad(rule, "number of descriptors is not that of the regions");
  // Front-ends may send the whole fixed array; what lies behind the counted regions has no meaning.
  reader.rest();
  return Body{std::move(table)};
}

Result<Body> read_config(const Rule& rule, ByteReader& reader) {
  ConfigAccess access;
  access.offset = reader.le32();
  access.size = reader.le32();
  access.flags = reader.le32();
  if (access.size > kConfigSizeMax || access.offset > kConfigSizeMax - access.size)
    return bad(rule, "outside the configuration space");
  if ((access.flags & ~kConfigFlagMigration) != 0) return bad(rule, "unknown flags");
  const ByteSpan data = reader.take(access.size);
  access.data.assign(data.begin(), data.end());
  return Body{std::move(access)};
}

Result<Body> read_body(const Rule& rule, ByteReader& reader, size_t fd_count) {
  switch (rule.shape) {
    case Shape::Nothing:
      return Body{};
    case Shape::Number:
      return Body{NumberBody{reader.le64()}};
    case Shape::State: {
      VringState state;
      state.index = reader.le32();
      state.number = reader.le32();
      return Body{state};
    }
    case Shape::Address: {
      VringAddress address;
      address.index = reader.le32();
      address.flags = reader.le32();
      address.descriptor = reader.le64();
      address.used = reader.le64();
      address.available = reader.le64();
      address.log = reader.le64();
      if ((address.flags & ~kVringFlagLog) != 0) return bad(rule, "unknown flags");
      return Body{address};
    }
    case Shape::Fd: {
      const uint64_t value = reader.le64();
      if ((value & ~(kVringIndexMask | kVringNoFd)) != 0) return bad(rule, "unknown bits");
      const VringFd fd{static_cast<uint8_t>(value & kVringIndexMask), (value & kVringNoFd) == 0};
      if (fd_count != (fd.has_fd ? 1U : 0U)) return bad(rule, "wrong number of descriptors");
      return Body{fd};
    }
    case Shape::Table:
      return read_table(rule, reader, fd_count);
    case Shape::Region: {
      reader.le64();  // padding
      const MemoryRegion region = read_region(reader);
      if (const auto problem = region_problem(region); reader.ok() && !problem.empty()) return bad(rule, problem);
      return Body{region};
    }
    case Shape::Log: {
      LogArea area;
      area.size = reader.le64();
      area.offset = reader.le64();
      if (overflows(area.offset, area.size)) return bad(rule, "an area that wraps around");
      return Body{area};
    }
    case Shape::Config:
      return read_config(rule, reader);
    case Shape::Inflight: {
      Inflight inflight;
      inflight.mmap_size = reader.le64();
      inflight.mmap_offset = reader.le64();
      inflight.queues = reader.le16();
      inflight.queue_size = reader.le16();
      // Front-ends send the C structure with its tail padding, or without.
      if (reader.remaining() == 4) reader.rest();
      if (overflows(inflight.mmap_offset, inflight.mmap_size)) return bad(rule, "an area that wraps around");
      return Body{inflight};
    }
  }
  return bad(rule, "no such shape");
}

bool fd_count_fits(const Rule& rule, size_t fd_count) {
  if (rule.shape == Shape::Table || rule.shape == Shape::Fd) return true;  // checked against the body
  // Some front-ends send the descriptor again with what they remove; the specification lets us take and close it.
  if (rule.request == Request::RemMemReg) return fd_count <= 1;
  return fd_count == rule.fds;
}

struct BodyWriter {
  ByteWriter& writer;
  void operator()(std::monostate) const {}
  void operator()(const NumberBody& body) const { writer.le64(body.value); }
  void operator()(const VringState& body) const { writer.le32(body.index).le32(body.number); }
  void operator()(const VringAddress& body) const {
    writer.le32(body.index).le32(body.flags).le64(body.descriptor).le64(body.used).le64(body.available).le64(body.log);
  }
  void operator()(const VringFd& body) const { writer.le64(body.index | (body.has_fd ? 0U : kVringNoFd)); }
  void operator()(const MemoryRegion& body) const {
    writer.le64(0);
    write_region(writer, body);
  }
  void operator()(const MemoryTable& body) const {
    writer.le32(static_cast<uint32_t>(body.regions.size())).le32(0);
    for (const MemoryRegion& region : body.regions) write_region(writer, region);
  }
  void operator()(const LogArea& body) const { writer.le64(body.size).le64(body.offset); }
  void operator()(const ConfigAccess& body) const {
    writer.le32(body.offset).le32(body.size).le32(body.flags).raw(body.data);
  }
  void operator()(const Inflight& body) const {
    // With the tail padding of the C structure, which QEMU insists on.
    writer.le64(body.mmap_size).le64(body.mmap_offset).le16(body.queues).le16(body.queue_size).le32(0);
  }
};

}  // namespace

std::string_view to_string(Request request) noexcept {
  const Rule* rule = rule_of(static_cast<uint32_t>(request));
  return rule != nullptr ? rule->name : "unknown";
}

Result<Header> decode_header(ByteSpan bytes) {
  ByteReader reader(bytes);
  Header header;
  header.request = reader.le32();
  header.flags = reader.le32();
  header.payload_size = reader.le32();
  if (!reader.done()) return fail(ErrorKind::Corrupt, "vhost-user header of {} bytes", bytes.size());
  if ((header.flags & kFlagVersionMask) != kFlagVersion ||
      (header.flags & ~(kFlagVersionMask | kFlagReply | kFlagNeedReply)) != 0)
    return fail(ErrorKind::Corrupt, "vhost-user request {}: flags {:#x}", header.request, header.flags);
  if (header.payload_size > kPayloadSizeMax)
    return fail(ErrorKind::LimitExceeded, "vhost-user request {}: payload of {} bytes, the limit is {}", header.request,
                header.payload_size, kPayloadSizeMax);
  return header;
}

void append_header(Bytes& out, uint32_t request, uint32_t flags, size_t payload_size) {
  ByteWriter(out).le32(request).le32(kFlagVersion | flags).le32(static_cast<uint32_t>(payload_size));
}

Result<Message> decode(const Header& header, ByteSpan payload, size_t fd_count) {
  const Rule* rule = rule_of(header.request);
  if (rule == nullptr) return fail(ErrorKind::NotFound, "vhost-user request {} is not known", header.request);
  if ((header.flags & kFlagReply) != 0) return bad(*rule, "a reply that nobody asked for");
  if (payload.size() != header.payload_size) return bad(*rule, "payload is cut short");
  if (!fd_count_fits(*rule, fd_count)) return bad(*rule, "wrong number of descriptors");
  ByteReader reader(payload);
  auto body = read_body(*rule, reader, fd_count);
  if (!body) return tl::unexpected(body.error());
  if (!reader.done()) return bad(*rule, "payload has the wrong size");
  return Message{rule->request, header.need_reply(), std::move(*body)};
}

void encode(Bytes& out, Request request, uint32_t flags, const Body& body) {
  Bytes payload;
  ByteWriter writer(payload);
  std::visit(BodyWriter{writer}, body);
  append_header(out, static_cast<uint32_t>(request), flags, payload.size());
  ByteWriter(out).raw(payload);
}

void encode_number_reply(Bytes& out, Request request, uint64_t value) {
  encode(out, request, kFlagReply, NumberBody{value});
}

Result<Body> decode_reply(const Header& header, ByteSpan payload, Request request) {
  const Rule* rule = rule_of(static_cast<uint32_t>(request));
  if (rule == nullptr) return fail(ErrorKind::NotFound, "vhost-user request {} is not known", header.request);
  if (header.request != static_cast<uint32_t>(request) || (header.flags & kFlagReply) == 0)
    return bad(*rule, "the answer is to another request");
  if (payload.size() != header.payload_size) return bad(*rule, "payload is cut short");
  ByteReader reader(payload);
  Result<Body> body;
  switch (request) {
    case Request::GetVringBase:
    case Request::GetInflightFd:
    case Request::GetConfig:
      body = read_body(*rule, reader, 0);
      break;
    default:
      body = Body{NumberBody{reader.le64()}};
  }
  if (body && !reader.done()) return bad(*rule, "the answer has the wrong size");
  return body;
}

}  // namespace vmferry::vhost
