// SPDX-License-Identifier: Apache-2.0
//
// Drivers and front-ends that lie: chains, indices, addresses and in-flight regions that make no sense.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <random>
#include <thread>

#include "netproto/virtio/blk.h"
#include "netproto/virtio/packed_ring.h"
#include "netproto/virtio/split_ring.h"
#include "tests/unit/netproto/virtqueue_fixture.h"

namespace vmferry::virtio {
namespace {

using Take = Virtqueue::Take;
constexpr uint16_t kNext = 1, kWrite = 2, kIndirect = 4;

struct Entry {
  uint64_t address;
  uint32_t length;
  uint16_t flags;
  uint16_t next;
};

void put_entry(uint8_t* at, const Entry& entry, bool packed) {
  store_shared(at, entry.address);
  store_shared(at + 8, entry.length);
  store_shared(at + (packed ? 14 : 12), entry.flags);
  store_shared(at + (packed ? 12 : 14), entry.next);
}

// The first chain of a split ring, as given.
ChainFault split_fault(const std::vector<Entry>& entries, const std::vector<Entry>& table = {}, bool indirect = true,
                       uint16_t head = 0, uint16_t available = 1) {
  RingFixture fixture({false, indirect, false}, 8);
  for (size_t i = 0; i < entries.size(); ++i) put_entry(fixture.host() + 16 * i, entries[i], false);
  for (size_t i = 0; i < table.size(); ++i) put_entry(fixture.at(fixture.data_address()) + 16 * i, table[i], false);
  const RingMemory& ring = fixture.driver().memory();
  store_shared(ring.driver + 4, head);
  store_shared(ring.driver + 2, available);
  Chain chain;
  const Take take = fixture.device().take(chain);
  EXPECT_EQ(take == Take::Broken, fixture.device().fault() != ChainFault::None);
  if (take == Take::Broken) {
    EXPECT_EQ(fixture.device().take(chain), Take::Broken) << "a broken ring stays broken";
    EXPECT_FALSE(fixture.device().want_notifications());
  }
  return fixture.device().fault();
}

constexpr uint64_t kData = RingFixture::kGuestBase + RingFixture::kDataOffset;

TEST(SplitRingHostile, EachLieIsNamed) {
  // Followed blindly, each of these reads outside the table or never ends.
  const Entry one{kData, 16, 0, 0};
  EXPECT_EQ(split_fault({one}), ChainFault::None);
  EXPECT_EQ(split_fault({one}, {}, true, 8), ChainFault::DescriptorIndex) << "head one past the end";
  EXPECT_EQ(split_fault({one}, {}, true, 0xffff), ChainFault::DescriptorIndex);
  EXPECT_EQ(split_fault({{kData, 16, kNext, 8}}), ChainFault::DescriptorIndex) << "link one past the end";
  EXPECT_EQ(split_fault({{kData, 16, kNext, 0}}), ChainFault::Loop) << "onto itself";
  EXPECT_EQ(split_fault({{kData, 16, kNext, 1}, {kData, 16, kNext, 0}}), ChainFault::Loop) << "of two";
  EXPECT_EQ(split_fault({one}, {}, true, 0, 9), ChainFault::RingIndex) << "more available than the ring is long";
  EXPECT_EQ(split_fault({one}, {}, true, 0, 0xffff), ChainFault::RingIndex) << "behind us";
  EXPECT_EQ(split_fault({{kData, 16, kWrite | kNext, 1}, {kData, 16, 0, 0}}), ChainFault::ReadableAfterWritable);
}

TEST(SplitRingHostile, EachLieInAnIndirectTableIsNamed) {
  // A table is chosen by the guest: its place, its length and its links.
  const Entry table{kData, 32, kIndirect, 0};
  const Entry one{kData, 16, 0, 0};
  EXPECT_EQ(split_fault({table}, {{kData, 16, kNext, 1}, {kData, 16, kWrite, 0}}), ChainFault::None);
  EXPECT_EQ(split_fault({table}, {one}, false), ChainFault::IndirectNotAgreed);
  EXPECT_EQ(split_fault({table}, {{kData, 16, kIndirect, 0}}), ChainFault::IndirectInIndirect);
  EXPECT_EQ(split_fault({table}, {{kData, 16, kNext, 2}}), ChainFault::DescriptorIndex) << "one past the table";
  EXPECT_EQ(split_fault({table}, {{kData, 16, kNext, 1}, {kData, 16, kNext, 0}}), ChainFault::Loop);
  EXPECT_EQ(split_fault({{kData, 32, kIndirect | kNext, 1}, one}), ChainFault::IndirectChained);
  EXPECT_EQ(split_fault({{kData, 16, kNext, 1}, table}, {one}), ChainFault::None) << "at the end of a chain: allowed";
  EXPECT_EQ(split_fault({{kData, 0, kIndirect, 0}}), ChainFault::IndirectTable) << "empty";
  EXPECT_EQ(split_fault({{kData, 17, kIndirect, 0}}), ChainFault::IndirectTable) << "no whole descriptors";
  EXPECT_EQ(split_fault({{kData, 16 * 1025, kIndirect, 0}}), ChainFault::IndirectTable) << "too long";
  EXPECT_EQ(split_fault({{kData, UINT32_MAX & ~15U, kIndirect, 0}}), ChainFault::IndirectTable);
  EXPECT_EQ(split_fault({{0, 32, kIndirect, 0}}), ChainFault::IndirectTable) << "outside the memory";
  const uint64_t end = RingFixture::kGuestBase + RingFixture::kMemorySize;
  EXPECT_EQ(split_fault({{end - 16, 32, kIndirect, 0}}), ChainFault::IndirectTable) << "half outside";
  EXPECT_EQ(split_fault({{UINT64_MAX - 15, 32, kIndirect, 0}}), ChainFault::IndirectTable) << "wraps around";
}

TEST(PackedRingHostile, EachLieIsNamed) {
  // The same lies in the other layout.
  constexpr uint16_t kReady = 1U << 7;
  const auto fault = [](const std::vector<Entry>& entries, const std::vector<Entry>& table = {}, bool indirect = true) {
    RingFixture fixture({true, indirect, false}, 8);
    for (size_t i = 0; i < table.size(); ++i) put_entry(fixture.at(fixture.data_address()) + 16 * i, table[i], true);
    for (size_t i = 0; i < entries.size(); ++i) put_entry(fixture.host() + 16 * i, entries[i], true);
    Chain chain;
    (void)fixture.device().take(chain);
    return fixture.device().fault();
  };
  const auto entry = [&](uint16_t flags, uint16_t id = 0, uint32_t length = 16) {
    return Entry{kData, length, static_cast<uint16_t>(flags | kReady), id};
  };
  EXPECT_EQ(fault({entry(0)}), ChainFault::None);
  EXPECT_EQ(fault({entry(0, 8)}), ChainFault::DescriptorIndex) << "id outside the ring";
  EXPECT_EQ(fault(std::vector<Entry>(8, entry(kNext))), ChainFault::Loop) << "longer than the ring";
  EXPECT_EQ(fault({entry(kWrite | kNext), entry(0)}), ChainFault::ReadableAfterWritable);
  EXPECT_EQ(fault({entry(kIndirect)}, {{kData, 16, 0, 0}}, false), ChainFault::IndirectNotAgreed);
  EXPECT_EQ(fault({entry(kIndirect)}, {{kData, 16, kIndirect, 0}}), ChainFault::IndirectInIndirect);
  EXPECT_EQ(fault({entry(kIndirect | kNext), entry(0)}), ChainFault::IndirectChained);
  EXPECT_EQ(fault({entry(kNext), entry(kIndirect)}), ChainFault::IndirectChained) << "at the end of a chain";
  EXPECT_EQ(fault({entry(kIndirect, 0, 0)}), ChainFault::IndirectTable);
  EXPECT_EQ(fault({entry(kIndirect, 0, 8)}), ChainFault::IndirectTable);
}

// The in-flight region lies in memory that the front-end owns: any bytes may come back in it.
TEST(VirtqueueHostile, ADamagedInflightRegionNeverLeadsOutsideTheRing) {
  std::mt19937 random(3);
  for (const bool packed : {false, true}) {
    for (int round = 0; round < 3000; ++round) {
      RingFixture fixture({packed, true, true}, 8, RingFixture::Inflight::Yes);
      const MutableByteSpan region = fixture.region();
      const size_t changes = 1 + random() % 12;
      if (round % 3 == 0)
        for (uint8_t& byte : region) byte = static_cast<uint8_t>(random());
      for (size_t i = 0; i < changes; ++i) region[random() % region.size()] = static_cast<uint8_t>(random() % 12);
      region[8] = 1;  // a version that is read
      region[9] = 0;
      region[10] = 8;
      region[11] = 0;
      for (size_t i = 0; i < 128; ++i) fixture.host()[i] = static_cast<uint8_t>(random());
      fixture.restart_device();
      Chain chain;
      for (int i = 0; i < 8 && fixture.device().take(chain) == Take::Taken; ++i) {
        ASSERT_TRUE(packed || chain.id < 8) << "round=" << round;
        ASSERT_LE(chain.slots, 8) << "round=" << round;
        ASSERT_TRUE(!packed || chain.state < 8) << "round=" << round;
        fixture.device().put(chain, 1);
        (void)fixture.device().publish();
      }
      (void)fixture.device().want_notifications();
    }
  }
}

// The front-end can write to the region at any moment, also between our look at an index and its use.
TEST(VirtqueueHostile, AnIndexChangedAfterItsCheckIsNotUsed) {
  constexpr uint16_t kSize = 8;
  RingFixture fixture({true, false, false}, kSize, RingFixture::Inflight::Yes);
  uint8_t* const region = fixture.region().data();
  std::atomic<bool> stop{false};
  std::thread liar([&] {
    while (!stop)
      for (const uint16_t index : {uint16_t{0}, uint16_t{0x7fff}})
        for (const size_t field : {size_t{16}, size_t{18}}) store_shared(region + field, index);
  });
  unsigned outside = 0;
  unsigned recovered = 0;
  const auto since = std::chrono::steady_clock::now();
  const auto elapsed = [since] { return std::chrono::steady_clock::now() - since; };
  // On a busy machine the liar may hold the processor for most of a second.
  const auto enough = [&] { return elapsed() > std::chrono::seconds(recovered > 0 ? 1 : 30); };
  while (outside == 0 && !enough()) {
    fixture.restart_device();
    if (fixture.device().fault() != ChainFault::None) continue;
    ++recovered;
    const uint32_t base = fixture.device().base();
    if ((base & 0x7fff) >= kSize || (base >> 16 & 0x7fff) >= kSize) ++outside;
  }
  stop = true;
  liar.join();
  EXPECT_EQ(outside, 0U) << "the next answer would be written there";
  EXPECT_GT(recovered, 0U);
}

// A region of another queue size would be indexed past its end.
TEST(VirtqueueHostile, AnInflightRegionOfAnotherShapeIsRefused) {
  for (const bool packed : {false, true}) {
    RingFixture fixture({packed, false, false}, 8, RingFixture::Inflight::Yes);
    fixture.region()[10] = 16;
    fixture.restart_device();
    EXPECT_EQ(fixture.device().fault(), ChainFault::RegionDamaged);
    fixture.region()[10] = 8;
    fixture.region()[8] = 2;
    fixture.restart_device();
    EXPECT_EQ(fixture.device().fault(), ChainFault::RegionDamaged) << "a version of the future";
  }
}

TEST(GuestMemory, AddressesOutsideAreRefused) {
  // A wrong translation writes into the daemon's memory or into another guest's.
  std::vector<uint8_t> bytes(3 * 4096);
  GuestMemory memory;
  ASSERT_TRUE(memory.add({0x1000, 4096, 0x70000, bytes.data()}));
  ASSERT_TRUE(memory.add({0x2000, 4096, 0x90000, bytes.data() + 8192}));
  std::vector<HostSpan> spans;
  EXPECT_TRUE(memory.translate(0x1000, 4096, spans));
  ASSERT_EQ(spans.size(), 1U);
  EXPECT_EQ(spans[0].data, bytes.data());
  spans.clear();
  EXPECT_TRUE(memory.translate(0x1ff0, 32, spans)) << "across two adjacent regions";
  ASSERT_EQ(spans.size(), 2U);
  EXPECT_EQ(spans[0].length, 16U);
  EXPECT_EQ(spans[1].data, bytes.data() + 8192);
  EXPECT_EQ(spans[1].guest_address, 0x2000U);
  spans.clear();
  EXPECT_FALSE(memory.translate(0x1000, 0, spans)) << "nothing is nowhere";
  EXPECT_FALSE(memory.translate(0xfff, 1, spans));
  EXPECT_FALSE(memory.translate(0x2fff, 2, spans));
  EXPECT_FALSE(memory.translate(UINT64_MAX, 2, spans)) << "wraps around";
  EXPECT_TRUE(spans.empty());
  EXPECT_EQ(memory.at_guest(0x1ff0, 32), nullptr) << "a ring has to lie in one region";
  EXPECT_EQ(memory.at_user(0x70ff0, 16), bytes.data() + 4080);
  EXPECT_EQ(memory.at_user(0x70ff0, 17), nullptr);
  EXPECT_EQ(memory.at_user(0x70ff0, UINT64_MAX), nullptr);
  EXPECT_EQ(memory.guest_of_user(0x90001), 0x2001U);
  EXPECT_FALSE(memory.guest_of_user(0x80000));
  EXPECT_EQ(memory.guest_end(), 0x3000U);
}

TEST(GuestMemory, OverlapsAreRefused) {
  // Two regions at one address would make translation depend on their order.
  std::vector<uint8_t> bytes(4096);
  GuestMemory memory;
  ASSERT_TRUE(memory.add({0x1000, 4096, 0x70000, bytes.data()}));
  EXPECT_FALSE(memory.add({0x1fff, 1, 0x90000, bytes.data()}));
  EXPECT_FALSE(memory.add({0x8000, 1, 0x70fff, bytes.data()}));
  EXPECT_FALSE(memory.add({0x8000, 0, 0x90000, bytes.data()}));
  EXPECT_FALSE(memory.add({UINT64_MAX, 2, 0x90000, bytes.data()}));
  EXPECT_FALSE(memory.add({0x8000, 1, 0x90000, nullptr}));
  EXPECT_TRUE(memory.add({0x2000, 1, 0x71000, bytes.data()}));
}

TEST(DirtyLog, MarksEveryPageTouchedAndNothingBeyond) {
  // A page without its bit is not copied again: the destination's guest has old bytes.
  std::vector<uint8_t> bits(2);
  const DirtyLog log(bits.data(), bits.size());
  EXPECT_TRUE(log.mark(4095, 2));
  EXPECT_EQ(bits[0], 3);
  EXPECT_TRUE(log.mark(8 * 4096, 1));
  EXPECT_EQ(bits[1], 1);
  EXPECT_TRUE(log.mark(5 * 4096, 0));
  EXPECT_EQ(bits[0], 3);
  EXPECT_TRUE(log.mark(15 * 4096, 4096));
  EXPECT_FALSE(log.mark(15 * 4096, 4097)) << "one past the end";
  EXPECT_FALSE(log.mark(UINT64_MAX, 2));
  EXPECT_TRUE(DirtyLog().mark(0, UINT64_MAX)) << "off";
}

TEST(BlkConfig, GoldenBytes) {
  // A field at another place gives a guest a disk of another size.
  const auto bytes = encode_blk_config({.size = 0x200000,
                                        .segments_max = 126,
                                        .block_size = 512,
                                        .physical_block = 4096,
                                        .optimal_io = 65536,
                                        .writeback = true,
                                        .queues = 4,
                                        .discard_sectors_max = 0x400000,
                                        .discard_ranges_max = 32,
                                        .discard_alignment = 4096});
  const std::array<uint8_t, kBlkConfigSize> golden{
      0, 0x10, 0, 0, 0, 0, 0, 0, 0,    0, 0,  0, 126, 0, 0, 0, 0, 0, 0, 0, 0,    2, 0,  0, 3, 0, 8, 0, 128, 0,
      0, 0,    1, 0, 4, 0, 0, 0, 0x40, 0, 32, 0, 0,   0, 8, 0, 0, 0, 0, 0, 0x40, 0, 32, 0, 0, 0, 1, 0, 0,   0};
  EXPECT_EQ(bytes, golden);
  const auto back = decode_blk_config(bytes);
  ASSERT_TRUE(back);
  EXPECT_EQ(back->size, 0x200000U);
  EXPECT_EQ(back->physical_block, 4096U);
  EXPECT_EQ(back->queues, 4U);
  EXPECT_FALSE(decode_blk_config(ByteSpan(bytes).first(kBlkConfigSize - 1)));
}

}  // namespace
}  // namespace vmferry::virtio
