// SPDX-License-Identifier: Apache-2.0
//
// Requests of a guest through a real connection: content, errors, write-through, copies, dirty log.
#include <fcntl.h>

#include "tests/unit/vhost/vhost_fixture.h"

namespace vmferry {
namespace {

using perf::BlkQueue;
using virtio::BlkStatus;

class VhostRequests : public testing::TestWithParam<virtio::RingOptions> {
 protected:
  std::unique_ptr<perf::Frontend> connected(VhostBackend& backend, perf::FrontendOptions options = {}) {
    options.ring = GetParam();
    auto frontend = make_frontend(options);
    const Status status = frontend->connect(backend.dial());
    EXPECT_TRUE(status) << (status ? "" : status.error().text);
    return frontend;
  }
};

INSTANTIATE_TEST_SUITE_P(Rings, VhostRequests,
                         testing::Values(virtio::RingOptions{false, false, false},
                                         virtio::RingOptions{false, true, true},
                                         virtio::RingOptions{true, false, false},
                                         virtio::RingOptions{true, true, true}),
                         variant_name);

BlkStatus status_of(const std::optional<BlkQueue::Done>& done) {
  return done ? done->status : static_cast<BlkStatus>(0xee);
}

TEST_P(VhostRequests, WhatIsWrittenIsRead) {
  // The whole way in both directions; a wrong piece or order shows as content.
  VhostBackend backend;
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 4, 64_KiB);
  for (const uint32_t piece : {0U, 512U, 4096U, 5000U}) {
    for (size_t i = 0; i < 16_KiB; ++i) queue.data(0)[i] = static_cast<uint8_t>(i * 7 + piece);
    ASSERT_EQ(status_of(queue.run(virtio::kBlkOut, 24, 16_KiB, piece)), BlkStatus::Ok) << piece;
    for (size_t i = 0; i < 16_KiB; ++i)
      ASSERT_EQ(backend.disk->content()[24 * 512 + i], static_cast<uint8_t>(i * 7 + piece));
    std::memset(queue.data(0), 0, 16_KiB);
    const auto done = queue.run(virtio::kBlkIn, 24, 16_KiB, piece);
    ASSERT_EQ(status_of(done), BlkStatus::Ok);
    EXPECT_EQ(done->written, 16_KiB + 1);
    for (size_t i = 0; i < 16_KiB; ++i) ASSERT_EQ(queue.data(0)[i], static_cast<uint8_t>(i * 7 + piece));
  }
}

TEST_P(VhostRequests, DataInOnePieceIsNotCopied) {
  // The point of vhost-user: a copy here would cost a quarter of the throughput of large requests.
  VhostBackend backend;
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 1, 64_KiB);
  ASSERT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 64_KiB)), BlkStatus::Ok);
  ASSERT_EQ(status_of(queue.run(virtio::kBlkIn, 0, 64_KiB, 4096)), BlkStatus::Ok) << "pieces behind each other are one";
  EXPECT_EQ(backend.stats().copied_bytes_total, 0U);
  EXPECT_EQ(backend.stats().written_bytes_total, 64_KiB);
  EXPECT_EQ(backend.stats().read_bytes_total, 64_KiB);
}

TEST_P(VhostRequests, ScatteredDataIsGatheredOrGoesPieceByPiece) {
  // Pieces in another order in memory than in the request, below and above the limit of copying.
  for (const uint64_t copy_max : {uint64_t{1_MiB}, uint64_t{0}}) {
    VhostBackend backend(8_MiB, {}, {.copy_bytes_max = copy_max});
    auto frontend = connected(backend);
    uint8_t* data = frontend->data();
    const uint64_t address = frontend->data_address();
    const uint32_t header[4] = {virtio::kBlkOut, 0, 8, 0};
    std::memcpy(data, header, sizeof header);
    for (size_t i = 0; i < 3 * 4096; ++i) data[8192 + i] = static_cast<uint8_t>(i / 4096 + 1);
    const virtio::Buffer readable[] = {{address, 7},
                                       {address + 7, 9},  // the header in two buffers
                                       {address + 16384, 4096},
                                       {address + 8192, 4096},
                                       {address + 12288, 4096}};
    const virtio::Buffer writable[] = {{address + 100, 1}};
    ASSERT_TRUE(frontend->ring(0).add(0, readable, writable));
    (void)frontend->ring(0).publish();
    frontend->kick(0);
    ASSERT_TRUE(backend.eventually([&] { return frontend->ring(0).reap().has_value(); }));
    EXPECT_EQ(data[100], 0);
    EXPECT_EQ(backend.disk->content()[4096], 3);
    EXPECT_EQ(backend.disk->content()[8192], 1);
    EXPECT_EQ(backend.disk->content()[12288], 2);
    EXPECT_EQ(backend.stats().copied_bytes_total, copy_max == 0 ? 0U : 12288U);
  }
}

