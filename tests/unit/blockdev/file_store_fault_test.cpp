// SPDX-License-Identifier: Apache-2.0
//
// FileStore over a backend that cuts transfers short and fails on command.
#include <fcntl.h>
#include <sys/uio.h>

#include "tests/unit/blockdev/file_store_fixture.h"

namespace vmferry {
namespace {

class FaultyBackend final : public IoBackend {
 public:
  struct Plan {
    uint64_t piece_max = UINT64_MAX;  // transfers at most this much at once
    Errno read_error = 0, write_error = 0, sync_error = 0, allocate_error = 0;
    int allocations = 0, syncs = 0;
    std::vector<int> write_flags{};  // of every write so far
    bool fail_after_destroy = false;
  };
  FaultyBackend(Executor& executor, Plan& plan) : executor_(executor), plan_(plan) {}
  std::string_view name() const noexcept override { return "faulty"; }

  void submit(IoRequest& request) noexcept override {
    executor_.post([this, &request] {
      const int64_t result = run(request);
      request.completion->io_done(request, result);
    });
  }

 private:
  int64_t run(IoRequest& request) {
    const size_t length = std::min(request.length, plan_.piece_max);
    const auto offset = static_cast<off_t>(request.offset);
    switch (request.kind) {
      case IoKind::Read:
        return plan_.read_error != 0 ? -plan_.read_error : outcome(pread(request.fd, request.data, length, offset));
      case IoKind::Write:
        plan_.write_flags.push_back(request.flags);
        return plan_.write_error != 0 ? -plan_.write_error : outcome(pwrite(request.fd, request.data, length, offset));
      case IoKind::DataSync:
        ++plan_.syncs;
        return plan_.sync_error != 0 ? -plan_.sync_error : outcome(fdatasync(request.fd));
      case IoKind::Allocate:
        ++plan_.allocations;
        if (plan_.allocate_error != 0) return -plan_.allocate_error;
        return outcome(fallocate(request.fd, request.flags, offset, static_cast<off_t>(request.length)));
    }
    return -EINVAL;
  }
  static int64_t outcome(ssize_t result) { return result < 0 ? -errno : result; }

  Executor& executor_;
  Plan& plan_;
};

class FileStoreFault : public FileStoreFixture, public testing::WithParamInterface<CacheMode> {
 protected:
  void SetUp() override {
    FileStoreFixture::SetUp();
    auto opened = FileStore::open(*reactor, file(), {.create_size = 1_MiB + 77, .cache = GetParam()},
                                  std::make_unique<FaultyBackend>(*reactor, plan));
    ASSERT_TRUE(opened.has_value()) << opened.error().text;
    store = std::move(*opened);
  }
  FaultyBackend::Plan plan;
};
INSTANTIATE_TEST_SUITE_P(Both, FileStoreFault, testing::Values(CacheMode::Writeback, CacheMode::None),
                         [](const auto& info) { return info.param == CacheMode::None ? "none" : "writeback"; });

// A short transfer taken for a whole one is stale data at the end of the buffer.
TEST_P(FileStoreFault, ShortTransfersContinueWhereTheyEnded) {
  for (const uint64_t piece : {uint64_t{512}, uint64_t{4096}, uint64_t{12'288}, uint64_t{100'000}}) {
    plan.piece_max = piece;
    for (const ByteRange range : {ByteRange{0, 64_KiB}, ByteRange{4096, 100'000}, ByteRange{4097, 50'000},
                                  ByteRange{1_MiB - 5000, 5077}, ByteRange{777, 3}}) {
      if (GetParam() == CacheMode::None && piece % store->limits().block_size_min != 0) continue;
      const Bytes bytes = pattern(range.length, range.offset + piece);
      ASSERT_EQ(write(range.offset, bytes), 0) << range.offset;
      ASSERT_TRUE(content(range.offset, range.length) == bytes) << range.offset << " piece " << piece;
    }
  }
}

TEST_P(FileStoreFault, ErrorsReachTheSubmitterAndTheLogOnce) {
  Bytes buffer(4096);
  plan.read_error = EIO;
  for (int i = 0; i < 50; ++i) EXPECT_EQ(read(0, buffer), EIO);
  EXPECT_EQ(read(5, buffer), EIO);
  plan.read_error = 0;
  plan.write_error = ENOSPC;
  EXPECT_EQ(write(0, buffer), ENOSPC);
  EXPECT_EQ(write(3, Bytes(10)), ENOSPC);
  EXPECT_EQ(log_lines.size(), 1U);
  plan.write_error = 0;
  EXPECT_EQ(write(0, buffer), 0) << "locks and buffers of failed requests were given back";
  EXPECT_EQ(write(3, Bytes(10)), 0);
}

// The kernel tells about a lost page once. A flush that then succeeds would promise what is not on the disk.
TEST_P(FileStoreFault, FailedFlushIsNeverFollowedByASuccessfulOne) {
  plan.sync_error = EIO;
  EXPECT_EQ(flush(), EIO);
  plan.sync_error = 0;
  EXPECT_EQ(flush(), EIO);
  EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .fua = true, .range = {0, 4096}}), EIO);
}

