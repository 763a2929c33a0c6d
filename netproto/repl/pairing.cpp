// SPDX-License-Identifier: Apache-2.0
#include "netproto/repl/pairing.h"

#include <algorithm>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr std::string_view kTokenPrefix = "vmferry1.";
constexpr std::string_view kBase64Url =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";  // RFC 4648, 5

std::string to_base64url(ByteSpan bytes) {
  std::string out;
  uint32_t bits = 0;
  unsigned count = 0;
  for (const uint8_t byte : bytes) {
    bits = bits << 8 | byte;
    for (count += 8; count >= 6; count -= 6) out.push_back(kBase64Url[bits >> (count - 6) & 63]);
  }
  if (count > 0) out.push_back(kBase64Url[bits << (6 - count) & 63]);
  return out;
}

// Strict: no padding, no whitespace, and the unused bits of the last character are zero, so each token has one text.
Result<Bytes> from_base64url(std::string_view text) {
  Bytes out;
  uint32_t bits = 0;
  unsigned count = 0;
  for (const char c : text) {
    const size_t digit = kBase64Url.find(c);
    if (digit == std::string_view::npos) return fail(ErrorKind::InvalidArgument, "token: not base64url");
    bits = bits << 6 | static_cast<uint32_t>(digit);
    count += 6;
    if (count >= 8) {
      count -= 8;
      out.push_back(static_cast<uint8_t>(bits >> count));
    }
  }
  if (count >= 6 || (bits & ((1U << count) - 1)) != 0) return fail(ErrorKind::InvalidArgument, "token: not base64url");
  return out;
}

void write_addresses(ByteWriter& writer, const std::vector<std::string>& addresses) {
  const size_t count = std::min(addresses.size(), kPeerAddressesMax);
  writer.u8(static_cast<uint8_t>(count));
  for (size_t i = 0; i < count; ++i) writer.le16_string(std::string_view(addresses[i]).substr(0, kPeerAddressSizeMax));
}

// False when the count or an address is not acceptable; the reader may be bad as well.
bool read_addresses(ByteReader& reader, std::vector<std::string>& addresses) {
  const size_t count = reader.u8();
  if (count > kPeerAddressesMax) return false;
  for (size_t i = 0; i < count; ++i) {
    addresses.push_back(reader.le16_string(kPeerAddressSizeMax));
    if (!is_valid_peer_address(addresses.back())) return false;
  }
  return true;
}

struct NamedRight {
  std::string_view name;
  bool PeerRights::*member;
};
constexpr NamedRight kNamedRights[] = {{"replicate-in", &PeerRights::replicate_in},
                                       {"verify", &PeerRights::verify},
                                       {"migrate-in", &PeerRights::migrate_in}};

void write_request_fields(ByteWriter& writer, const JoinRequest& message) {
  writer.raw(message.node_id.bytes).le16_string(message.requested_name.substr(0, 64)).u8(to_bits(message.grants));
  writer.le16(message.listen_port);
  write_addresses(writer, message.addresses);
}

}  // namespace

uint8_t to_bits(const PeerRights& rights) {
  return static_cast<uint8_t>((rights.replicate_in ? 1 : 0) | (rights.verify ? 2 : 0) | (rights.migrate_in ? 4 : 0));
}

PeerRights rights_from_bits(uint8_t bits) {
  return {.replicate_in = (bits & 1) != 0, .verify = (bits & 2) != 0, .migrate_in = (bits & 4) != 0};
}

std::string to_string(const PeerRights& rights) {
  std::string out;
  for (const NamedRight& right : kNamedRights) {
    if (rights.*right.member) out += (out.empty() ? "" : ", ") + std::string(right.name);
  }
  return out.empty() ? "nothing" : out;
}

Result<PeerRights> parse_rights(std::string_view text) {
  PeerRights rights = kNoRights;
  while (!text.empty()) {
    const size_t end = std::min(text.find(','), text.size());
    std::string_view name = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    while (!name.empty() && name.front() == ' ') name.remove_prefix(1);
    while (!name.empty() && name.back() == ' ') name.remove_suffix(1);
    const auto* const known = std::find_if(std::begin(kNamedRights), std::end(kNamedRights),
                                           [&](const NamedRight& right) { return right.name == name; });
    if (known == std::end(kNamedRights)) {
      return fail(ErrorKind::InvalidArgument, "right '{}' is not one of replicate-in, verify, migrate-in",
                  printable(name, 64));
    }
    rights.*known->member = true;
  }
  if (rights == kNoRights)
    return fail(ErrorKind::InvalidArgument, "no right is given; name one or more of replicate-in, verify, migrate-in");
  return rights;
}

bool is_valid_peer_address(std::string_view address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string_view::npos || colon == 0 || address.size() > kPeerAddressSizeMax) return false;
  const std::string_view port = address.substr(colon + 1);
  if (port.empty() || port.size() > 5) return false;
  uint32_t number = 0;
  for (const char c : port) {
    if (c < '0' || c > '9') return false;
    number = number * 10 + static_cast<uint32_t>(c - '0');
  }
  if (number == 0 || number > 65535) return false;
  std::string_view host = address.substr(0, colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  // A zone ("%eth0") means something on one host only, so it has no place in a token, but may be typed by hand.
  return std::all_of(host.begin(), host.end(), [&](char c) {
    const bool alnum = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    return alnum || c == '.' || c == '-' || c == '_' || (bracketed && (c == ':' || c == '%'));
  });
}