TEST_P(VhostRequests, BadRequestsAreAnsweredWithAnError) {
  // Each of these would touch bytes beyond the disk, or is none that the device knows.
  VhostBackend backend(1_MiB);
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 1, 64_KiB);
  const struct {
    const char* name;
    uint32_t type;
    uint64_t sector;
    uint32_t bytes;
    BlkStatus expected;
  } rows[] = {
      {"last sector", virtio::kBlkIn, 2047, 512, BlkStatus::Ok},
      {"one past the end", virtio::kBlkIn, 2047, 1024, BlkStatus::IoError},
      {"at the end", virtio::kBlkOut, 2048, 512, BlkStatus::IoError},
      {"sector overflows", virtio::kBlkOut, UINT64_MAX / 512 + 1, 512, BlkStatus::IoError},
      {"largest sector", virtio::kBlkIn, UINT64_MAX, 512, BlkStatus::IoError},
      {"half a sector", virtio::kBlkOut, 0, 256, BlkStatus::IoError},
      {"nothing", virtio::kBlkIn, 0, 0, BlkStatus::Ok},
      {"flush", virtio::kBlkFlushRequest, 0, 0, BlkStatus::Ok},
      {"unknown", 77, 0, 512, BlkStatus::Unsupported},
      {"secure erase", 14, 0, 512, BlkStatus::Unsupported},
      {"largest type", UINT32_MAX, 0, 0, BlkStatus::Unsupported},
      {"discard without a range", virtio::kBlkDiscardRequest, 0, 0, BlkStatus::IoError},
      {"discard of half a range", virtio::kBlkDiscardRequest, 0, 8, BlkStatus::IoError},
      {"too many ranges", virtio::kBlkDiscardRequest, 0, 33 * 16, BlkStatus::IoError},
  };
  for (const auto& row : rows) {
    std::memset(queue.data(0), 0, 64_KiB);
    EXPECT_EQ(status_of(queue.run(row.type, row.sector, row.bytes)), row.expected) << row.name;
  }
}

TEST_P(VhostRequests, DiscardAndWriteZeroes) {
  // A discard with the flag of write zeroes, or a range past the end, must change nothing.
  VhostBackend backend(1_MiB);
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  const auto run = [&](uint32_t type, std::vector<virtio::BlkRange> ranges) {
    Bytes bytes;
    ByteWriter writer(bytes);
    for (const auto& range : ranges) writer.le64(range.sector).le32(range.sectors).le32(range.flags);
    std::copy(bytes.begin(), bytes.end(), queue.data(0));
    return status_of(queue.run(type, 0, static_cast<uint32_t>(bytes.size())));
  };
  std::memset(backend.disk->content(), 1, 1_MiB);
  EXPECT_EQ(run(virtio::kBlkDiscardRequest, {{0, 8, 1}}), BlkStatus::Unsupported);
  EXPECT_EQ(run(virtio::kBlkWriteZeroesRequest, {{0, 8, 2}}), BlkStatus::Unsupported);
  EXPECT_EQ(run(virtio::kBlkWriteZeroesRequest, {{0, 8, 0}, {2047, 2, 0}}), BlkStatus::IoError);
  EXPECT_EQ(run(virtio::kBlkDiscardRequest, {{UINT64_MAX, 1, 0}}), BlkStatus::IoError);
  EXPECT_EQ(backend.disk->submitted, 0U) << "all ranges are checked before the first is carried out";
  EXPECT_EQ(run(virtio::kBlkWriteZeroesRequest, {{8, 8, 0}, {32, 1, 1}}), BlkStatus::Ok);
  EXPECT_EQ(run(virtio::kBlkDiscardRequest, {{64, 8, 0}}), BlkStatus::Ok);
  const auto seen = backend.disk->seen();
  ASSERT_EQ(seen.size(), 3U);
  EXPECT_FALSE(seen[0].may_unmap);
  EXPECT_TRUE(seen[1].may_unmap);
  EXPECT_TRUE(seen[2].may_unmap);
  EXPECT_EQ(seen[1].range, (ByteRange{32 * 512, 512}));
  EXPECT_EQ(backend.disk->content()[8 * 512], 0);
  EXPECT_EQ(backend.disk->content()[16 * 512], 1);
}

TEST_P(VhostRequests, GetIdGivesTheVolumesName) {
  VhostBackend backend;
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  std::memset(queue.data(0), 0xaa, 64);
  ASSERT_EQ(status_of(queue.run(virtio::kBlkGetId, 0, 20)), BlkStatus::Ok);
  EXPECT_STREQ(reinterpret_cast<const char*>(queue.data(0)), "test-volume");
  EXPECT_EQ(queue.data(0)[20], 0xaa);
  std::memset(queue.data(0), 0xaa, 64);
  ASSERT_EQ(status_of(queue.run(virtio::kBlkGetId, 0, 4)), BlkStatus::Ok) << "a short buffer gets what fits";
  EXPECT_EQ(std::memcmp(queue.data(0), "test\xaa", 5), 0);
}

