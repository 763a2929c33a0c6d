// SPDX-License-Identifier: Apache-2.0
//
// The server's side of the NBD transmission phase: splits the byte stream into requests and payload, decides which
// requests are valid, and encodes replies.
//
// Flow: NbdConnection calls RequestParser::next() until it needs more bytes; the payload of a write goes from the
// span that the socket delivered straight to where the caller wants it. check_request() is the one place where a
// request is validated; the layers below assert.
// Source of truth: proto.md "Transmission phase". Every byte fed here is hostile (I11).
// Threads: none of its own; one owner.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "netproto/nbd/handshake.h"
#include "netproto/nbd/wire.h"

namespace vmferry::nbd {

// What a request is checked against.
struct RequestRules {
  uint64_t size = 0;  // bytes, of the export now
  bool read_only = false;
  bool structured_replies = false;  // also with extended headers
  bool extended_headers = false;
  bool base_allocation = false;
  uint32_t extra_contexts = 0;  // number of other contexts that were agreed; their ids are 2, 3, ...
  uint32_t block_size_min = 1;  // 1 unless block sizes were agreed
  uint32_t payload_size_max = kPayloadSizeMax;

  static RequestRules from(const Session& session);
  // Bit id-1 for each context that was agreed.
  uint32_t contexts() const { return (((1U << extra_contexts) - 1) << 1) | (base_allocation ? 1U : 0U); }
  HeaderStyle style() const {
    return extended_headers     ? HeaderStyle::Extended
           : structured_replies ? HeaderStyle::Structured
                                : HeaderStyle::Simple;
  }
};

// None, or what to answer. Disconnect is always valid.
WireError check_request(const Request& request, const RequestRules& rules) noexcept;

// A BLOCK_STATUS whose payload names the range's length and the contexts that are asked for.
constexpr bool is_limited_status(const Request& request) {
  return request.payload && request.command == static_cast<uint16_t>(Command::BlockStatus);
}
inline constexpr size_t kLimitedStatusSizeMax = 8 + 4 * (1 + kExtraContextsMax);
// Turns it into the plain request that it stands for, to be checked as such; Invalid when it names a context that was
// not agreed, or none.
WireError resolve_limited_status(Request& request, ByteSpan payload, const RequestRules& rules) noexcept;

// Cuts the stream into headers and payload. After a header with payload the caller says what to do with it, with
// take_payload() or skip_payload(); other headers need nothing.
class RequestParser {
 public:
  enum class Event : uint8_t {
    NeedBytes,    // everything was consumed
    Header,       // request() is new
    PayloadDone,  // of request(), taken or skipped (see skipped())
    Broken,       // wrong magic: the stream makes no sense any more
  };

  // What was agreed; Simple and Structured requests look the same. Before the first next().
  void set_style(HeaderStyle style) { style_ = style; }

  // Consumes from the front of `bytes` up to the next event.
  Event next(ByteSpan& bytes);

  void take_payload(uint8_t* destination, uint64_t size);
  void skip_payload(uint64_t size);

  const Request& request() const { return request_; }
  void replace_request(const Request& request) { request_ = request; }  // by what its payload says
  bool skipped() const { return skipping_; }
  bool inside_payload() const { return payload_left_ > 0; }

 private:
  HeaderStyle style_ = HeaderStyle::Simple;
  std::array<uint8_t, kExtendedRequestSize> header_{};  // an incomplete one
  size_t header_size_ = 0;
  Request request_;
  uint8_t* destination_ = nullptr;
  uint64_t payload_left_ = 0;
  bool skipping_ = false;
  bool payload_pending_ = false;  // PayloadDone is still to be reported
};

// One descriptor of a BLOCK_STATUS chunk.
struct StatusDescriptor {
  uint64_t length = 0;  // bytes, > 0; below 4 GiB unless headers are extended
  uint32_t flags = 0;   // kStateHole | kStateZero; of other contexts what these define
};

// Appends the answer to a request that failed: an error chunk with a text, or a simple reply where that is the form.
void append_error(Bytes& out, const Request& request, WireError error, HeaderStyle style);
// Where the chunk of one context stands in the reply to a BLOCK_STATUS, which has one chunk for each.
struct StatusChunk {
  uint32_t context_id = kBaseAllocationId;
  bool last = true;  // it ends the reply
};
// Appends the BLOCK_STATUS chunk of one context. `descriptors` is not empty.
void append_block_status(Bytes& out, const Request& request, std::span<const StatusDescriptor> descriptors,
                         HeaderStyle style, StatusChunk chunk = {});

// READ and BLOCK_STATUS are answered with chunks once structured replies are agreed, the others with a simple reply;
// with extended headers everything is answered with chunks.
constexpr bool answers_in_chunks(const Request& request, HeaderStyle style) {
  return style == HeaderStyle::Extended ||
         (style == HeaderStyle::Structured && (request.command == static_cast<uint16_t>(Command::Read) ||
                                               request.command == static_cast<uint16_t>(Command::BlockStatus)));
}

}  // namespace vmferry::nbd
