// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/hello.h"

#include <algorithm>

namespace vmferry {

namespace {

Id128 read_id(ByteReader& reader) {
  Id128 id;
  reader.copy_to(MutableByteSpan(id.bytes));
  return id;
}

std::string_view cut(std::string_view text, size_t size_max) {
  return text.substr(0, size_max);
}

// An unknown kind comes from a newer peer: what to do about it is unknown too.
ErrorKind to_error_kind(uint8_t value) {
  return value <= static_cast<uint8_t>(ErrorKind::Internal) ? static_cast<ErrorKind>(value) : ErrorKind::Internal;
}

}  // namespace

std::string printable(std::string_view text, size_t size_max) {
  std::string out(cut(text, size_max));
  std::replace_if(
      out.begin(), out.end(), [](char c) { return c < 0x20 || c > 0x7e; }, '?');
  return out;
}

Bytes encode(const Hello& message) {
  Bytes out;
  ByteWriter writer(out);
  writer.le16(message.version_min).le16(message.version_max).le64(message.features).le64(message.features_required);
  writer.raw(message.node_id.bytes).raw(message.boot_id.bytes);
  writer.le16_string(cut(message.daemon_version, kHelloTextMax)).le16_string(cut(message.your_name, kHelloTextMax));
  return out;
}

Result<Hello> decode_hello(ByteSpan payload) {
  ByteReader reader(payload);
  Hello hello;
  hello.version_min = reader.le16();
  hello.version_max = reader.le16();
  hello.features = reader.le64();
  hello.features_required = reader.le64();
  hello.node_id = read_id(reader);
  hello.boot_id = read_id(reader);
  hello.daemon_version = printable(reader.le16_string(kHelloTextMax), kHelloTextMax);
  hello.your_name = printable(reader.le16_string(kHelloTextMax), kHelloTextMax);
  if (!reader.ok()) return fail(ErrorKind::Corrupt, "Hello of {} bytes is malformed", payload.size());
  if (hello.version_min == 0 || hello.version_min > hello.version_max) {
    return fail(ErrorKind::Corrupt, "Hello with versions {}..{}", hello.version_min, hello.version_max);
  }
  if (hello.node_id.is_none() || hello.boot_id.is_none()) return fail(ErrorKind::Corrupt, "Hello without ids");
  return hello;
}

Bytes encode(const HelloReject& message) {
  Bytes out;
  ByteWriter writer(out);
  writer.le16(static_cast<uint16_t>(message.reason)).le16(message.version_min).le16(message.version_max);
  writer.le16_string(cut(message.text, kHelloTextMax));
  return out;
}

Result<HelloReject> decode_hello_reject(ByteSpan payload) {
  ByteReader reader(payload);
  HelloReject reject;
  const uint16_t reason = reader.le16();
  reject.reason = reason <= static_cast<uint16_t>(RejectReason::ShuttingDown) ? static_cast<RejectReason>(reason)
                                                                              : RejectReason::Other;
  reject.version_min = reader.le16();
  reject.version_max = reader.le16();
  reject.text = printable(reader.le16_string(kHelloTextMax), kHelloTextMax);
  if (!reader.ok()) return fail(ErrorKind::Corrupt, "HelloReject of {} bytes is malformed", payload.size());
  return reject;
}

Bytes encode(const Ping& message) {
  Bytes out;
  ByteWriter(out).le64(message.stamp);
  return out;
}

Result<Ping> decode_ping(ByteSpan payload) {
  ByteReader reader(payload);
  const Ping ping{.stamp = reader.le64()};
  if (!reader.done()) return fail(ErrorKind::Corrupt, "Ping of {} bytes is malformed", payload.size());
  return ping;
}

Bytes encode(const PeerRequest& message) {
  Bytes out;
  out.reserve(message.json.size() + kPeerMethodSizeMax);
  ByteWriter writer(out);
  writer.le64(message.id).le16_string(cut(message.method, kPeerMethodSizeMax)).raw(as_bytes(message.json));
  return out;
}

Result<PeerRequest> decode_peer_request(ByteSpan payload) {
  ByteReader reader(payload);
  PeerRequest request;
  request.id = reader.le64();
  request.method = printable(reader.le16_string(kPeerMethodSizeMax), kPeerMethodSizeMax);
  request.json = as_text(reader.rest());
  if (!reader.ok() || request.json.size() > kPeerRequestTextMax) {
    return fail(ErrorKind::Corrupt, "PeerRequest of {} bytes is malformed", payload.size());
  }
  return request;
}

Bytes encode(const PeerReply& message) {
  Bytes out;
  out.reserve(message.text.size() + 10);
  ByteWriter writer(out);
  writer.le64(message.id).u8(message.ok ? 1 : 0).u8(static_cast<uint8_t>(message.error)).raw(as_bytes(message.text));
  return out;
}

Result<PeerReply> decode_peer_reply(ByteSpan payload) {
  ByteReader reader(payload);
  PeerReply reply;
  reply.id = reader.le64();
  const uint8_t ok = reader.u8();
  reply.ok = ok == 1;
  reply.error = to_error_kind(reader.u8());
  reply.text = as_text(reader.rest());
  if (!reader.ok() || ok > 1 || reply.text.size() > kPeerRequestTextMax) {
    return fail(ErrorKind::Corrupt, "PeerReply of {} bytes is malformed", payload.size());
  }
  if (!reply.ok) reply.text = printable(reply.text, 4096);
  return reply;
}

tl::expected<Negotiated, HelloReject> check_hello(const Hello& ours, const Hello& theirs) {
  const uint16_t version = std::min(ours.version_max, theirs.version_max);
  if (version < ours.version_min || version < theirs.version_min) {
    return tl::unexpected(HelloReject{
        .reason = RejectReason::Version,
        .version_min = ours.version_min,
        .version_max = ours.version_max,
        .text = fmt::format("protocol versions {}..{} (daemon {}) and {}..{} (daemon {}) have none in common",
                            ours.version_min, ours.version_max, ours.daemon_version, theirs.version_min,
                            theirs.version_max, theirs.daemon_version)});
  }
  const uint64_t missing = (ours.features_required & ~theirs.features) | (theirs.features_required & ~ours.features);
  if (missing != 0) {
    return tl::unexpected(HelloReject{.reason = RejectReason::Feature,
                                      .version_min = ours.version_min,
                                      .version_max = ours.version_max,
                                      .text = fmt::format("feature bits {:#x} are required by one side and missing on "
                                                          "the other (daemons {} and {})",
                                                          missing, ours.daemon_version, theirs.daemon_version)});
  }
  if (ours.node_id == theirs.node_id) {
    return tl::unexpected(HelloReject{.reason = RejectReason::SelfConnected,
                                      .version_min = ours.version_min,
                                      .version_max = ours.version_max,
                                      .text = "both ends of the connection are the same daemon"});
  }
  return Negotiated{.version = version, .features = ours.features & theirs.features};
}

}  // namespace vmferry
