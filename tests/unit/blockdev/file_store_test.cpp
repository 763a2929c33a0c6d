// SPDX-License-Identifier: Apache-2.0
#include "blockdev/file_store.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "tests/unit/blockdev/file_store_fixture.h"

namespace vmferry {
namespace {

struct Variant {
  const char* name;
  CacheMode cache;
  AioKind aio;
};

class FileStoreTest : public FileStoreFixture, public testing::WithParamInterface<Variant> {
 protected:
  FileStoreOptions options(std::optional<uint64_t> size = {}) const {
    return {.create_size = size, .cache = GetParam().cache, .aio = GetParam().aio};
  }
};

INSTANTIATE_TEST_SUITE_P(All, FileStoreTest,
                         testing::Values(Variant{"writeback_io_uring", CacheMode::Writeback, AioKind::IoUring},
                                         Variant{"writeback_libaio", CacheMode::Writeback, AioKind::LibAio},
                                         Variant{"none_io_uring", CacheMode::None, AioKind::IoUring},
                                         Variant{"none_libaio", CacheMode::None, AioKind::LibAio}),
                         [](const auto& info) { return info.param.name; });

// A fallback that goes unnoticed would make the tests of io_uring test libaio.
TEST_P(FileStoreTest, UsesTheBackendAskedFor) {
  open(options(1_MiB));
  EXPECT_EQ(store->aio_name(), to_string(GetParam().aio));
  EXPECT_TRUE(store->created());
}

// Alignment, bounce buffers, edges, the partial last block, concurrency: one mistake is silent corruption.
TEST_P(FileStoreTest, RandomConcurrentOperationsMatchAModel) {
  constexpr uint64_t kSize = 4_MiB + 1234;
  constexpr size_t kSlots = 8;
  open(options(kSize));
  Bytes model(kSize, 0);
  Random random(20);
  // Slots work at the same time on interleaved stripes of 1000 bytes, so that they share blocks but no bytes.
  struct Slot final : BlockCompletion {
    BlockRequest request;
    Bytes buffer;
    bool busy = false;
    Errno error = 0;
    void block_done(BlockRequest&, Errno result) noexcept override {
      error = result;
      busy = false;
    }
  };
  constexpr uint64_t kStripe = 1000;
  std::vector<Slot> slots(kSlots);
  for (int round = 0; round < 400; ++round) {
    for (Slot& slot : slots) {
      const auto index = static_cast<uint64_t>(&slot - slots.data());
      // Every eighth round the slots have long ranges, far apart.
      const bool wide = round % 8 == 0;
      const uint64_t region = wide ? kSize / kSlots : kStripe;
      const uint64_t base =
          wide ? index * region : (random.below(kSize / (kStripe * kSlots)) * kSlots + index) * kStripe;
      const uint64_t start = random.chance(1, 4) ? 0 : random.below(region);
      uint64_t length = 1 + random.below(region - start);
      uint64_t offset = base + start;
      if (wide && index == kSlots - 1 && random.chance(1, 2)) length = kSize - offset;
      if (random.chance(1, 3) && length > 8192) {
        offset = round_up(offset, 4096);
        length = std::min(round_down(length, 4096), round_down(base + region - offset, 4096));
        if (length == 0) continue;
      }
      const bool aligned_memory = random.chance(1, 2);
      slot.buffer.assign(length + 8192, 0);
      uint8_t* data = slot.buffer.data();
      if (aligned_memory) data += round_up(reinterpret_cast<uintptr_t>(data), 4096) - reinterpret_cast<uintptr_t>(data);
      slot.request = {.range = {offset, length}, .data = data, .completion = &slot};
      switch (random.below(4)) {
        case 0:
          slot.request.op = BlockOp::Read;
          break;
        case 1:
          slot.request.op = BlockOp::WriteZeroes;
          slot.request.may_unmap = random.chance(1, 2);
          slot.request.fua = random.chance(1, 8);
          std::fill_n(model.begin() + static_cast<ptrdiff_t>(offset), length, uint8_t{0});
          break;
        default: {
          slot.request.op = BlockOp::Write;
          slot.request.fua = random.chance(1, 16);
          const Bytes bytes = pattern(length, random.next());
          std::copy(bytes.begin(), bytes.end(), data);
          std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<ptrdiff_t>(offset));
        }
      }
      slot.busy = true;
      store->submit(slot.request);
    }
    ASSERT_TRUE(reactor->run_until([&] { return store->in_flight() == 0; }, 30 * kSecond));
    for (Slot& slot : slots) {
      ASSERT_EQ(slot.error, 0);
      if (slot.request.op != BlockOp::Read || slot.request.completion == nullptr) continue;
      ASSERT_EQ(memcmp(slot.request.data, model.data() + slot.request.range.offset, slot.request.range.length), 0)
          << "round " << round;
      slot.request.completion = nullptr;
    }
  }
  EXPECT_EQ(flush(), 0);
  EXPECT_TRUE(content(0, kSize) == model);
  open(options());
  EXPECT_EQ(store->size(), kSize) << "padding of the last block must not grow the file";
  EXPECT_TRUE(content(0, kSize) == model);
}

// Two read-modify-writes of one block at once: the later would write back the old bytes of the earlier.
TEST_P(FileStoreTest, NeighboursInOneBlockDoNotOverwriteEachOther) {
  open(options(64_KiB));
  DoneCounter counter;
  Bytes bytes(4096);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(1 + i % 255);
  std::vector<BlockRequest> requests;
  for (uint64_t i = 0; i < 512; ++i)
    requests.push_back(
        {.op = BlockOp::Write, .range = {8192 + i * 8, 8}, .data = bytes.data() + i * 8, .completion = &counter});
  for (BlockRequest& request : requests) store->submit(request);
  ASSERT_TRUE(reactor->run_until([&] { return counter.done == 512U; }, 10 * kSecond));
  EXPECT_TRUE(content(8192, 4096) == bytes);
}

// The last partial block goes through the page cache, whose page also holds the whole blocks before it: taken from the
// disk while one of these is being written past the cache, it would bring back their old bytes.
TEST_P(FileStoreTest, TheLastPartialBlockDoesNotUndoItsNeighbours) {
  constexpr uint64_t kStart = 64_KiB;
  constexpr uint64_t kEnd = kStart + 5 * 512 + 77;
  open(options(kEnd));
  DoneCounter counter;
  for (int round = 0; round < 300; ++round) {
    Bytes bytes(kEnd - kStart, static_cast<uint8_t>(round + 1));
    std::vector<BlockRequest> requests;
    for (uint64_t at = 0; at < bytes.size(); at += 512)
      requests.push_back({.op = BlockOp::Write,
                          .range = {kStart + at, std::min<uint64_t>(512, bytes.size() - at)},
                          .data = bytes.data() + at,
                          .completion = &counter});
    if (round % 2 == 0) std::swap(requests.front(), requests.back());
    counter.done = 0;
    for (BlockRequest& request : requests) store->submit(request);
    ASSERT_TRUE(reactor->run_until([&] { return counter.done == requests.size(); }, 10 * kSecond));
    if (round % 4 == 0) {
      ASSERT_EQ(flush(), 0);
    }
    ASSERT_TRUE(content(kStart, bytes.size()) == bytes) << round;
  }
}

// More unaligned requests than bounce buffers: they must queue, not deadlock and not allocate without bound.
TEST_P(FileStoreTest, ManyUnalignedRequestsAtOnceAllFinish) {
  open(options(64_MiB));
  DoneCounter counter;
  const Bytes bytes = pattern(700'000, 3);
  std::vector<BlockRequest> requests;
  for (uint64_t i = 0; i < 60; ++i)
    requests.push_back({.op = BlockOp::Write,
                        .range = {i * 1'000'001, bytes.size()},
                        .data = const_cast<uint8_t*>(bytes.data()),
                        .completion = &counter});
  for (BlockRequest& request : requests) store->submit(request);
  ASSERT_TRUE(reactor->run_until([&] { return counter.done == 60; }, 60 * kSecond));
  for (uint64_t i = 0; i < 60; i += 7) EXPECT_TRUE(content(i * 1'000'001, bytes.size()) == bytes) << i;
}

// A discard that frees nothing fills the host's disk; one that leaves old bytes shows a guest its deleted files.
TEST_P(FileStoreTest, WriteZeroesPunchesWithUnmapAndKeepsSpaceWithout) {
  open(options(8_MiB));
  ASSERT_EQ(write(0, pattern(8_MiB, 1)), 0);
  ASSERT_EQ(flush(), 0);
  ASSERT_TRUE(store->limits().can_punch);
  const uint64_t full = allocated_bytes();
  ASSERT_GE(full, 8_MiB);
  ASSERT_EQ(wait({.op = BlockOp::WriteZeroes, .range = {4_MiB, 1_MiB}}), 0);
  EXPECT_GE(allocated_bytes() + 64_KiB, full) << "without may_unmap the space stays reserved";
  ASSERT_EQ(wait({.op = BlockOp::WriteZeroes, .fua = true, .may_unmap = true, .range = {100, 2_MiB}}), 0);
  EXPECT_LE(allocated_bytes(), full - 1_MiB);
  const Bytes before = pattern(8_MiB, 1);
  const Bytes now = content(0, 8_MiB);
  for (uint64_t i = 0; i < 8_MiB; ++i) {
    const bool zero = (i >= 100 && i < 100 + 2_MiB) || (i >= 4_MiB && i < 5_MiB);
    ASSERT_EQ(now[i], zero ? 0 : before[i]) << i;
  }
}

TEST_P(FileStoreTest, ExtentsShowHolesInOrderAndWithoutGaps) {
  open(options(4_MiB));
  ASSERT_EQ(write(1_MiB, pattern(64_KiB, 1)), 0);
  ASSERT_EQ(write(3_MiB, pattern(64_KiB, 2)), 0);
  ASSERT_EQ(flush(), 0);
  auto all = extents({0, 4_MiB});
  ASSERT_TRUE(all.has_value());
  ASSERT_EQ(all->size(), 5U);
  uint64_t position = 0;
  for (size_t i = 0; i < all->size(); ++i) {
    EXPECT_EQ((*all)[i].range.offset, position);
    EXPECT_EQ((*all)[i].hole, i % 2 == 0);
    EXPECT_EQ((*all)[i].zero, i % 2 == 0);
    position = (*all)[i].range.end();
  }
  EXPECT_EQ(position, 4_MiB);
  EXPECT_EQ((*all)[1].range, (ByteRange{1_MiB, 64_KiB}));
  EXPECT_EQ(extents({0, 4_MiB}, 2)->size(), 2U);
  const auto inside = extents({1_MiB + 5, 10});
  ASSERT_EQ(inside->size(), 1U);
  EXPECT_EQ((*inside)[0].range, (ByteRange{1_MiB + 5, 10}));
  EXPECT_FALSE((*inside)[0].hole);
}

// A guest that reads zeroes where its data was takes them for its data.
TEST_P(FileStoreTest, FileThatShrankGivesEioNeverZeroes) {
  open(options(1_MiB));
  const Bytes bytes = pattern(1_MiB, 5);
  ASSERT_EQ(write(0, bytes), 0);
  ASSERT_EQ(flush(), 0);
  ASSERT_EQ(truncate(file().c_str(), 300'000), 0);
  Bytes buffer(1000);
  EXPECT_EQ(read(299'000, buffer), 0) << "what is still there can be read";
  EXPECT_TRUE(std::equal(buffer.begin(), buffer.end(), bytes.begin() + 299'000));
  EXPECT_EQ(read(299'500, buffer), EIO);
  EXPECT_EQ(read(500'000, buffer), EIO);
  Bytes whole(1_MiB);
  EXPECT_EQ(read(0, whole), EIO);
  EXPECT_EQ(write(600'000, buffer), EIO) << "would make the file grow with zeroes that nobody wrote";
  EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .may_unmap = true, .range = {600'000, 4096}}), EIO);
  EXPECT_FALSE(extents({0, 1_MiB}).has_value()) << "a hole there would be copied as zeroes";
  ASSERT_EQ(truncate(file().c_str(), 1_MiB), 0);
  EXPECT_EQ(read(500'000, buffer), EIO) << "grown again it holds zeroes: not trusted until opened again";
  const auto about_size = std::count_if(log_lines.begin(), log_lines.end(),
                                        [](const std::string& line) { return line.find("shorter") != line.npos; });
  EXPECT_EQ(about_size, 1) << "one line, not one per request";
}

TEST_P(FileStoreTest, WriteBehindAShrunkEndIsRefusedEvenIfNoReadNoticed) {
  open(options(1_MiB));
  ASSERT_EQ(truncate(file().c_str(), 4096), 0);
  EXPECT_EQ(write(500'000, pattern(4096, 1)), EIO);
  EXPECT_EQ(std::filesystem::file_size(file()), 4096U);
}

// RLIMIT_FSIZE makes the kernel cut a write short and then fail it (SIGXFSZ blocked): short writes must continue.
TEST_P(FileStoreTest, FailureInTheMiddleOfAWriteIsReported) {
  open(options(1_MiB));
  signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit tight = before;
  tight.rlim_cur = 512_KiB;
  setrlimit(RLIMIT_FSIZE, &tight);
  const Errno crossing = write(400'000, pattern(400'000, 1));
  const Errno below = write(0, pattern(100'000, 2));
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(crossing, EFBIG);
  EXPECT_EQ(below, 0) << "service continues";
  EXPECT_FALSE(log_lines.empty());
}

// The name of a staging area comes from a peer, and a copy in the state folder may have been put there by anybody: what
// a link leads to is neither served nor made nor changed.
TEST_P(FileStoreTest, InAFolderNoLinkIsFollowed) {
  std::filesystem::create_directory(folder + "/groups");
  auto groups = Folder::open(folder + "/groups");
  ASSERT_TRUE(groups.has_value());
  FileStoreOptions in_folder = options(1_MiB);
  in_folder.folder = &*groups;
  std::filesystem::create_symlink(folder + "/made", folder + "/groups/dangling");
  open(options(1_MiB));
  ASSERT_EQ(write(0, pattern(4096, 1)), 0);
  store.reset();
  std::filesystem::create_symlink(file(), folder + "/groups/link");
  for (const char* name : {"link", "dangling", "../disk", "../made"}) {
    const auto opened = FileStore::open(*reactor, name, in_folder);
    ASSERT_FALSE(opened.has_value()) << name;
    EXPECT_NE(opened.error().text.find(folder + "/groups/" + name), std::string::npos) << opened.error().text;
    const bool leads_out = std::string_view(name).starts_with("..");
    const char* const reason = leads_out ? "out of its folder" : "symbolic link";
    EXPECT_NE(opened.error().text.find(reason), std::string::npos) << opened.error().text;
  }
  EXPECT_FALSE(std::filesystem::exists(folder + "/made"));
  open(options(1_MiB));
  EXPECT_TRUE(content(0, 4096) == pattern(4096, 1));
  store.reset();

  auto own = FileStore::open(*reactor, "own", in_folder);
  ASSERT_TRUE(own.has_value()) << own.error().text;
  EXPECT_TRUE((*own)->created());
  store = std::move(*own);
  EXPECT_EQ(write(8192, pattern(4096, 2)), 0);
  EXPECT_TRUE(content(8192, 4096) == pattern(4096, 2));
  EXPECT_EQ(std::filesystem::file_size(folder + "/groups/own"), 1_MiB);
}

TEST_P(FileStoreTest, SecondOpenIsRefusedByName) {
  open(options(1_MiB));
  auto second = FileStore::open(*reactor, file(), options());
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().kind, ErrorKind::Busy);
  EXPECT_NE(second.error().text.find(file()), std::string::npos);
  store.reset();
  EXPECT_TRUE(FileStore::open(*reactor, file(), options()).has_value()) << "the lock goes with the store";
}

// The requests of a killed daemon end some time after the daemon, and the one started in its place met their lock.
TEST_P(FileStoreTest, TheStartOutlastsTheLockOfAnEndingProcess) {
  open(options(1_MiB));
  store.reset();
  int ready[2];
  int leave[2];
  ASSERT_EQ(pipe(ready), 0);
  ASSERT_EQ(pipe(leave), 0);
  const pid_t other = fork();
  if (other == 0) {
    struct flock lock {};
    lock.l_type = F_WRLCK;  // the whole file
    const int fd = ::open(file().c_str(), O_RDWR);
    char byte = ::fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 1 : 0;
    if (::write(ready[1], &byte, 1) != 1 || ::read(leave[0], &byte, 1) != 1) _exit(1);
    usleep(200'000);
    _exit(0);
  }
  char held = 0;
  ASSERT_EQ(::read(ready[0], &held, 1), 1);
  ASSERT_EQ(held, 1);
  FileStoreOptions patient = options();
  EXPECT_EQ(FileStore::open(*reactor, file(), patient).error().kind, ErrorKind::Busy);
  patient.lock_wait = 10 * kSecond;
  ASSERT_EQ(::write(leave[1], "x", 1), 1);
  EXPECT_TRUE(FileStore::open(*reactor, file(), patient).has_value());
  waitpid(other, nullptr, 0);
  for (const int fd : {ready[0], ready[1], leave[0], leave[1]}) close(fd);
}

TEST_P(FileStoreTest, ReadOnlyRefusesMutations) {
  open(options(64_KiB));
  ASSERT_EQ(write(0, pattern(4096, 1)), 0);
  FileStoreOptions read_only = options();
  read_only.read_only = true;
  open(read_only);
  EXPECT_EQ(write(0, pattern(4096, 2)), EPERM);
  EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .range = {0, 4096}}), EPERM);
  EXPECT_EQ(flush(), 0);
  EXPECT_TRUE(content(0, 4096) == pattern(4096, 1));
}

TEST_P(FileStoreTest, ResizeGrowsAndKeepsContent) {
  open(options(100'000));
  const Bytes bytes = pattern(100'000, 9);
  ASSERT_EQ(write(0, bytes), 0);
  std::optional<Status> status;
  store->resize(1_MiB, [&](Status result) { status = result; });
  ASSERT_TRUE(reactor->run_until([&] { return status.has_value(); }, 5 * kSecond));
  ASSERT_TRUE(status->has_value());
  EXPECT_EQ(store->size(), 1_MiB);
  EXPECT_TRUE(content(0, 100'000) == bytes);
  EXPECT_TRUE(content(100'000, 100'000) == Bytes(100'000, 0));
  EXPECT_EQ(write(1_MiB - 1, Bytes{7}), 0);
  status.reset();
  store->resize(4096, [&](Status result) { status = result; });
  ASSERT_TRUE(reactor->run_until([&] { return status.has_value(); }, 5 * kSecond));
  EXPECT_FALSE(status->has_value()) << "a volume never shrinks";
  EXPECT_EQ(store->size(), 1_MiB);
}

// The clean-shutdown record compares this: it must change with the content, and stay without.
TEST_P(FileStoreTest, IdentityChangesWithWritesOnly) {
  open(options(64_KiB));
  ASSERT_EQ(write(0, pattern(4096, 1)), 0);
  ASSERT_EQ(flush(), 0);
  const StoreIdentity first = *store->identity();
  content(0, 4096);
  EXPECT_EQ(*store->identity(), first);
  open(options());
  EXPECT_EQ(*store->identity(), first);
  usleep(20'000);  // granularity of the kernel's time stamps
  ASSERT_EQ(write(0, pattern(4096, 2)), 0);
  ASSERT_EQ(flush(), 0);
  EXPECT_NE(*store->identity(), first);
}

TEST_P(FileStoreTest, OpenRefusesWhatItCannotServe) {
  const auto kind = [&](const std::string& path, std::optional<uint64_t> size) {
    auto opened = FileStore::open(*reactor, path, options(size));
    EXPECT_FALSE(opened.has_value());
    return opened ? ErrorKind::Internal : opened.error().kind;
  };
  EXPECT_EQ(kind(folder + "/none", {}), ErrorKind::NotFound);
  EXPECT_EQ(kind(folder, {}), ErrorKind::InvalidArgument);
  ASSERT_EQ(mkfifo((folder + "/fifo").c_str(), 0600), 0);
  EXPECT_EQ(kind(folder + "/fifo", {}), ErrorKind::InvalidArgument);
  std::ofstream(folder + "/empty").flush();
  EXPECT_EQ(kind(folder + "/empty", {}), ErrorKind::InvalidArgument);
  std::ofstream(folder + "/other") << "12345";
  EXPECT_EQ(kind(folder + "/other", 1_MiB), ErrorKind::Mismatch);
  EXPECT_EQ(kind(folder + "/no/such/folder", 1_MiB), ErrorKind::Denied);
}

// The file system fills up behind a sparse file: the guest gets ENOSPC, space that is freed later is used again.
TEST_P(FileStoreTest, FullFileSystemGivesEnospcAndRecovers) {
  const std::string mount_point = folder + "/small";
  ASSERT_EQ(mkdir(mount_point.c_str(), 0700), 0);
  ASSERT_EQ(mount("tmpfs", mount_point.c_str(), "tmpfs", 0, "size=1m"), 0) << "run as root";
  {
    auto opened = FileStore::open(*reactor, mount_point + "/disk", options(8_MiB));
    ASSERT_TRUE(opened.has_value()) << opened.error().text;
    store = std::move(*opened);
    EXPECT_EQ(write(0, pattern(512_KiB, 1)), 0);
    EXPECT_EQ(write(1_MiB, pattern(2_MiB, 2)), ENOSPC);
    EXPECT_TRUE(content(0, 512_KiB) == pattern(512_KiB, 1));
    EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .may_unmap = true, .range = {1_MiB, 3_MiB}}), 0);
    EXPECT_EQ(write(5_MiB, pattern(256_KiB, 3)), 0);
    EXPECT_TRUE(content(5_MiB, 256_KiB) == pattern(256_KiB, 3));
    store.reset();
  }
  umount(mount_point.c_str());
  EXPECT_FALSE(log_lines.empty());
}

// On a block device fallocate takes whole sectors only, and the edges of a discard must still become zeroes.
TEST_P(FileStoreTest, BlockDeviceZeroesExactlyTheRange) {
  const std::string image = folder + "/image";
  { std::ofstream(image).flush(); }
  ASSERT_EQ(truncate(image.c_str(), 4_MiB), 0);
  const std::string command = "losetup --find --show " + image;
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  char device[64] = {};
  const bool got = fgets(device, sizeof device, pipe) != nullptr;
  ASSERT_EQ(pclose(pipe), 0);
  ASSERT_TRUE(got);
  device[strcspn(device, "\n")] = 0;
  {
    auto opened = FileStore::open(*reactor, device, options());
    EXPECT_TRUE(opened.has_value()) << opened.error().text;
    if (opened) {
      store = std::move(*opened);
      EXPECT_EQ(store->size(), 4_MiB);
      const Bytes bytes = pattern(4_MiB, 1);
      EXPECT_EQ(write(0, bytes), 0);
      EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .may_unmap = true, .range = {1000, 100'000}}), 0);
      EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .range = {2_MiB + 1, 100}}), 0);
      EXPECT_EQ(wait({.op = BlockOp::WriteZeroes, .fast_only = true, .range = {3_MiB, 4096}}), ENOTSUP);
      EXPECT_EQ(flush(), 0);
      Bytes expected = bytes;
      std::fill_n(expected.begin() + 1000, 100'000, uint8_t{0});
      std::fill_n(expected.begin() + 2_MiB + 1, 100, uint8_t{0});
      EXPECT_TRUE(content(0, 4_MiB) == expected);
      EXPECT_EQ(extents({0, 4_MiB})->size(), 1U);
      EXPECT_EQ(FileStore::open(*reactor, device, options()).error().kind, ErrorKind::Busy);
    }
    store.reset();
  }
  EXPECT_EQ(system((std::string("losetup --detach ") + device).c_str()), 0);
}

}  // namespace
}  // namespace vmferry
