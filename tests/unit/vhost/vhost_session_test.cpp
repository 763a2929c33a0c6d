// SPDX-License-Identifier: Apache-2.0
//
// The life of a connection: stop, restart, reconnect with requests in flight, several queues, resize, hostile fronts.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <future>
#include <set>

#include "tests/unit/vhost/vhost_fixture.h"

namespace vmferry {
namespace {

using perf::BlkQueue;
using vhost::Request;
using virtio::BlkStatus;

class VhostSessionTest : public testing::TestWithParam<virtio::RingOptions> {
 protected:
  perf::FrontendOptions options() const {
    perf::FrontendOptions options;
    options.ring = GetParam();
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(Rings, VhostSessionTest,
                         testing::Values(virtio::RingOptions{false, false, false},
                                         virtio::RingOptions{false, true, true},
                                         virtio::RingOptions{true, false, false},
                                         virtio::RingOptions{true, true, true}),
                         variant_name);

void expect_connected(perf::Frontend& frontend, VhostBackend& backend) {
  const Status status = frontend.connect(backend.dial());
  ASSERT_TRUE(status) << (status ? "" : status.error().text);
}

bool works(BlkQueue& queue) {
  const auto done = queue.run(virtio::kBlkIn, 0, 4096);
  return done && done->status == BlkStatus::Ok;
}

TEST_P(VhostSessionTest, StoppingAQueueWaitsForItsRequests) {
  // QEMU saves the guest's memory after this answer: a request still in flight would write into nothing.
  VhostBackend backend;
  auto frontend = make_frontend(options());
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 4, 4096);
  ASSERT_TRUE(works(queue));
  backend.disk->hold = true;
  const uint64_t before = backend.disk->submitted;
  for (uint16_t i = 0; i < 3; ++i) ASSERT_TRUE(queue.add(i, virtio::kBlkOut, i * 8U, 4096));
  queue.flush();
  ASSERT_TRUE(backend.eventually([&] { return backend.disk->submitted == before + 3; }));
  ASSERT_TRUE(frontend->send(Request::GetVringBase, vhost::VringState{0, 0}));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(queue.reap()) << "not before the disk has answered";
  backend.run([&] { backend.disk->release(); });
  const auto answer = frontend->receive(Request::GetVringBase);
  ASSERT_TRUE(answer);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(queue.reap());
  // A stopped ring takes nothing.
  ASSERT_TRUE(queue.add(0, virtio::kBlkIn, 0, 4096));
  queue.flush();
  queue.kick();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(backend.disk->submitted, before + 3);
  ASSERT_TRUE(frontend->start_queue(0, std::get<vhost::VringState>(*answer).number));
  ASSERT_TRUE(backend.eventually([&] { return queue.reap().has_value(); })) << "seen without another kick";
  ASSERT_TRUE(works(queue));
}

TEST_P(VhostSessionTest, ARestartedBackEndFinishesWhatWasInFlightOnce) {
  // The promise of the in-flight region: the guest sees no error, no request is lost or answered twice.
  VhostBackend backend;
  auto frontend = make_frontend(options());
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 8, 4096);
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(works(queue));
  backend.disk->hold = true;
  const uint64_t before = backend.disk->submitted;
  for (uint16_t i = 0; i < 8; ++i) {
    std::memset(queue.data(i), i + 1, 4096);
    ASSERT_TRUE(queue.add(i, virtio::kBlkOut, i * 8U, 4096));
  }
  queue.flush();
  ASSERT_TRUE(backend.eventually([&] { return backend.disk->submitted == before + 8; }));
  // The daemon ends: the volume refuses what it still holds, and that is no error in the guest.
  backend.disk->error = ESHUTDOWN;
  backend.run([&] { backend.disk->release(); });
  backend.drain();
  EXPECT_FALSE(queue.reap());
  EXPECT_EQ(backend.disk->content()[0], 0);
  backend.disk->error = 0;
  backend.restart();
  expect_connected(*frontend, backend);
  std::set<uint16_t> done;
  ASSERT_TRUE(backend.eventually([&] {
    while (const auto one = queue.reap()) {
      EXPECT_EQ(one->status, BlkStatus::Ok);
      EXPECT_TRUE(done.insert(one->slot).second);
    }
    return done.size() == 8;
  }));
  for (uint16_t i = 0; i < 8; ++i) EXPECT_EQ(backend.disk->content()[i * 4096], i + 1);
  const auto seen = backend.disk->seen();
  for (uint16_t i = 0; i < 8; ++i) EXPECT_EQ(seen[before + 8 + i].range.offset, i * 4096U) << "in their order";
  ASSERT_TRUE(works(queue));
  EXPECT_FALSE(frontend->ring(0).broken());
}

TEST_P(VhostSessionTest, WithoutAnInflightRegionAShutdownIsAnError) {
  // Nobody would ever submit it again: the guest has to know.
  VhostBackend backend;
  perf::FrontendOptions plain = options();
  plain.inflight = false;
  auto frontend = make_frontend(plain);
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  backend.disk->error = ESHUTDOWN;
  const auto done = queue.run(virtio::kBlkOut, 0, 4096);
  ASSERT_TRUE(done);
  EXPECT_EQ(done->status, BlkStatus::IoError);
}

TEST_P(VhostSessionTest, AFrontEndThatReconnectsWaitsForItsOldRequests) {
  // Two sessions on one ring at once would run the same write twice, the second perhaps after a newer one.
  VhostBackend backend;
  auto frontend = make_frontend(options());
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 2, 4096);
  backend.disk->hold = true;
  ASSERT_TRUE(queue.add(0, virtio::kBlkOut, 0, 4096));
  queue.flush();
  ASSERT_TRUE(backend.eventually([&] { return backend.disk->submitted == 1; }));
  frontend->disconnect();
  UniqueFd second = backend.dial();
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  EXPECT_EQ(backend.stats().connections_total, 1U);
  backend.run([&] { backend.disk->release(); });
  const Status status = frontend->connect(std::move(second));
  ASSERT_TRUE(status) << status.error().text;
  ASSERT_TRUE(backend.eventually([&] { return queue.reap().has_value(); }));
  EXPECT_FALSE(queue.reap());
  EXPECT_EQ(backend.disk->submitted, 1U) << "the old session had finished it";
  ASSERT_TRUE(works(queue));
}

TEST_P(VhostSessionTest, QueuesWorkSideBySide) {
  VhostBackend backend;
  perf::FrontendOptions many = options();
  many.queues = 4;
  many.memory_slots = true;
  auto frontend = make_frontend(many);
  expect_connected(*frontend, backend);
  std::vector<std::unique_ptr<BlkQueue>> queues;
  for (uint16_t i = 0; i < 4; ++i)
    queues.push_back(std::make_unique<BlkQueue>(*frontend, i, 2, 4096, i * BlkQueue::memory_needed(2, 4096)));
  for (int round = 0; round < 50; ++round)
    for (auto& queue : queues) ASSERT_TRUE(works(*queue));
  EXPECT_EQ(backend.stats().requests_of_queue, (std::vector<uint64_t>{50, 50, 50, 50}));
  ASSERT_TRUE(frontend->stop_queue(2));
  for (const size_t i : {0U, 1U, 3U}) ASSERT_TRUE(works(*queues[i])) << "one queue stopped, the others go on";
}

TEST_P(VhostSessionTest, ALoadOfManyRequestsIsAnsweredToTheLast) {
  // Lost wake-ups and wrong accounting show only under load.
  VhostBackend backend(8_MiB);
  auto frontend = make_frontend(options());
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 32, 4096);
  uint64_t done = 0;
  uint64_t submitted = 0;
  std::vector<uint16_t> idle;
  for (uint16_t i = 0; i < 32; ++i) idle.push_back(i);
  while (done < 20000) {
    while (!idle.empty() && submitted < 20000) {
      if (!queue.add(idle.back(), submitted % 3 == 0 ? virtio::kBlkOut : virtio::kBlkIn, submitted % 2048 * 8, 4096))
        break;
      idle.pop_back();
      ++submitted;
    }
    queue.flush();
    while (const auto one = queue.reap()) {
      ASSERT_EQ(one->status, BlkStatus::Ok);
      idle.push_back(one->slot);
      ++done;
    }
    if (done < 20000 && (idle.empty() || submitted == 20000)) {
      ASSERT_TRUE(queue.wait(5000)) << done;
    }
  }
  EXPECT_EQ(backend.stats().requests_total, 20000U);
}

