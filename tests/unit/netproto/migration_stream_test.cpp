// SPDX-License-Identifier: Apache-2.0
//
// Golden streams: `migrate exec:cat` of a guest of 4 MiB without any system (tests/golden/migration_stream).
#include "netproto/qemu/migration_stream.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "engine/base/random.h"

namespace vmferry {
namespace {

using Phase = MigrationStreamParser::Phase;

Bytes golden(const std::string& name) {
  // __FILE__ is absolute, or relative to the build folder (shared compiler cache).
  const auto build = std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path();
  const auto path = (build / __FILE__).parent_path() / "../../golden/migration_stream" / name;
  std::ifstream file(path, std::ios::binary);
  Bytes bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_GT(bytes.size(), 100'000U) << path;
  return bytes;
}

struct Expected {
  const char* file;
  const char* machine;
  uint64_t pages_data;
};
// The page counts are what query-migrate said ("normal" and "duplicate") when the streams were recorded.
const Expected kGolden[] = {{"qemu-7.2.bin", "pc-i440fx-7.2", 3}, {"qemu-10.0.bin", "pc-i440fx-10.0", 4}};

void expect_golden(const MigrationStreamParser& parser, const Expected& expected, size_t size) {
  const auto& figures = parser.figures();
  ASSERT_EQ(parser.phase(), Phase::Tail) << parser.reason();
  EXPECT_EQ(figures.machine, expected.machine);
  EXPECT_EQ(figures.page_size, 4096U);
  EXPECT_EQ(figures.pages_zero, 1103U);
  EXPECT_EQ(figures.pages_data, expected.pages_data);
  EXPECT_EQ(figures.total_bytes, size);
  EXPECT_GE(figures.ram_sections, 2U);
  ASSERT_FALSE(figures.blocks.empty());
  EXPECT_EQ(figures.blocks[0].name, "pc.ram");
  EXPECT_EQ(figures.blocks[0].length, 4U << 20);
  uint64_t total = 0;
  for (const RamBlock& block : figures.blocks) total += block.length;
  EXPECT_EQ(total, 4'530'176U);
}

// Figures that depend on how the socket cuts the stream would be worthless for estimates.
TEST(MigrationStream, GoldenStreamsInPiecesOfAnySize) {
  for (const Expected& expected : kGolden) {
    const Bytes stream = golden(expected.file);
    uint64_t tail = 0;
    for (const size_t piece : {size_t{1}, size_t{3}, size_t{7}, size_t{4096}, size_t{4105}, stream.size()}) {
      MigrationStreamParser parser;
      for (size_t at = 0; at < stream.size(); at += piece)
        parser.feed(ByteSpan(stream).subspan(at, std::min(piece, stream.size() - at)));
      expect_golden(parser, expected, stream.size());
      if (tail == 0) tail = parser.figures().tail_bytes;
      EXPECT_EQ(parser.figures().tail_bytes, tail) << piece;
      EXPECT_GT(tail, 50'000U);
    }
  }
}

TEST(MigrationStream, CommandsBetweenSectionsAreUnderstood) {
  MigrationStreamParser parser;
  parser.feed(golden("qemu-10.0.bin"));
  EXPECT_GE(parser.figures().commands, 1U) << "QEMU 10 sends one before the END of ram";
}

// virtio-mem sends a device section before `ram`; it has no length, so the start of `ram` has to be found.
TEST(MigrationStream, DeviceSectionBeforeRamIsSkipped) {
  for (const Expected& expected : kGolden) {
    Bytes stream = golden(expected.file);
    const size_t at = 8 + 1 + 4 + std::string(expected.machine).size();
    Bytes device = {0x04, 0, 0, 0, 9, 5, 'v', 'm', 'e', 'm', '0', 0, 0, 0, 0, 0, 0, 0, 1};
    // Content that nearly looks like the start of `ram`.
    for (const char c : std::string_view("\x03ram\0\0\0\0\0\0\0\x04 and \x01\0\0\0\x02\x03ram", 26))
      device.push_back(static_cast<uint8_t>(c));
    device.insert(device.end(), 10'000, 0x03);
    stream.insert(stream.begin() + static_cast<ptrdiff_t>(at), device.begin(), device.end());
    for (const size_t piece : {size_t{1}, size_t{1000}, stream.size()}) {
      MigrationStreamParser parser;
      for (size_t from = 0; from < stream.size(); from += piece)
        parser.feed(ByteSpan(stream).subspan(from, std::min(piece, stream.size() - from)));
      expect_golden(parser, expected, stream.size());
      EXPECT_EQ(parser.figures().device_bytes_max, device.size() - 1) << "without the type byte, which was understood";
    }
  }
}

// A flag of a capability that we did not switch off: the parser must stop counting, not guess.
TEST(MigrationStream, SurprisesMakeItOpaque) {
  const Bytes stream = golden("qemu-7.2.bin");
  const size_t sections = 8 + 1 + 4 + std::string("pc-i440fx-7.2").size();
  struct Row {
    const char* name;
    size_t at;
    uint8_t value;
  };
  for (const Row& row :
       {Row{"magic", 0, 'X'}, Row{"version", 7, 4}, Row{"section type", sections, 0x33}, Row{"machine name", 9, 0xff},
        Row{"ram version", sections + 16, 9}, Row{"size record flags", sections + 24, 0x48}}) {
    Bytes changed = stream;
    changed[row.at] = row.value;
    MigrationStreamParser parser;
    parser.feed(changed);
    EXPECT_EQ(parser.phase(), Phase::Opaque) << row.name;
    EXPECT_FALSE(parser.reason().empty()) << row.name;
    EXPECT_EQ(parser.figures().total_bytes, changed.size()) << row.name;
  }
}

TEST(MigrationStream, TruncationAtEveryLengthIsNoSurprise) {
  const Bytes stream = golden("qemu-7.2.bin");
  for (size_t size = 0; size < 2000; ++size) {
    MigrationStreamParser parser;
    parser.feed(ByteSpan(stream).first(size));
    ASSERT_NE(parser.phase(), Phase::Opaque) << size << ": " << parser.reason();
  }
}

TEST(MigrationStream, RandomDamageNeverBreaksTheParser) {
  const Bytes stream = golden("qemu-10.0.bin");
  Random random(4);
  for (int round = 0; round < 300; ++round) {
    Bytes damaged(stream.begin(), stream.begin() + 30'000);
    for (int i = 0; i < 3; ++i) damaged[random.below(2000)] = static_cast<uint8_t>(random.next());
    MigrationStreamParser parser;
    for (size_t at = 0; at < damaged.size();) {
      const size_t piece = std::min<size_t>(1 + random.below(5000), damaged.size() - at);
      parser.feed(ByteSpan(damaged).subspan(at, piece));
      at += piece;
    }
    EXPECT_EQ(parser.figures().total_bytes, damaged.size());
    EXPECT_LE(parser.figures().blocks.size(), 4096U);
  }
}

}  // namespace
}  // namespace vmferry