TEST_P(VhostRequests, WritesAreDurableWithoutFlushOrWithTheCacheOff) {
  // A guest that cannot flush believes every answered write to be on the disk (I3).
  VhostBackend backend;
  {
    perf::FrontendOptions options;
    options.features_refused = virtio::kBlkFlush;
    auto frontend = connected(backend, options);
    BlkQueue queue(*frontend, 0, 1, 4096);
    ASSERT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 4096)), BlkStatus::Ok);
    EXPECT_TRUE(backend.disk->seen().back().fua);
  }
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  ASSERT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 4096)), BlkStatus::Ok);
  EXPECT_FALSE(backend.disk->seen().back().fua);
  const vhost::ConfigAccess off{virtio::kBlkConfigWriteback, 1, 0, {0}};
  ASSERT_TRUE(frontend->order(vhost::Request::SetConfig, off));
  ASSERT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 4096)), BlkStatus::Ok);
  EXPECT_TRUE(backend.disk->seen().back().fua);
  ASSERT_TRUE(frontend->read_config());
  EXPECT_FALSE(frontend->config().writeback);
  const vhost::ConfigAccess capacity{0, 8, 0, Bytes(8)};
  EXPECT_FALSE(frontend->order(vhost::Request::SetConfig, capacity)) << "a guest cannot change its disk's size";
}

TEST_P(VhostRequests, AReadOnlyDiskIsNotWritten) {
  VhostBackend backend(8_MiB, {.read_only = true});
  auto frontend = connected(backend);
  EXPECT_NE(frontend->features() & virtio::kBlkReadOnly, 0U);
  EXPECT_EQ(frontend->features() & virtio::kBlkDiscard, 0U);
  BlkQueue queue(*frontend, 0, 1, 4096);
  EXPECT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 4096)), BlkStatus::IoError);
  EXPECT_EQ(status_of(queue.run(virtio::kBlkIn, 0, 4096)), BlkStatus::Ok);
  std::memset(queue.data(0), 0, 16);
  queue.data(0)[8] = 1;
  EXPECT_EQ(status_of(queue.run(virtio::kBlkDiscardRequest, 0, 16)), BlkStatus::IoError);
  EXPECT_EQ(backend.disk->submitted, 1U);
}

TEST_P(VhostRequests, AFailingDiskIsAnErrorInTheGuestAndNothingElse) {
  VhostBackend backend;
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  for (const Errno error : {EIO, ENOSPC, EPERM, EINVAL}) {
    backend.disk->error = error;
    EXPECT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 4096)), BlkStatus::IoError) << error;
  }
  backend.disk->error = 0;
  EXPECT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 4096)), BlkStatus::Ok);
  EXPECT_EQ(backend.stats().errors_total, 4U);
}

TEST_P(VhostRequests, WhatTheDeviceWritesIsInTheDirtyLog) {
  // Without data, status byte or ring in the log the guest finds old bytes after a migration. Twice, because a log
  // that is switched on only once is a migration that works only once.
  VhostBackend backend;
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 2, 64_KiB);
  for (int migration = 0; migration < 2; ++migration) {
    ASSERT_TRUE(frontend->set_logging(true));
    const auto logged = [&](uint64_t address) { return frontend->is_logged(address); };
    frontend->clear_log();
    ASSERT_EQ(status_of(queue.run(virtio::kBlkIn, 0, 8192)), BlkStatus::Ok);
    EXPECT_TRUE(logged(queue.data_address(0)));
    EXPECT_TRUE(logged(queue.data_address(0) + 4096));
    EXPECT_FALSE(logged(queue.data_address(0) + 8192));
    EXPECT_TRUE(logged(queue.status_address(0)));
    EXPECT_TRUE(logged(perf::Frontend::kGuestBase)) << "the ring";
    frontend->clear_log();
    ASSERT_EQ(status_of(queue.run(virtio::kBlkOut, 0, 8192)), BlkStatus::Ok);
    EXPECT_FALSE(logged(queue.data_address(0))) << "the device only read it";
    EXPECT_TRUE(logged(queue.status_address(0)));
    ASSERT_TRUE(frontend->set_logging(false));
    frontend->clear_log();
    ASSERT_EQ(status_of(queue.run(virtio::kBlkIn, 0, 8192)), BlkStatus::Ok);
    EXPECT_FALSE(logged(queue.data_address(0))) << "no migration runs";
  }
}

TEST_P(VhostRequests, AReadThatWasInFlightWhenLoggingBeganIsLogged) {
  // QEMU copies all memory once after it switched logging on; what arrives later has to be in the log.
  VhostBackend backend;
  auto frontend = connected(backend);
  BlkQueue queue(*frontend, 0, 2, 4096);
  backend.disk->hold = true;
  ASSERT_TRUE(queue.add(0, virtio::kBlkIn, 0, 4096));
  queue.flush();
  ASSERT_TRUE(backend.eventually([&] { return backend.disk->submitted == 1; }));
  ASSERT_TRUE(frontend->set_logging(true));
  frontend->clear_log();
  backend.run([&] { backend.disk->release(); });
  ASSERT_TRUE(backend.eventually([&] { return queue.reap().has_value(); }));
  EXPECT_TRUE(frontend->is_logged(queue.data_address(0)));
}

}  // namespace
}  // namespace vmferry