TEST_P(VhostSessionTest, ABadChainStopsItsQueueAndNothingElse) {
  // A guest that breaks its ring loses that ring; other guests and this one's other queues do not notice.
  VhostBackend backend;
  perf::FrontendOptions two = options();
  two.queues = 2;
  auto frontend = make_frontend(two);
  expect_connected(*frontend, backend);
  BlkQueue second(*frontend, 1, 1, 4096);
  const virtio::Buffer header{frontend->data_address() + 64_KiB, 16};
  const virtio::Buffer outside{1, 1};
  for (const bool with_status : {false, true}) {
    ASSERT_TRUE(frontend->ring(0).add(with_status ? 1 : 0, std::span(&header, 1),
                                      with_status ? std::span(&outside, 1) : std::span<const virtio::Buffer>{}));
    (void)frontend->ring(0).publish();
    frontend->kick(0);
    ASSERT_TRUE(backend.eventually([&] { return backend.stats().broken_queues_total > 0; }));
  }
  pollfd error{frontend->error_fd(0), POLLIN, 0};
  EXPECT_EQ(::poll(&error, 1, 1000), 1) << "the front-end is told";
  EXPECT_FALSE(frontend->ring(0).reap());
  EXPECT_TRUE(works(second));
  EXPECT_TRUE(frontend->stop_queue(0)) << "and the queue can be stopped and begun anew";
}