// A FUA write syncs as well, and its error may be that of an earlier write which the kernel lost: told once, to this
// one. A full disk is an error of this write alone, which the guest repeats when there is space again.
TEST_P(FileStoreFault, ALostWriteReportedToAFuaWriteFailsLaterFlushesToo) {
  const auto fua = [&] {
    Bytes data(4096, 7);
    return wait({.op = BlockOp::Write, .fua = true, .range = {0, 4096}, .data = data.data()});
  };
  plan.write_error = ENOSPC;
  EXPECT_EQ(fua(), ENOSPC);
  plan.write_error = 0;
  EXPECT_EQ(flush(), 0);
  plan.write_error = EIO;
  EXPECT_EQ(fua(), EIO);
  plan.write_error = 0;
  // Without the page cache there is nothing that could have been lost before.
  EXPECT_EQ(flush(), GetParam() == CacheMode::Writeback ? EIO : 0);
}

// The guest has the reply to a FUA write and its machine loses power: the data is there, because every piece of the
// write asked for that. And no other write pays for it.
TEST_P(FileStoreFault, FuaAndNothingElseIsWrittenThrough) {
  struct Row {
    const char* name;
    uint64_t piece_max;
    ByteRange range;
  };
  for (const Row& row : {Row{"aligned", UINT64_MAX, {4096, 8192}}, Row{"in pieces", 4096, {0, 16'384}},
                         Row{"unaligned", UINT64_MAX, {4097, 9000}}, Row{"last partial block", UINT64_MAX, {1_MiB, 77}},
                         Row{"across the end of whole blocks", UINT64_MAX, {1_MiB - 5000, 5077}}}) {
    for (const bool fua : {true, false}) {
      SCOPED_TRACE(fmt::format("{} fua={}", row.name, fua));
      plan.piece_max = row.piece_max;
      plan.write_flags.clear();
      plan.syncs = 0;
      ASSERT_EQ(write(row.range.offset, pattern(row.range.length, 1), fua), 0);
      ASSERT_FALSE(plan.write_flags.empty());
      for (const int flags : plan.write_flags) EXPECT_EQ(flags, fua ? RWF_DSYNC : 0);
      EXPECT_EQ(plan.syncs, 0);
    }
  }
}

// fallocate() has no flag for it, so that zeroes are durable by a sync behind them; written ones by themselves, too.
TEST_P(FileStoreFault, FuaZeroesAreSynced) {
  for (const Errno allocate_error : {0, EOPNOTSUPP}) {
    plan.allocate_error = allocate_error;
    for (const bool fua : {true, false}) {
      SCOPED_TRACE(fmt::format("allocate_error={} fua={}", allocate_error, fua));
      plan.write_flags.clear();
      plan.syncs = 0;
      ASSERT_EQ(write(0, pattern(64_KiB, 1)), 0);
      plan.write_flags.clear();
      ASSERT_EQ(wait({.op = BlockOp::WriteZeroes, .fua = fua, .may_unmap = true, .range = {100, 50'000}}), 0);
      EXPECT_EQ(plan.syncs, fua ? 1 : 0);
      ASSERT_EQ(plan.write_flags.empty(), allocate_error == 0);
      for (const int flags : plan.write_flags) EXPECT_EQ(flags, fua ? RWF_DSYNC : 0);
    }
  }
}

// fast_only promises "nothing changed" with ENOTSUP: the client then writes the zeroes itself, or skips it.
TEST_P(FileStoreFault, FastOnlyFailsCleanlyWhereOnlyWritingWouldHelp) {
  const Bytes bytes = pattern(64_KiB, 1);
  ASSERT_EQ(write(0, bytes), 0);
  plan.allocate_error = EOPNOTSUPP;
  EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .may_unmap = true, .fast_only = true, .range = {0, 64_KiB}}), ENOTSUP);
  EXPECT_TRUE(content(0, 64_KiB) == bytes);
  EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .may_unmap = true, .range = {0, 64_KiB}}), 0);
  EXPECT_TRUE(content(0, 64_KiB) == Bytes(64_KiB, 0)) << "without fast_only the zeroes are written";
  const int tried = plan.allocations;
  EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .may_unmap = true, .range = {5, 600'000}}), 0);
  EXPECT_EQ(plan.allocations, tried) << "remembered: not tried again";
}

TEST_P(FileStoreFault, ZeroLengthWriteResultIsAnErrorNotALoop) {
  plan.piece_max = 0;
  EXPECT_EQ(write(0, Bytes(4096)), EIO);
  EXPECT_EQ(write(1, Bytes(10)), EIO);
}

// The owner often drops the store in the completion of its last request.
TEST_P(FileStoreFault, StoreMayBeDestroyedInsideItsLastCompletion) {
  struct Dropper final : BlockCompletion {
    std::unique_ptr<FileStore>& store;
    explicit Dropper(std::unique_ptr<FileStore>& target) : store(target) {}
    void block_done(BlockRequest&, Errno) noexcept override { store.reset(); }
  } dropper(store);
  BlockRequest request{.op = BlockOp::Flush, .completion = &dropper};
  store->submit(request);
  EXPECT_TRUE(reactor->run_until([&] { return store == nullptr; }, kSecond));
}

}  // namespace
}  // namespace vmferry
