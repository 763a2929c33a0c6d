// SPDX-License-Identifier: Apache-2.0
//
// Messages of groups, epochs and verification, as a hostile peer could send them.
//
// The first byte chooses the decoder. What a decoder accepts must survive encoding, and hold the limits that its users
// rely on.

#include "netproto/repl/epoch_messages.h"
#include "tests/fuzz/require.h"

namespace vmferry {
namespace {

template <typename Decode>
void round_trip(ByteSpan bytes, Decode decode) {
  const auto first = decode(bytes);
  if (!first) return;
  const Bytes again = encode(*first);
  require(again.size() == bytes.size() && std::equal(again.begin(), again.end(), bytes.begin()));
}

void frame_body(ByteSpan bytes) {
  const auto body = decode_frame_body(bytes);
  if (!body) return;
  require(body->runs.size() <= kRunsPerFrameMax && body->literals.size() <= kFrameLiteralMax);
  uint64_t literals = 0;
  for (const auto& run : body->runs) {
    require(run.range.length > 0 && run.range.offset <= UINT64_MAX - run.range.length);
    if (run.kind == RunKind::Literal) literals += run.range.length;
  }
  require(literals == body->literals.size());
  Bytes again;
  append_frame_body(*body, again);
  require(again.size() == bytes.size() && std::equal(again.begin(), again.end(), bytes.begin()));
}

}  // namespace
}  // namespace vmferry

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmferry;
  if (size == 0) return 0;
  const ByteSpan bytes(data + 1, size - 1);
  switch (data[0] % 14) {
    case 0:
      round_trip(bytes, decode_group_hello);
      break;
    case 1:
      round_trip(bytes, decode_group_reject);
      break;
    case 2:
      round_trip(bytes, decode_epoch_begin);
      break;
    case 3:
      round_trip(bytes, decode_epoch_data);
      break;
    case 4:
      round_trip(bytes, decode_epoch_end);
      break;
    case 5:
      round_trip(bytes, decode_epoch_segment_ack);
      break;
    case 6:
      round_trip(bytes, decode_epoch_ack);
      break;
    case 7:
      round_trip(bytes, decode_epoch_resend);
      break;
    case 8:
      round_trip(bytes, decode_credit);
      break;
    case 9:
      round_trip(bytes, decode_epoch_abandon);
      break;
    case 10:
      round_trip(bytes, decode_verify_request);
      break;
    case 11:
      round_trip(bytes, decode_verify_reply);
      break;
    case 13:
      round_trip(bytes, decode_source_state);
      break;
    default:
      frame_body(bytes);
  }
  return 0;
}
