// SPDX-License-Identifier: Apache-2.0
#include "netproto/nbd/handshake.h"

#include <algorithm>
#include <utility>

#include "engine/base/text.h"

namespace vmferry::nbd {

namespace {

constexpr std::string_view kTlsFirst = "this server requires TLS: send STARTTLS first";

}  // namespace

uint16_t transmission_flags(const ExportInfo& info, HeaderStyle style) noexcept {
  // CAN_MULTI_CONN holds because every connection submits to the same device: a write is complete there before its
  // reply, so a FLUSH through any connection covers it.
  unsigned flags = kHasFlags | kSendFlush | kSendFua | kCanMultiConn | kSendCache;
  if (info.read_only) {
    flags |= kReadOnly;
  } else {
    flags |= kSendTrim | kSendWriteZeroes | kSendFastZero;
  }
  if (style != HeaderStyle::Simple) flags |= kSendDf;  // proto.md: clear unless structured replies were negotiated
  if (style == HeaderStyle::Extended) flags |= kBlockStatusPayload;
  return static_cast<uint16_t>(flags);
}

Handshake::Handshake(const ExportCatalog& catalog, HandshakeLimits limits, TlsPolicy tls)
    : catalog_(catalog), limits_(limits), tls_policy_(tls) {}

void Handshake::greet(Bytes& out) const {
  ByteWriter(out).be64(kInitMagic).be64(kOptionMagic).be16(kFlagFixedNewstyle | kFlagNoZeroes);
}

bool Handshake::is_final() const {
  return state_ == State::Transmission || state_ == State::Finished || state_ == State::Rejected;
}

size_t Handshake::feed(ByteSpan bytes, Bytes& out) {
  size_t used = 0;
  while (!is_final() && state_ != State::StartTls) {
    if (state_ == State::SkipData) {
      const size_t skipped = static_cast<size_t>(std::min<uint64_t>(skip_left_, bytes.size() - used));
      used += skipped;
      skip_left_ -= skipped;
      if (skip_left_ > 0) break;
      if (needs_tls_first()) {
        reply_error(OptionReply::ErrTlsRequired, kTlsFirst, out);
      } else {
        reply_error(OptionReply::ErrTooBig, "option data is too long", out);
      }
      state_ = State::OptionHeader;
      wanted_ = kOptionHeaderSize;
      continue;
    }
    const size_t taken = std::min(wanted_ - pending_.size(), bytes.size() - used);
    pending_.insert(pending_.end(), bytes.begin() + static_cast<std::ptrdiff_t>(used),
                    bytes.begin() + static_cast<std::ptrdiff_t>(used + taken));
    used += taken;
    if (pending_.size() < wanted_) break;
    switch (state_) {
      case State::ClientFlags:
        on_client_flags(out);
        break;
      case State::OptionHeader:
        on_option_header(out);
        break;
      default: {
        Bytes data;
        data.swap(pending_);
        state_ = State::OptionHeader;
        wanted_ = kOptionHeaderSize;
        on_option(data, out);
        break;
      }
    }
  }
  return used;
}

void Handshake::on_client_flags(Bytes&) {
  const uint32_t flags = ByteReader(pending_).be32();
  pending_.clear();
  if ((flags & ~static_cast<uint32_t>(kClientFixedNewstyle | kClientNoZeroes)) != 0) {
    return reject("unknown client flag");
  }
  fixed_newstyle_ = (flags & kClientFixedNewstyle) != 0;
  no_zeroes_ = (flags & kClientNoZeroes) != 0;
  state_ = State::OptionHeader;
  wanted_ = kOptionHeaderSize;
}

void Handshake::on_option_header(Bytes& out) {
  ByteReader in(pending_);
  const uint64_t magic = in.be64();
  option_ = in.be32();
  const uint32_t size = in.be32();
  pending_.clear();
  if (magic != kOptionMagic) return reject("wrong option magic");
  if (++option_count_ > limits_.option_count_max) return reject("too many options");
  const bool is_export_name = option_ == static_cast<uint32_t>(Option::ExportName);
  if (!fixed_newstyle_ && !is_export_name) return reject("option from a client without fixed newstyle");
  if (is_export_name && size > kStringSizeMax) return reject("export name is too long");
  if (size > limits_.option_size_max) {
    state_ = State::SkipData;
    skip_left_ = size;
    // A set that could not be read has replaced the earlier one all the same.
    if (option_ == static_cast<uint32_t>(Option::SetMetaContext)) contexts_for_.reset();
    return;
  }
  if (size == 0) return on_option({}, out);
  state_ = State::OptionData;
  wanted_ = size;
}

void Handshake::on_option(ByteSpan data, Bytes& out) {
  const auto option = static_cast<Option>(option_);
  if (option == Option::Abort) {
    reply(OptionReply::Ack, {}, out);
    state_ = State::Finished;
    return;
  }
  if (shutting_down_) {
    if (option == Option::ExportName) return reject("shutting down");
    return reply_error(OptionReply::ErrShutdown, "the server is shutting down", out);
  }
  if (needs_tls_first() && option != Option::StartTls) {
    if (option == Option::ExportName) return reject("EXPORT_NAME before TLS, which is required");
    return reply_error(OptionReply::ErrTlsRequired, kTlsFirst, out);
  }
  switch (option) {
    case Option::StartTls:
      return on_start_tls(data, out);
    case Option::ExportName:
      return on_export_name(data, out);
    case Option::List:
      return on_list(data, out);
    case Option::Info:
    case Option::Go:
      return on_info_or_go(data, out);
    case Option::StructuredReply:
      return on_structured_reply(data, out);
    case Option::ExtendedHeaders:
      return on_extended_headers(data, out);
    case Option::ListMetaContext:
    case Option::SetMetaContext:
      return on_meta_context(data, out);
    default:
      return reply_error(OptionReply::ErrUnsupported, "option is not supported", out);
  }
}

void Handshake::on_export_name(ByteSpan data, Bytes& out) {
  if (style_ == HeaderStyle::Extended) return reject("EXPORT_NAME after extended headers");
  const std::optional<ExportInfo> info = catalog_.find_export(as_text(data));
  if (!info) return reject("unknown export");  // this option has no error reply
  if (access_to(*info) != Access::Granted) return reject("the client may not use the export");
  ByteWriter writer(out);
  writer.be64(info->size).be16(transmission_flags(*info, style_));
  if (!no_zeroes_) out.insert(out.end(), 124, 0);
  enter_transmission(*info, false);
}

void Handshake::on_list(ByteSpan data, Bytes& out) {
  if (!data.empty()) return reply_error(OptionReply::ErrInvalid, "LIST takes no data", out);
  for (const ExportInfo& info : catalog_.list_exports()) {
    if (access_to(info) != Access::Granted) continue;
    Bytes item;
    ByteWriter(item)
        .be32(static_cast<uint32_t>(info.name.size()))
        .raw(as_bytes(info.name))
        .raw(as_bytes(info.description));
    reply(OptionReply::Server, item, out);
  }
  reply(OptionReply::Ack, {}, out);
}

void Handshake::on_info_or_go(ByteSpan data, Bytes& out) {
  ByteReader in(data);
  const uint32_t name_size = in.be32();
  const std::string_view name = as_text(in.take(name_size));
  const uint16_t count = in.be16();
  bool wants_name = false;
  bool wants_description = false;
  bool wants_block_size = false;
  for (uint16_t i = 0; i < count && in.ok(); ++i) {
    switch (static_cast<InfoType>(in.be16())) {
      case InfoType::Name:
        wants_name = true;
        break;
      case InfoType::Description:
        wants_description = true;
        break;
      case InfoType::BlockSize:
        wants_block_size = true;
        break;
      default:
        break;  // EXPORT is sent anyway; unknown ones are ignored
    }
  }
  if (!in.done() || name.size() > kStringSizeMax) {
    return reply_error(OptionReply::ErrInvalid, "malformed INFO or GO", out);
  }
  const std::optional<ExportInfo> info = open_export(name, out);
  if (!info) return;

  const auto send = [&](InfoType type, auto&& fill) {
    Bytes item;
    ByteWriter writer(item);
    writer.be16(static_cast<uint16_t>(type));
    fill(writer);
    reply(OptionReply::Info, item, out);
  };
  send(InfoType::Export, [&](ByteWriter& w) { w.be64(info->size).be16(transmission_flags(*info, style_)); });
  if (wants_name) send(InfoType::Name, [&](ByteWriter& w) { w.raw(as_bytes(info->name)); });
  if (wants_description) send(InfoType::Description, [&](ByteWriter& w) { w.raw(as_bytes(info->description)); });
  if (wants_block_size) {
    send(InfoType::BlockSize, [&](ByteWriter& w) {
      w.be32(info->block_size_min).be32(info->block_size_preferred).be32(info->payload_size_max);
    });
  }
  reply(OptionReply::Ack, {}, out);
  if (static_cast<Option>(option_) == Option::Go) enter_transmission(*info, wants_block_size);
}

void Handshake::on_structured_reply(ByteSpan data, Bytes& out) {
  if (!data.empty()) return reply_error(OptionReply::ErrInvalid, "STRUCTURED_REPLY takes no data", out);
  if (style_ == HeaderStyle::Extended) {
    return reply_error(OptionReply::ErrExtendedHeadersRequired, "extended headers are agreed already", out);
  }
  style_ = HeaderStyle::Structured;
  reply(OptionReply::Ack, {}, out);
}

void Handshake::on_extended_headers(ByteSpan data, Bytes& out) {
  if (!data.empty()) return reply_error(OptionReply::ErrInvalid, "EXTENDED_HEADERS takes no data", out);
  if (style_ == HeaderStyle::Extended) return reply_error(OptionReply::ErrInvalid, "agreed already", out);
  style_ = HeaderStyle::Extended;
  reply(OptionReply::Ack, {}, out);
}

void Handshake::on_meta_context(ByteSpan data, Bytes& out) {
  const bool is_set = static_cast<Option>(option_) == Option::SetMetaContext;
  if (is_set) contexts_for_.reset();  // also when what follows fails
  if (style_ == HeaderStyle::Simple) return reply_error(OptionReply::ErrInvalid, "structured replies come first", out);

  ByteReader in(data);
  const uint32_t name_size = in.be32();
  const std::string_view name = as_text(in.take(name_size));
  const uint32_t query_count = in.be32();
  std::vector<std::string_view> queries;
  for (uint32_t i = 0; i < query_count && in.ok(); ++i) {
    const uint32_t query_size = in.be32();
    queries.push_back(as_text(in.take(query_size)));
  }
  if (!in.done() || name.size() > kStringSizeMax) {
    return reply_error(OptionReply::ErrInvalid, "malformed meta context query", out);
  }
  const std::optional<ExportInfo> info = open_export(name, out);
  if (!info) return;
  if (is_set) {
    contexts_for_ = info->name;
    base_allocation_ = false;
    extra_contexts_.clear();
  }
  const auto offer = [&](uint32_t id, std::string_view context) {
    Bytes item;
    ByteWriter(item).be32(is_set ? id : 0).raw(as_bytes(context));
    reply(OptionReply::MetaContext, item, out);
  };
  const auto wanted = [&](std::string_view context) {
    if (!is_set && queries.empty()) return true;  // LIST without a query asks for everything
    const std::string_view space = context.substr(0, context.find(':') + 1);
    return std::any_of(queries.begin(), queries.end(),
                       [&](std::string_view query) { return query == context || (!is_set && query == space); });
  };
  if (wanted(kBaseAllocation)) {
    base_allocation_ = base_allocation_ || is_set;
    offer(kBaseAllocationId, kBaseAllocation);
  }
  for (const std::string& context : info->contexts) {
    if (!wanted(context)) continue;
    if (is_set) extra_contexts_.push_back(context);
    offer(kBaseAllocationId + static_cast<uint32_t>(extra_contexts_.size()), context);
  }
  reply(OptionReply::Ack, {}, out);
}

void Handshake::on_start_tls(ByteSpan data, Bytes& out) {
  if (tls_policy_ == TlsPolicy::Off) {
    return reply_error(OptionReply::ErrPolicy, "this server is not configured for TLS", out);
  }
  if (tls_active_) return reply_error(OptionReply::ErrInvalid, "TLS is active already", out);
  if (!data.empty()) return reply_error(OptionReply::ErrInvalid, "STARTTLS takes no data", out);
  reply(OptionReply::Ack, {}, out);
  state_ = State::StartTls;
}

void Handshake::tls_started(std::string client_name) {
  tls_active_ = true;
  client_name_ = std::move(client_name);
  style_ = HeaderStyle::Simple;
  contexts_for_.reset();
  state_ = State::OptionHeader;
  wanted_ = kOptionHeaderSize;
}

bool Handshake::needs_tls_first() const {
  return tls_policy_ == TlsPolicy::Require && !tls_active_;
}

Handshake::Access Handshake::access_to(const ExportInfo& info) const {
  if (info.tls_allow.empty()) return Access::Granted;
  if (!tls_active_) return tls_policy_ == TlsPolicy::Off ? Access::Denied : Access::TlsRequired;
  const auto& names = info.tls_allow;
  const bool named = !client_name_.empty() && std::find(names.begin(), names.end(), client_name_) != names.end();
  return named ? Access::Granted : Access::Denied;
}

std::optional<ExportInfo> Handshake::open_export(std::string_view name, Bytes& out) {
  std::optional<ExportInfo> info = catalog_.find_export(name);
  if (!info) {
    reply_error(OptionReply::ErrUnknown, "no such export", out);
    return std::nullopt;
  }
  switch (access_to(*info)) {
    case Access::Granted:
      return info;
    case Access::TlsRequired:
      reply_error(OptionReply::ErrTlsRequired, "this export requires TLS: send STARTTLS first", out);
      return std::nullopt;
    case Access::Denied:
      break;
  }
  denial_ = fmt::format("client '{}' is not in tls-allow of export '{}'", printable(client_name_), info->name);
  reply_error(OptionReply::ErrPolicy, "the name in this client's certificate is not allowed to use the export", out);
  return std::nullopt;
}

void Handshake::enter_transmission(const ExportInfo& info, bool block_sizes_agreed) {
  session_.export_info = info;
  session_.structured_replies = style_ != HeaderStyle::Simple;
  session_.extended_headers = style_ == HeaderStyle::Extended;
  session_.block_sizes_agreed = block_sizes_agreed;
  if (contexts_for_ == info.name) {  // contexts of another export do not count
    session_.base_allocation = base_allocation_;
    session_.extra_contexts = extra_contexts_;
  }
  state_ = State::Transmission;
}

void Handshake::reject(std::string_view reason) {
  reason_ = reason;
  state_ = State::Rejected;
}

void Handshake::reply(OptionReply type, ByteSpan data, Bytes& out) const {
  ByteWriter(out)
      .be64(kOptionReplyMagic)
      .be32(option_)
      .be32(static_cast<uint32_t>(type))
      .be32(static_cast<uint32_t>(data.size()))
      .raw(data);
}

void Handshake::reply_error(OptionReply type, std::string_view text, Bytes& out) const {
  reply(type, as_bytes(text), out);
}

}  // namespace vmferry::nbd
