// SPDX-License-Identifier: Apache-2.0
//
// QMP codec. The first byte chooses where the input is cut and whether a greeting comes first: without it nearly every
// input would end at the first message.
#include "netproto/qemu/qmp.h"

#include "engine/base/assert.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmferry;
  if (size == 0) return 0;
  qmp::Codec codec;
  uint64_t id = 0;
  for (int i = 0; i < 4; ++i) codec.encode("query-status", nullptr, id);
  std::vector<qmp::Message> messages;
  if ((data[0] & 1) != 0) {
    const Status greeted = codec.feed(as_bytes("{\"QMP\": {\"version\": {}}}\n"), messages);
    VF_ASSERT(greeted.has_value());
  }
  ByteSpan input(data + 1, size - 1);
  const size_t piece = 1 + static_cast<size_t>(data[0] >> 1);
  bool failed = false;
  while (!input.empty()) {
    const size_t count = std::min(piece, input.size());
    const Status status = codec.feed(input.first(count), messages);
    VF_ASSERT(!(failed && status.has_value()));  // an error is final
    failed = !status.has_value();
    input = input.subspan(count);
  }
  for (const qmp::Message& message : messages)
    if (const auto* reply = std::get_if<qmp::Reply>(&message)) VF_ASSERT(reply->id >= 1 && reply->id <= id);
  return 0;
}
