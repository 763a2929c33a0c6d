// SPDX-License-Identifier: Apache-2.0
#include "netproto/nbd/client_handshake.h"

#include <algorithm>
#include <utility>

#include "engine/base/assert.h"
#include "engine/base/text.h"

namespace vmferry::nbd {

namespace {

constexpr uint32_t kErrorBit = 1U << 31;
constexpr size_t kExportInfoSize = 12;  // type, size, flags

std::string_view meaning_of(uint32_t error) {
  switch (static_cast<OptionReply>(error)) {
    case OptionReply::ErrUnsupported:
      return "the server does not know GO";
    case OptionReply::ErrPolicy:
      return "refused by policy";
    case OptionReply::ErrTlsRequired:
      return "the server requires TLS, which the kernel's client does not speak";
    case OptionReply::ErrUnknown:
      return "no such export";
    case OptionReply::ErrShutdown:
      return "the server shuts down";
    default:
      return "refused";
  }
}

}  // namespace

ClientHandshake::ClientHandshake(std::string export_name) : export_name_(std::move(export_name)) {
  VF_ASSERT(export_name_.size() <= kStringSizeMax);
}

size_t ClientHandshake::feed(ByteSpan bytes, Bytes& out) {
  size_t used = 0;
  while (!is_final()) {
    const size_t take = std::min(wanted_ - pending_.size(), bytes.size() - used);
    pending_.insert(pending_.end(), bytes.begin() + static_cast<std::ptrdiff_t>(used),
                    bytes.begin() + static_cast<std::ptrdiff_t>(used + take));
    used += take;
    if (pending_.size() < wanted_) return used;
    switch (state_) {
      case State::Greeting:
        on_greeting(out);
        break;
      case State::ReplyHeader:
        on_reply_header();
        break;
      case State::ReplyData:
        on_reply();
        break;
      case State::Transmission:
      case State::Failed:
        break;
    }
  }
  return used;
}

void ClientHandshake::expect(State state, size_t size) {
  state_ = state;
  wanted_ = size;
  pending_.clear();
}

void ClientHandshake::fail(std::string reason) {
  state_ = State::Failed;
  reason_ = std::move(reason);
  pending_.clear();
}

void ClientHandshake::on_greeting(Bytes& out) {
  ByteReader in(pending_);
  const uint64_t magic = in.be64();
  const uint64_t style = in.be64();
  const uint16_t flags = in.be16();
  if (magic != kInitMagic) return fail("the other end is no NBD server");
  if (style != kOptionMagic || (flags & kFlagFixedNewstyle) == 0) return fail("the NBD server is not fixed newstyle");
  const bool no_zeroes = (flags & kFlagNoZeroes) != 0;
  const auto name_size = static_cast<uint32_t>(export_name_.size());
  ByteWriter(out)
      .be32(kClientFixedNewstyle | (no_zeroes ? static_cast<uint32_t>(kClientNoZeroes) : 0U))
      .be64(kOptionMagic)
      .be32(static_cast<uint32_t>(Option::Go))
      .be32(4 + name_size + 2)
      .be32(name_size)
      .raw(as_bytes(export_name_))
      .be16(0);  // no information beyond NBD_INFO_EXPORT, which always comes
  expect(State::ReplyHeader, kOptionReplyHeaderSize);
}

void ClientHandshake::on_reply_header() {
  ByteReader in(pending_);
  const uint64_t magic = in.be64();
  const uint32_t option = in.be32();
  reply_type_ = in.be32();
  const uint32_t size = in.be32();
  if (magic != kOptionReplyMagic) return fail("an option reply with a wrong magic");
  if (option != static_cast<uint32_t>(Option::Go))
    return fail(fmt::format("a reply to option {}, asked was GO", option));
  if (size > kReplySizeMax) return fail(fmt::format("a reply of {} bytes; at most {} are taken", size, kReplySizeMax));
  if (++reply_count_ > kReplyCountMax) return fail("the server's replies to GO do not end");
  expect(State::ReplyData, size);
}

void ClientHandshake::on_reply() {
  if ((reply_type_ & kErrorBit) != 0) {
    const std::string text = printable(as_text(pending_));
    return fail(fmt::format("export '{}': {}{}{}", printable(export_name_), meaning_of(reply_type_),
                            text.empty() ? "" : ": ", text));
  }
  if (reply_type_ == static_cast<uint32_t>(OptionReply::Info)) {
    on_info();
    if (state_ != State::Failed) expect(State::ReplyHeader, kOptionReplyHeaderSize);
    return;
  }
  if (reply_type_ != static_cast<uint32_t>(OptionReply::Ack)) {
    return fail(fmt::format("a reply of the unknown type {} to GO", reply_type_));
  }
  if (!pending_.empty()) return fail("an acknowledgement with data");
  if (!facts_known_) return fail("GO was acknowledged without the export's size");
  expect(State::Transmission, 0);
}

void ClientHandshake::on_info() {
  ByteReader in(pending_);
  const uint16_t type = in.be16();
  if (!in.ok()) return fail("information without a type");
  if (type != static_cast<uint16_t>(InfoType::Export)) return;  // nobody asked, proto.md says to ignore it
  if (pending_.size() != kExportInfoSize) return fail(fmt::format("NBD_INFO_EXPORT of {} bytes", pending_.size()));
  facts_.size = in.be64();
  facts_.flags = in.be16();
  if (facts_.size > INT64_MAX) return fail(fmt::format("an export of {} bytes", facts_.size));
  if ((facts_.flags & kHasFlags) == 0) return fail("transmission flags without NBD_FLAG_HAS_FLAGS");
  facts_known_ = true;
}

}  // namespace vmferry::nbd
