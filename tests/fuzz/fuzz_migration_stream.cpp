// SPDX-License-Identifier: Apache-2.0
//
// Migration stream parser: the same bytes in one piece and in small ones give the same figures. Corpus:
// tests/golden/migration_stream.
#include "engine/base/assert.h"
#include "netproto/qemu/migration_stream.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmferry;
  if (size == 0) return 0;
  const ByteSpan input(data + 1, size - 1);
  MigrationStreamParser whole;
  whole.feed(input);
  MigrationStreamParser pieces;
  const size_t piece = 1 + size_t{data[0]};
  for (size_t at = 0; at < input.size(); at += piece)
    pieces.feed(input.subspan(at, std::min(piece, input.size() - at)));
  const auto& a = whole.figures();
  const auto& b = pieces.figures();
  VF_ASSERT(whole.phase() == pieces.phase() && whole.reason() == pieces.reason());
  VF_ASSERT(a.total_bytes == input.size() && b.total_bytes == input.size());
  VF_ASSERT(a.pages_data == b.pages_data && a.pages_zero == b.pages_zero && a.ram_sections == b.ram_sections);
  VF_ASSERT(a.tail_bytes == b.tail_bytes && a.device_bytes_max == b.device_bytes_max);
  VF_ASSERT(a.blocks.size() == b.blocks.size() && a.blocks.size() <= 4096);
  return 0;
}
