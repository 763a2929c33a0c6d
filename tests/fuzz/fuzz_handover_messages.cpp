// SPDX-License-Identifier: Apache-2.0
//
// Messages of a handover and of a promotion, as a hostile peer could send them.
//
// The first byte chooses the decoder. What a decoder accepts must name an attempt and survive encoding: two daemons
// that read one message differently agree on no owner, or on two.
#include <algorithm>

#include "netproto/repl/handover_messages.h"
#include "tests/fuzz/require.h"

namespace vmferry {
namespace {

template <typename Decode>
void round_trip(ByteSpan bytes, Decode decode) {
  const auto first = decode(bytes);
  if (!first) return;
  require(!first->attempt.is_none());
  const Bytes again = encode(*first);
  require(again.size() == bytes.size());
  const auto second = decode(again);
  require(second && *second == *first);
}

// A reason ends on a terminal: nothing but printable ASCII may come out, so its bytes need not survive.
template <typename Decode>
void round_trip_with_reason(ByteSpan bytes, Decode decode) {
  const auto first = decode(bytes);
  if (!first) return;
  require(first->reason.size() <= kHandoverReasonMax);
  require(std::all_of(first->reason.begin(), first->reason.end(), [](char c) { return c >= 0x20 && c <= 0x7e; }));
  round_trip(bytes, decode);
}

}  // namespace
}  // namespace vmferry

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmferry;
  if (size == 0) return 0;
  const ByteSpan bytes(data + 1, size - 1);
  switch (data[0] % 12) {
    case 0:
      round_trip(bytes, decode_prepare);
      break;
    case 1:
      round_trip_with_reason(bytes, decode_prepared);
      break;
    case 2:
      round_trip(bytes, decode_fence_notice);
      break;
    case 3:
      round_trip(bytes, decode_go);
      break;
    case 4:
      round_trip(bytes, decode_primary);
      break;
    case 5:
      round_trip(bytes, decode_started);
      break;
    case 6:
      round_trip(bytes, decode_running);
      break;
    case 7:
      round_trip_with_reason(bytes, decode_aborted);
      break;
    case 8:
      round_trip(bytes, decode_unknown_attempt);
      break;
    case 9:
      round_trip(bytes, decode_promote_request);
      break;
    case 10:
      round_trip_with_reason(bytes, decode_promote_reply);
      break;
    case 11:
      round_trip(bytes, decode_demote_notice);
      break;
    default:
      break;
  }
  return 0;
}
