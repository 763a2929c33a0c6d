// SPDX-License-Identifier: Apache-2.0
//
// Frames, Hello, control questions, tokens and pairing of the replication protocol, as a hostile peer or a stranger
// could send them.
//
// The first byte chooses: 0 a raw stream, 1 a stream whose header checksums are made right (so that the fuzzer gets
// behind them), others one message decoder each. Streams are fed whole and byte by byte, which must not differ; what
// a decoder accepts must survive encoding.
#include <vector>

#include "engine/base/hash.h"
#include "netproto/repl/frame.h"
#include "netproto/repl/hello.h"
#include "netproto/repl/pairing.h"
#include "tests/fuzz/require.h"

namespace vmferry {
namespace {

struct Outcome {
  bool ok = true;
  bool at_boundary = true;
  std::vector<Bytes> messages;
};

Outcome decode(ByteSpan stream, size_t piece) {
  FrameDecoder decoder;
  Outcome out;
  for (size_t at = 0; at < stream.size() && out.ok; at += piece) {
    const Status fed =
        decoder.feed(stream.subspan(at, std::min(piece, stream.size() - at)), [&](MessageType type, ByteSpan payload) {
          require(is_known_message(static_cast<uint16_t>(type)));
          require(payload.size() <= kFramePayloadSizeMax);
          out.messages.emplace_back(payload.begin(), payload.end());
          return true;
        });
    out.ok = fed.has_value();
  }
  if (out.ok) out.at_boundary = decoder.at_boundary();
  return out;
}

void check_stream(ByteSpan stream) {
  const Outcome whole = decode(stream, std::max<size_t>(stream.size(), 1));
  const Outcome bytes = decode(stream, 1);
  require(whole.ok == bytes.ok && whole.messages == bytes.messages && whole.at_boundary == bytes.at_boundary);
}

// Walks the stream as headers say and makes each checksum right.
Bytes with_checksums(ByteSpan input) {
  Bytes stream(input.begin(), input.end());
  size_t at = 0;
  while (stream.size() - at >= kFrameHeaderSize) {
    const uint32_t crc = crc32c(ByteSpan(stream).subspan(at, 12));
    for (size_t i = 0; i < 4; ++i) stream[at + 12 + i] = static_cast<uint8_t>(crc >> (8 * i));
    ByteReader size(ByteSpan(stream).subspan(at + 8, 4));
    const size_t next = at + kFrameHeaderSize + size.le32();
    if (next > stream.size()) break;
    at = next;
  }
  return stream;
}

template <typename Decoded, typename Decode>
void check_message(const Decoded& decoded, Decode decode_again) {
  if (!decoded) return;
  const Bytes encoded = encode(*decoded);
  const auto again = decode_again(encoded);
  require(again.has_value() && encode(*again) == encoded);
}

}  // namespace
}  // namespace vmferry

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmferry;
  if (size == 0) return 0;
  const ByteSpan input(data + 1, size - 1);
  switch (data[0]) {
    case 0:
      check_stream(input);
      break;
    case 1:
      check_stream(with_checksums(input));
      break;
    case 2:
      check_message(decode_hello(input), decode_hello);
      break;
    case 3:
      check_message(decode_hello_reject(input), decode_hello_reject);
      break;
    case 4:
      check_message(decode_peer_request(input), decode_peer_request);
      break;
    case 5:
      check_message(decode_peer_reply(input), decode_peer_reply);
      break;
    case 6:
      check_message(decode_join_request(input), decode_join_request);
      break;
    case 7:
      check_message(decode_join_reply(input), decode_join_reply);
      break;
    case 8:
      if (const auto token = decode_token(as_text(input))) {
        require(decode_token(encode_token(*token)).has_value());
      }
      break;
    default:
      break;
  }
  return 0;
}