std::string encode_token(const PairingToken& token) {
  VF_ASSERT(!token.addresses.empty() && token.addresses.size() <= kPeerAddressesMax);
  Bytes raw;
  ByteWriter writer(raw);
  writer.raw(token.id).raw(token.inviter_key).raw(token.secret);
  write_addresses(writer, token.addresses);
  writer.le32(crc32c(raw));
  return std::string(kTokenPrefix) + to_base64url(raw);
}

Result<PairingToken> decode_token(std::string_view text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r' || text.back() == ' ')) text.remove_suffix(1);
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  if (text.size() > kTokenTextMax || text.substr(0, 7) != "vmferry") {
    return fail(ErrorKind::InvalidArgument, "this is no pairing token: it does not begin with '{}'", kTokenPrefix);
  }
  if (text.substr(0, kTokenPrefix.size()) != kTokenPrefix) {
    return fail(ErrorKind::Mismatch, "the token '{}...' has a version that this daemon does not know",
                printable(text.substr(0, text.find('.')), 16));
  }
  auto raw = from_base64url(text.substr(kTokenPrefix.size()));
  if (!raw) return tl::unexpected(raw.error());
  if (raw->size() < 4) return fail(ErrorKind::InvalidArgument, "the token is cut short");
  const ByteSpan body = ByteSpan(*raw).first(raw->size() - 4);
  ByteReader trailer(ByteSpan(*raw).last(4));
  if (trailer.le32() != crc32c(body)) {
    return fail(ErrorKind::InvalidArgument, "the token is mistyped or cut: its checksum is wrong");
  }
  ByteReader reader(body);
  PairingToken token;
  reader.copy_to(MutableByteSpan(token.id));
  reader.copy_to(MutableByteSpan(token.inviter_key));
  reader.copy_to(MutableByteSpan(token.secret));
  if (!read_addresses(reader, token.addresses) || !reader.done() || token.addresses.empty()) {
    return fail(ErrorKind::InvalidArgument, "the token is malformed");
  }
  return token;
}

Bytes encode(const JoinRequest& message) {
  Bytes out;
  ByteWriter writer(out);
  writer.le16(message.version_min).le16(message.version_max).raw(message.token).raw(message.proof);
  write_request_fields(writer, message);
  return out;
}

Result<JoinRequest> decode_join_request(ByteSpan payload) {
  ByteReader reader(payload);
  JoinRequest request;
  request.version_min = reader.le16();
  request.version_max = reader.le16();
  reader.copy_to(MutableByteSpan(request.token));
  reader.copy_to(MutableByteSpan(request.proof));
  reader.copy_to(MutableByteSpan(request.node_id.bytes));
  request.requested_name = reader.le16_string(64);
  request.grants = rights_from_bits(reader.u8());
  request.listen_port = reader.le16();
  const bool addresses_ok = read_addresses(reader, request.addresses);
  if (!reader.ok() || !addresses_ok || request.node_id.is_none() ||
      (!request.requested_name.empty() && !is_valid_name(request.requested_name))) {
    return fail(ErrorKind::Corrupt, "JoinRequest of {} bytes is malformed", payload.size());
  }
  return request;
}

Bytes encode(const JoinReply& message) {
  Bytes out;
  ByteWriter writer(out);
  writer.le16(static_cast<uint16_t>(message.result)).le16_string(message.text.substr(0, kHelloTextMax));
  writer.le16_string(message.your_name.substr(0, 64)).u8(to_bits(message.grants)).raw(message.node_id.bytes);
  return out;
}

Result<JoinReply> decode_join_reply(ByteSpan payload) {
  ByteReader reader(payload);
  JoinReply reply;
  const uint16_t result = reader.le16();
  reply.result =
      result <= static_cast<uint16_t>(JoinResult::Refused) ? static_cast<JoinResult>(result) : JoinResult::Refused;
  reply.text = printable(reader.le16_string(kHelloTextMax), kHelloTextMax);
  reply.your_name = reader.le16_string(64);
  reply.grants = rights_from_bits(reader.u8());
  reader.copy_to(MutableByteSpan(reply.node_id.bytes));
  const bool named = reply.result != JoinResult::Ok || (is_valid_name(reply.your_name) && !reply.node_id.is_none());
  if (!reader.ok() || !named) return fail(ErrorKind::Corrupt, "JoinReply of {} bytes is malformed", payload.size());
  if (reply.result != JoinResult::Ok) reply.your_name.clear();
  return reply;
}

Bytes join_statement(const TlsSession::Exporter& exporter, const KeyHash& inviter, const KeyHash& joiner,
                     const JoinRequest& request) {
  Bytes out;
  ByteWriter writer(out);
  writer.raw(as_bytes("vmferry join 1")).raw(exporter).raw(inviter).raw(joiner).raw(request.token);
  write_request_fields(writer, request);
  return out;
}

}  // namespace vmferry