TEST_P(VhostSessionTest, AChainTooLongIsAnErrorOfThatRequest) {
  VhostBackend backend(8_MiB, {}, {.segments_max = 4});
  auto frontend = make_frontend(options());
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 1, 64_KiB);
  const auto done = queue.run(virtio::kBlkOut, 0, 5 * 4096, 4096);
  ASSERT_TRUE(done);
  EXPECT_EQ(done->status, BlkStatus::IoError);
  const auto fits = queue.run(virtio::kBlkOut, 0, 4 * 4096, 4096);
  ASSERT_TRUE(fits);
  EXPECT_EQ(fits->status, BlkStatus::Ok);
}

TEST_P(VhostSessionTest, DataOutsideTheMemoryIsAnErrorOfThatRequest) {
  VhostBackend backend;
  auto frontend = make_frontend(options());
  expect_connected(*frontend, backend);
  uint8_t* data = frontend->data();
  const uint64_t address = frontend->data_address();
  const uint64_t end = perf::Frontend::kGuestBase + frontend->memory_bytes();
  std::memset(data, 0, 16);
  for (const virtio::Buffer bad : {virtio::Buffer{end, 512}, virtio::Buffer{end - 256, 512}, virtio::Buffer{0, 512},
                                   virtio::Buffer{UINT64_MAX - 255, 512}, virtio::Buffer{address, 0}}) {
    const virtio::Buffer header{address, 16};
    const virtio::Buffer writable[] = {bad, {address + 100, 1}};
    data[100] = 0xff;
    ASSERT_TRUE(frontend->ring(0).add(0, std::span(&header, 1), writable));
    (void)frontend->ring(0).publish();
    frontend->kick(0);
    ASSERT_TRUE(backend.eventually([&] { return frontend->ring(0).reap().has_value(); }));
    EXPECT_EQ(data[100], 1);
  }
  EXPECT_EQ(backend.disk->submitted, 0U);
  EXPECT_EQ(backend.stats().broken_queues_total, 0U);
}

TEST_P(VhostSessionTest, ANewMemoryTableIsUsedAtOnceAndCheckedAgain) {
  // Addresses that were good with the old table may be nowhere in the new one.
  VhostBackend backend;
  auto frontend = make_frontend(options());
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 2, 4096);
  ASSERT_TRUE(works(queue));
  const int fd = frontend->memory_fd();
  ASSERT_TRUE(frontend->order(Request::SetMemTable, vhost::MemoryTable{{frontend->region()}}, std::span(&fd, 1)));
  ASSERT_TRUE(works(queue));
  // Only the rings are left of the memory: requests fail, the queue goes on as far as it can.
  vhost::MemoryRegion elsewhere = frontend->region();
  elsewhere.guest_address += 1_GiB;
  elsewhere.user_address += 1_GiB;
  EXPECT_FALSE(frontend->order(Request::SetMemTable, vhost::MemoryTable{{elsewhere}}, std::span(&fd, 1)));
  ASSERT_TRUE(queue.add(0, virtio::kBlkIn, 0, 4096));
  queue.flush();
  queue.kick();
  EXPECT_TRUE(backend.eventually([&] { return backend.stats().broken_queues_total == 1; }));
  EXPECT_FALSE(queue.reap()) << "the ring is not in the guest's memory any more";
}

