// SPDX-License-Identifier: Apache-2.0
//
// Fuzz target of the NBD client's handshake: all that a server says. The first byte chooses how it is cut.
#include <algorithm>
#include <cstdlib>

#include "netproto/nbd/client_handshake.h"

namespace {

using namespace vmferry;

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const size_t step = data[0] == 0 ? size : data[0];
  ByteSpan bytes(data + 1, size - 1);
  nbd::ClientHandshake client("vda");
  Bytes out;
  while (!bytes.empty() && !client.is_final()) {
    const size_t take = std::min(step, bytes.size());
    const size_t used = client.feed(bytes.first(take), out);
    require(used == take || (client.is_final() && used < take));
    bytes = bytes.subspan(used);
  }
  require(out.empty() || out.size() == 4 + 16 + 4 + 3 + 2);
  if (client.state() == nbd::ClientHandshake::State::Transmission)
    require(client.facts().size <= INT64_MAX && (client.facts().flags & nbd::kHasFlags) != 0);
  if (client.state() == nbd::ClientHandshake::State::Failed) require(!client.reason().empty());
  return 0;
}
