// SPDX-License-Identifier: Apache-2.0
//
// Fuzz target of the NBD codec: one client's whole byte stream, handshake and transmission.
//
// The first byte chooses how the stream is cut, because sockets cut where they like; the rest is what the client sends.
// The greeting is not part of it, so that most inputs get into the options; the corpus holds whole valid sessions.
#include <algorithm>

#include "engine/base/units.h"
#include "netproto/nbd/handshake.h"
#include "netproto/nbd/transmission.h"
#include "tests/fuzz/require.h"

namespace {

using namespace vmferry;
using namespace vmferry::nbd;

class Catalog final : public ExportCatalog {
 public:
  std::optional<ExportInfo> find_export(std::string_view name) const override {
    for (const ExportInfo& info : list_exports())
      if (info.name == name || name.empty()) return info;
    return std::nullopt;
  }
  std::vector<ExportInfo> list_exports() const override {
    ExportInfo writable;
    writable.name = "vda";
    writable.description = "disk";
    writable.size = 1 << 20;
    writable.block_size_min = 512;
    writable.contexts = {"vmferry:dirty-b", "vmferry:epoch"};
    ExportInfo read_only;
    read_only.name = "vdb";
    read_only.size = 4096;
    read_only.read_only = true;
    read_only.tls_allow = {"alice"};
    return {writable, read_only};
  }
};

// As NbdConnection does it: a write's payload goes to a buffer of exactly its size.
void transmit(RequestParser& parser, const RequestRules& rules, Bytes& buffer, ByteSpan& bytes, Bytes& out) {
  for (;;) {
    switch (parser.next(bytes)) {
      case RequestParser::Event::NeedBytes:
        require(bytes.empty());
        return;
      case RequestParser::Event::Broken:
        bytes = {};
        return;
      case RequestParser::Event::PayloadDone:
        if (is_limited_status(parser.request()) && !parser.skipped()) {
          Request request = parser.request();
          if (resolve_limited_status(request, buffer, rules) == WireError::None)
            require(!request.payload && request.contexts != 0 && (request.contexts & ~rules.contexts()) == 0);
        }
        append_error(out, parser.request(), WireError::Io, rules.style());
        break;
      case RequestParser::Event::Header: {
        const Request& request = parser.request();
        const WireError error = check_request(request, rules);
        if (error == WireError::None && request.command != static_cast<uint16_t>(Command::Flush) &&
            request.command != static_cast<uint16_t>(Command::Disconnect))
          require(fits_in(request.offset, request.length, rules.size) && request.length > 0);
        if (!request.payload) break;
        if (request.length > UINT32_MAX) {
          bytes = {};
          return;
        }
        if (is_limited_status(request) && request.length <= kLimitedStatusSizeMax) {
          buffer.assign(request.length, 0);
          parser.take_payload(buffer.data(), request.length);
        } else if (error != WireError::None) {
          parser.skip_payload(request.length);
        } else {
          buffer.assign(request.length, 0);
          parser.take_payload(buffer.data(), request.length);
        }
        break;
      }
    }
    out.clear();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const size_t step = std::max<size_t>(1, data[0]);
  const ByteSpan stream(data + 1, size - 1);
  const Catalog catalog;
  // STARTTLS is part of the stream; what follows it stands for what TLS delivers.
  const TlsPolicy policy = data[0] == 255 ? TlsPolicy::Require : data[0] == 254 ? TlsPolicy::Off : TlsPolicy::Allow;
  Handshake handshake(catalog, {.option_size_max = 1024, .option_count_max = 100}, policy);
  RequestParser parser;
  RequestRules rules;
  Bytes out;
  Bytes buffer;
  for (size_t at = 0; at < stream.size(); at += step) {
    ByteSpan part = stream.subspan(at, std::min(step, stream.size() - at));
    if (handshake.state() != Handshake::State::Transmission) {
      for (;;) {
        part = part.subspan(handshake.feed(part, out));
        if (handshake.state() != Handshake::State::StartTls) break;
        require(policy != TlsPolicy::Off && handshake.feed(part, out) == 0);
        handshake.tls_started(data[0] % 2 == 0 ? "alice" : "bob");
      }
      if (handshake.state() == Handshake::State::Finished || handshake.state() == Handshake::State::Rejected) return 0;
      if (handshake.state() != Handshake::State::Transmission) {
        require(part.empty() && out.size() < 100 * 1024);
        continue;
      }
      rules = RequestRules::from(handshake.session());
      require(handshake.session().export_info.tls_allow.empty() || data[0] % 2 == 0);
      parser.set_style(rules.style());
    }
    transmit(parser, rules, buffer, part, out);
  }
  return 0;
}
