// SPDX-License-Identifier: Apache-2.0
//
// Messages of the memory stream: what a decoder accepts is exactly what the encoder gives. The first byte chooses the
// decoder.
#include <algorithm>

#include "engine/base/assert.h"
#include "netproto/repl/memory_messages.h"

namespace {

template <typename Message>
void check(const vmferry::Result<Message>& decoded, vmferry::ByteSpan payload) {
  if (!decoded) return;
  const vmferry::Bytes again = vmferry::encode(*decoded);
  VF_ASSERT(std::equal(again.begin(), again.end(), payload.begin(), payload.end()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmferry;
  if (size == 0) return 0;
  const ByteSpan payload(data + 1, size - 1);
  switch (data[0] % 3) {
    case 0:
      check(decode_memory_data(payload), payload);
      break;
    case 1:
      check(decode_memory_end(payload), payload);
      break;
    default:
      check(decode_memory_ack(payload), payload);
      break;
  }
  return 0;
}