TEST(VhostSession, MemoryTakenAwayEndsTheConnectionNotTheDaemon) {
  // The front-end owns the file: it can cut it while we use it, and a plain access is SIGBUS then.
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  ASSERT_TRUE(works(queue));
  ASSERT_EQ(::ftruncate(frontend->memory_fd(), 0), 0);
  frontend->kick(0);
  // Whatever is looked at next is gone; the back-end has to survive all of it.
  const int fd = ::eventfd(0, EFD_CLOEXEC);
  (void)frontend->send(Request::SetVringKick, vhost::VringFd{0, true}, std::span(&fd, 1));
  (void)frontend->send(Request::GetVringBase, vhost::VringState{0, 0});
  ::close(fd);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  frontend->disconnect();
  ASSERT_TRUE(backend.eventually([&] { return backend.stats().connections == 0; }));
  auto fresh = make_frontend({});
  expect_connected(*fresh, backend);
  BlkQueue again(*fresh, 0, 1, 4096);
  EXPECT_TRUE(works(again));
}

TEST(VhostSession, MemoryThatIsShorterThanItsRegionIsRefused) {
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  const int fd = frontend->memory_fd();
  vhost::MemoryRegion region = frontend->region();
  region.size += 1;
  EXPECT_FALSE(frontend->order(Request::SetMemTable, vhost::MemoryTable{{region}}, std::span(&fd, 1)));
  region = frontend->region();
  region.mmap_offset = 4096;
  EXPECT_FALSE(frontend->order(Request::SetMemTable, vhost::MemoryTable{{region}}, std::span(&fd, 1)));
  EXPECT_FALSE(frontend->order(Request::AddMemReg, frontend->region(), std::span(&fd, 1))) << "overlaps";
  region = frontend->region();
  region.guest_address += 1_GiB;
  EXPECT_FALSE(frontend->order(Request::RemMemReg, region)) << "never added";
  const auto slots = frontend->ask(Request::GetMaxMemSlots);
  ASSERT_TRUE(slots);
  EXPECT_EQ(*slots, vhost::kMemSlotsMax);
}

