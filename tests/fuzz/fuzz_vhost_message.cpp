// SPDX-License-Identifier: Apache-2.0
//
// Fuzz target of the vhost-user messages: number of descriptors, header, payload. What decodes has to survive encoding
// and decoding again. The corpus holds every message once.
#include <cstdlib>

#include "netproto/vhost/message.h"

using namespace vmferry;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1 + vhost::kHeaderSize) return 0;
  const size_t fds = data[0] % (vhost::kDescriptorsMax + 2);
  const auto header = vhost::decode_header({data + 1, vhost::kHeaderSize});
  if (!header) return 0;
  const ByteSpan payload(data + 1 + vhost::kHeaderSize, size - 1 - vhost::kHeaderSize);
  const auto message = vhost::decode(*header, payload, fds);
  if (message) {
    Bytes again;
    vhost::encode(again, message->request, message->need_reply ? vhost::kFlagNeedReply : 0, message->body);
    const auto header_again = vhost::decode_header(ByteSpan(again).first(vhost::kHeaderSize));
    if (!header_again) std::abort();
    const auto twice = vhost::decode(*header_again, ByteSpan(again).subspan(vhost::kHeaderSize), fds);
    if (!twice || twice->body.index() != message->body.index()) std::abort();
  }
  (void)vhost::decode_reply(*header, payload, static_cast<vhost::Request>(header->request));
  return 0;
}
