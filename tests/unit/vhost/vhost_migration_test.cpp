// SPDX-License-Identifier: Apache-2.0
//
// A migration of the guest's memory in small: pages are copied by the dirty log while the back-end fills them.
#include <atomic>

#include "tests/unit/vhost/vhost_fixture.h"

namespace vmferry {
namespace {

// Reads what another thread may be writing, as a migration does; that is no mistake to report.
__attribute__((no_sanitize("thread"))) void copy_page(uint8_t* target, const uint8_t* source) {
  for (size_t i = 0; i < 4096; ++i) target[i] = *const_cast<const volatile uint8_t*>(source + i);
}

// Copies the memory once, then only what the log names, while reads go on; true when the copy of the data pages is
// equal in the end. Pages that the driver writes itself are not compared: QEMU knows of those by other means.
bool copy_is_complete(bool packed, bool with_log) {
  constexpr uint16_t kSlots = 16;
  constexpr uint32_t kBytes = 8192;
  VhostBackend backend(1_MiB);
  for (size_t i = 0; i < 1_MiB; ++i) backend.disk->content()[i] = static_cast<uint8_t>(i / 512 + i);
  perf::FrontendOptions options;
  options.ring = {packed, true, true};
  auto frontend = make_frontend(options);
  EXPECT_TRUE(frontend->connect(backend.dial()));
  perf::BlkQueue queue(*frontend, 0, kSlots, kBytes);
  if (with_log) {
    EXPECT_TRUE(frontend->set_logging(true));
  }
  const uint64_t pages = frontend->memory_bytes() / 4096;
  const uint8_t* source = frontend->data() - (frontend->data_address() - perf::Frontend::kGuestBase);
  std::vector<uint8_t> copy(source, source + frontend->memory_bytes());
  const auto copy_marked = [&] {
    const auto log = frontend->log();
    for (uint64_t page = 0; page < pages && !log.empty(); ++page) {
      const uint64_t number = perf::Frontend::kGuestBase / 4096 + page;
      const auto bit = static_cast<uint8_t>(1U << (number % 8));
      // Cleared first, then copied, as QEMU does: a byte that comes between is marked again.
      if ((std::atomic_ref<uint8_t>(log[number / 8]).fetch_and(static_cast<uint8_t>(~bit)) & bit) == 0) continue;
      copy_page(copy.data() + page * 4096, source + page * 4096);
    }
  };
  uint64_t sector = 0;
  for (int round = 0; round < 60; ++round) {
    for (uint16_t slot = 0; slot < kSlots; ++slot) {
      EXPECT_TRUE(queue.add(slot, virtio::kBlkIn, (sector += 7) % 1900, kBytes));
    }
    queue.flush();
    copy_marked();
    for (uint16_t done = 0; done < kSlots;) {
      while (queue.reap()) ++done;
      copy_marked();
    }
  }
  EXPECT_TRUE(frontend->stop_queue(0));  // from here on nothing is written: the last round
  copy_marked();
  bool equal = true;
  for (uint16_t slot = 0; slot < kSlots; ++slot) {
    const uint64_t offset = queue.data_address(slot) - perf::Frontend::kGuestBase;
    equal = equal && std::memcmp(copy.data() + offset, source + offset, kBytes) == 0;
  }
  return equal;
}

TEST(VhostMigration, MemoryCopiedByTheDirtyLogIsComplete) {
  EXPECT_TRUE(copy_is_complete(false, true));
  EXPECT_TRUE(copy_is_complete(true, true));
}

// Were the copy complete without a log, the test above would prove nothing about it.
TEST(VhostMigration, WithoutTheDirtyLogTheCopyIsNot) {
  EXPECT_FALSE(copy_is_complete(false, false));
  EXPECT_FALSE(copy_is_complete(true, false));
}

}  // namespace
}  // namespace vmferry