TEST(VhostSession, NonsenseIsRefusedWithoutHarm) {
  // Each of these with NEED_REPLY gets a refusal and leaves the connection usable.
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  const int fd = frontend->memory_fd();
  const std::span<const int> one(&fd, 1);
  EXPECT_FALSE(frontend->order(Request::SetFeatures, vhost::NumberBody{1ULL << 63}));
  EXPECT_FALSE(frontend->order(Request::SetFeatures, vhost::NumberBody{frontend->features() ^ virtio::kRingPacked}));
  EXPECT_FALSE(frontend->order(Request::SetVringNum, vhost::VringState{0, 64})) << "running";
  EXPECT_FALSE(frontend->order(Request::SetVringNum, vhost::VringState{1, 0}));
  EXPECT_FALSE(frontend->order(Request::SetVringNum, vhost::VringState{1, 1025}));
  EXPECT_FALSE(frontend->order(Request::SetVringNum, vhost::VringState{99, 64}));
  EXPECT_FALSE(frontend->order(Request::SetVringBase, vhost::VringState{UINT32_MAX, 0}));
  EXPECT_FALSE(frontend->order(Request::SetVringEnable, vhost::VringState{16, 1}));
  const UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  const int event_fd = event.get();
  const std::span<const int> kick(&event_fd, 1);
  EXPECT_FALSE(frontend->order(Request::SetVringKick, vhost::VringFd{255, true}, kick));
  EXPECT_FALSE(frontend->order(Request::SetVringKick, vhost::VringFd{1, true}, kick)) << "without addresses";
  EXPECT_FALSE(frontend->order(Request::SetVringKick, vhost::VringFd{0, true}, one)) << "a file cannot be waited for";
  EXPECT_FALSE(frontend->order(Request::SetVringCall, vhost::VringFd{0, true}, one)) << "nor signalled";
  int pipe_ends[2] = {-1, -1};
  ASSERT_EQ(::pipe(pipe_ends), 0);
  const UniqueFd pipe_out(pipe_ends[0]);
  const UniqueFd pipe_in(pipe_ends[1]);
  EXPECT_FALSE(frontend->order(Request::SetVringCall, vhost::VringFd{0, true}, std::span(&pipe_ends[1], 1)))
      << "a full pipe would stop the daemon";
  EXPECT_FALSE(frontend->order(Request::SetMemTable, vhost::MemoryTable{{frontend->region()}}, kick)) << "no memory";
  EXPECT_FALSE(frontend->order(Request::SetVringKick, vhost::VringFd{0, false})) << "polling";
  EXPECT_FALSE(frontend->order(Request::SetInflightFd, vhost::Inflight{4096, 0, 1, 128}, one)) << "running";
  vhost::VringAddress moved = frontend->addresses(0);
  moved.used += 64;
  EXPECT_FALSE(frontend->order(Request::SetVringAddr, moved)) << "running";
  moved.index = 1;
  ASSERT_TRUE(frontend->order(Request::SetVringNum, vhost::VringState{1, 100}));
  ASSERT_TRUE(frontend->order(Request::SetVringAddr, moved));
  EXPECT_FALSE(frontend->order(Request::SetVringKick, vhost::VringFd{1, true}, kick)) << "no power of two";
  BlkQueue queue(*frontend, 0, 1, 4096);
  EXPECT_TRUE(works(queue));
}

TEST(VhostSession, AnotherInflightRegionIsRefusedWhileAQueueUsesTheOneBefore) {
  // The ring writes to the region with each request: unmapped under it, the daemon ends, and every guest with it.
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  ASSERT_TRUE(works(queue));
  Bytes ask;
  vhost::encode(ask, Request::GetInflightFd, vhost::kFlagNeedReply, vhost::Inflight{0, 0, 1, 128});
  ASSERT_TRUE(frontend->send_bytes(ask));
  EXPECT_FALSE(frontend->receive(Request::GetInflightFd)) << "a region instead of a refusal";
  EXPECT_TRUE(works(queue));
}

TEST(VhostSession, ACallDescriptorThatWouldBlockIsLeftAlone) {
  // Whether an eventfd blocks is a flag that both sides share, and the front-end can set it back: a full counter would
  // then stop the daemon at its next answer.
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  const UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  const int fd = event.get();
  ASSERT_TRUE(frontend->order(Request::SetVringCall, vhost::VringFd{0, true}, std::span(&fd, 1)));
  ASSERT_EQ(::fcntl(fd, F_SETFL, 0), 0);
  uint64_t count = UINT64_MAX - 1;
  ASSERT_EQ(::write(fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
  uint8_t* data = frontend->data();
  const uint64_t address = frontend->data_address();
  std::memset(data, 0, 16);
  data[600] = 0xff;
  const virtio::Buffer header{address, 16};
  const virtio::Buffer writable[] = {{address + 64, 512}, {address + 600, 1}};
  ASSERT_TRUE(frontend->ring(0).add(0, std::span(&header, 1), writable));
  (void)frontend->ring(0).publish();
  frontend->kick(0);
  EXPECT_TRUE(backend.eventually([&] { return frontend->ring(0).reap().has_value(); }));
  EXPECT_EQ(data[600], 0);
  auto still_there = std::async(std::launch::async, [&] { return backend.stats().calls_total; });
  EXPECT_EQ(still_there.wait_for(std::chrono::seconds(3)), std::future_status::ready);
  ASSERT_EQ(::read(fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
  EXPECT_EQ(still_there.get(), 1U) << "a call that was wanted";
}

TEST(VhostSession, BrokenMessagesEndTheConnection) {
  // After half a message nothing that follows can be told apart.
  const Bytes broken[] = {
      {1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0},              // version 2
      {1, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255},      // endless
      {200, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0},            // unknown
      {1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0},           // a payload where none belongs
      {2, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1, 1, 1, 1},  // too short
  };
  VhostBackend backend;
  for (const Bytes& bytes : broken) {
    auto frontend = make_frontend({});
    expect_connected(*frontend, backend);
    ASSERT_TRUE(frontend->send_bytes(bytes));
    EXPECT_FALSE(frontend->receive(Request::GetFeatures)) << "closed";
    ASSERT_TRUE(backend.eventually([&] { return backend.stats().connections == 0; }));
  }
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  std::vector<int> fds(9, frontend->memory_fd());
  Bytes ask;
  vhost::append_header(ask, static_cast<uint32_t>(Request::GetFeatures), 0, 0);
  ASSERT_TRUE(frontend->send_bytes(ask, fds));
  EXPECT_FALSE(frontend->receive(Request::GetFeatures)) << "nine descriptors";
}

TEST(VhostSession, AMessageInSinglePiecesIsOneMessage) {
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  Bytes bytes;
  vhost::encode(bytes, Request::SetVringEnable, vhost::kFlagNeedReply, vhost::VringState{0, 1});
  for (const uint8_t byte : bytes) {
    ASSERT_TRUE(frontend->send_bytes(ByteSpan(&byte, 1)));
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(frontend->receive(Request::SetVringEnable));
}

TEST(VhostSession, DescriptorsAreNotLeaked) {
  // A daemon that serves for months meets thousands of connections.
  VhostBackend backend;
  const auto count = [] {
    size_t open = 0;
    for (int fd = 0; fd < 1024; ++fd) open += fcntl(fd, F_GETFD) >= 0 ? 1U : 0U;
    return open;
  };
  const auto once = [&] {
    auto frontend = make_frontend({});
    expect_connected(*frontend, backend);
    ASSERT_TRUE(frontend->set_logging(true));
    const int fd = frontend->memory_fd();
    EXPECT_FALSE(frontend->order(Request::AddMemReg, frontend->region(), std::span(&fd, 1)));
    frontend.reset();
    ASSERT_TRUE(backend.eventually([&] { return backend.stats().connections == 0; }));
  };
  once();
  const size_t before = count();
  for (int i = 0; i < 20; ++i) once();
  EXPECT_EQ(count(), before);
}

TEST(VhostSession, AResizeIsAnnouncedAndSeen) {
  VhostBackend backend(8_MiB);
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  EXPECT_EQ(frontend->config().size, 8_MiB);
  EXPECT_EQ(frontend->config().segments_max, 126U);
  EXPECT_EQ(frontend->config().physical_block, 4096U);
  EXPECT_FALSE(frontend->wait_backend_message(20));
  backend.disk->show_size(16_MiB);
  backend.run([&] { backend.server().resized(); });
  EXPECT_TRUE(frontend->wait_backend_message(2000));
  ASSERT_TRUE(frontend->read_config());
  EXPECT_EQ(frontend->config().size, 16_MiB);
}

TEST(VhostSession, AResetDeviceBeginsAnew) {
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  BlkQueue queue(*frontend, 0, 1, 4096);
  ASSERT_TRUE(works(queue));
  ASSERT_TRUE(frontend->order(Request::SetStatus, vhost::NumberBody{0xf}));
  EXPECT_EQ(*frontend->ask(Request::GetStatus), 0xfU);
  ASSERT_TRUE(frontend->order(Request::ResetDevice, {}));
  EXPECT_EQ(*frontend->ask(Request::GetStatus), 0U);
  ASSERT_TRUE(queue.add(0, virtio::kBlkIn, 0, 4096));
  queue.flush();
  queue.kick();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(queue.reap());
}

TEST(VhostSession, MoreConnectionsThanMayWaitAreRefused) {
  VhostBackend backend;
  auto frontend = make_frontend({});
  expect_connected(*frontend, backend);
  std::vector<UniqueFd> sockets;
  for (size_t i = 0; i < VhostLimits{}.waiting_max; ++i) sockets.push_back(backend.dial());
  const UniqueFd refused = backend.dial();
  pollfd closed{refused.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&closed, 1, 1000), 1);
  uint8_t byte = 0;
  EXPECT_EQ(::recv(refused.get(), &byte, 1, 0), 0);
}

}  // namespace
}  // namespace vmferry
