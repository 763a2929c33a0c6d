// SPDX-License-Identifier: Apache-2.0
//
// Fuzz target of the whole vhost-user-blk back-end: a front-end with real descriptors and memory, and a driver.
//
// The session begins properly, so that the input gets behind the negotiation; then the input's steps follow: messages
// with any body and any descriptors, requests that are mostly well formed, kicks, raw bytes. Whatever comes, the
// back-end finishes and lets go of the connection when it ends. Serves a disk in memory on a reactor in this thread.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <cstring>
#include <memory>

#include "blockdev/vhost/vhost_server.h"
#include "engine/base/log.h"
#include "engine/runtime/endpoint.h"
#include "netproto/vhost/message.h"
#include "netproto/virtio/blk.h"
#include "netproto/virtio/driver_ring.h"
#include "tests/fuzz/require.h"

namespace {

using namespace vmferry;
using vhost::Request;

constexpr uint64_t kGuest = 0x100000;
constexpr uint64_t kUser = 0x7f0000000000;
constexpr uint64_t kMemory = 64_KiB;
constexpr uint64_t kData = 32_KiB;
constexpr uint16_t kQueueSize = 8;
constexpr uint64_t kDiskSize = 64_KiB;

class MemoryDisk final : public BlockDevice {
 public:
  explicit MemoryDisk(Executor& executor) : executor_(executor), content_(kDiskSize) {}
  uint64_t size() const noexcept override { return kDiskSize; }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override {
    require(request.op == BlockOp::Flush || fits_in(request.range.offset, request.range.length, kDiskSize));
    require(request.op == BlockOp::Flush || request.range.length > 0);
    executor_.post([this, &request] {
      uint8_t* at = content_.data() + request.range.offset;
      if (request.op == BlockOp::Read) std::memcpy(request.data, at, request.range.length);
      if (request.op == BlockOp::Write) std::memcpy(at, request.data, request.range.length);
      if (request.op == BlockOp::WriteZeroes) std::memset(at, 0, request.range.length);
      request.completion->block_done(request, 0);
    });
  }
  void query_extents(ByteRange, size_t, ExtentsDone) override {}

 private:
  Executor& executor_;
  std::vector<uint8_t> content_;
  BlockLimits limits_;
};

class Session {
 public:
  Session(Reactor& reactor, const uint8_t* data, size_t size)
      : reactor_(reactor), disk_(reactor), data_(data), size_(size) {
    server_ = std::make_unique<VhostServer>(reactor, VhostExport{.name = "fuzz", .device = &disk_, .queues = 2});
    auto pair = make_socket_pair();
    require(pair.has_value());
    socket_ = std::move(pair->first);
    server_->accept(std::move(pair->second));
    memory_fd_.reset(::memfd_create("memory", MFD_CLOEXEC));
    event_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    require(::ftruncate(memory_fd_.get(), kMemory) == 0);
    void* address = ::mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd_.get(), 0);
    require(address != MAP_FAILED);
    memory_ = static_cast<uint8_t*>(address);
  }
  ~Session() {
    socket_.reset();
    bool done = false;
    server_->drain([&done] { done = true; });
    require(reactor_.run_until([&done] { return done; }, 5 * kSecond));
    server_.reset();
    ::munmap(memory_, kMemory);
  }

  void run() {
    begin(byte());
    while (at_ < size_) {
      step();
      pump(2);
    }
    pump(4);
  }

 private:
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  uint64_t number() {
    uint64_t value = 0;
    const unsigned count = byte() % 9;
    for (unsigned i = 0; i < count; ++i) value = value << 8 | byte();
    return value;
  }

  void pump(int rounds) {
    for (int i = 0; i < rounds; ++i) {
      bool ran = false;
      // With something posted the round looks for events without waiting for any.
      reactor_.post([this, &ran] {
        ran = true;
        reactor_.post([] {});
      });
      require(reactor_.run_until([&ran] { return ran; }, kSecond));
    }
    uint8_t sink[4096];
    while (::recv(socket_.get(), sink, sizeof sink, MSG_DONTWAIT) > 0) {
    }
  }

  void send(ByteSpan bytes, size_t fds) {
    iovec vector{const_cast<uint8_t*>(bytes.data()), bytes.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
    msghdr message{};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    int all[16];
    for (size_t i = 0; i < fds; ++i) all[i] = next_fd();
    if (fds > 0) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(sizeof(int) * fds);
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int) * fds);
      std::memcpy(CMSG_DATA(header), all, sizeof(int) * fds);
    }
    (void)::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  int next_fd() { return fd_is_event_ ? event_.get() : memory_fd_.get(); }
  void send(Request request, const vhost::Body& body, size_t fds = 0, bool event = false) {
    Bytes bytes;
    vhost::encode(bytes, request, vhost::kFlagNeedReply, body);
    fd_is_event_ = event;
    send(bytes, fds);
  }

  void begin(uint8_t shape) {
    options_ = {(shape & 1) != 0, (shape & 2) != 0, (shape & 4) != 0};
    uint64_t features = virtio::kVersion1 | virtio::kBlkFlush | vhost::kFeatureProtocolFeatures;
    if (options_.packed) features |= virtio::kRingPacked;
    if (options_.indirect) features |= virtio::kRingIndirect;
    if (options_.event_idx) features |= virtio::kRingEventIdx;
    ring_ = std::make_unique<virtio::DriverRing>(options_, kQueueSize, memory_, kGuest);
    require(virtio::DriverRing::memory_size(options_, kQueueSize) <= kData);
    send(Request::SetProtocolFeatures,
         vhost::NumberBody{vhost::kProtocolMq | vhost::kProtocolLogShmfd | vhost::kProtocolReplyAck |
                           vhost::kProtocolBackendReq | vhost::kProtocolConfig | vhost::kProtocolInflightShmfd |
                           vhost::kProtocolResetDevice | vhost::kProtocolConfigureMemSlots | vhost::kProtocolStatus});
    send(Request::SetFeatures, vhost::NumberBody{features});
    send(Request::GetInflightFd, vhost::Inflight{0, 0, 2, kQueueSize});
    send(Request::SetMemTable, vhost::MemoryTable{{{kGuest, kMemory, kUser, 0}}}, 1);
    send(Request::SetVringNum, vhost::VringState{0, kQueueSize});
    send(Request::SetVringBase, vhost::VringState{0, ring_->base()});
    send(Request::SetVringAddr, vhost::VringAddress{0, 0, kUser, kUser + ring_->device_offset(),
                                                    kUser + ring_->driver_offset(), kGuest + ring_->device_offset()});
    send(Request::SetVringCall, vhost::VringFd{0, true}, 1, true);
    send(Request::SetVringKick, vhost::VringFd{0, true}, 1, true);
    send(Request::SetVringEnable, vhost::VringState{0, 1});
    pump(6);
  }

  void step() {
    const uint8_t kind = byte();
    switch (kind & 7) {
      case 0:
      case 1:
      case 2:
      case 3:
        return submit(kind);
      case 4:
        if (!cut_) memory_[number() % kMemory] = byte();  // rings included
        return;
      case 5:
        return message(kind >> 3);
      case 6: {
        Bytes raw;
        for (unsigned i = 0; i < (kind >> 3); ++i) raw.push_back(byte());
        if (!raw.empty()) send(raw, byte() % 10);
        return;
      }
      case 7:
        // Without its end, or without all of it; from then on we must not touch it ourselves.
        if (kind == 0xff) {
          cut_ = true;
          require(::ftruncate(memory_fd_.get(), static_cast<off_t>(number() % kMemory)) == 0);
        }
        while (!cut_ && ring_->reap()) {
        }
        return kick();
    }
  }

  // A request of which most is right.
  void submit(uint8_t kind) {
    if (cut_) return kick();
    static constexpr uint32_t kTypes[] = {0, 1, 4, 8, 11, 13, 0, 1};
    const uint8_t choice = byte();
    const uint32_t type = choice < 248 ? kTypes[choice & 7] : static_cast<uint32_t>(number());
    const uint64_t sector = (choice & 0x10) != 0 ? number() : byte() % 128;
    uint8_t* header = memory_ + kData;
    std::memcpy(header, &type, 4);
    std::memcpy(header + 8, &sector, 8);
    const bool device_writes = type == 0 || type == 8;
    std::vector<virtio::Buffer> readable{{kGuest + kData, 16}};
    std::vector<virtio::Buffer> writable;
    const unsigned pieces = kind >> 3 & 3;
    for (unsigned i = 0; i < pieces; ++i) {
      const uint32_t length = type == 11 || type == 13 ? 16U : 512U * (1 + byte() % 4);
      (device_writes ? writable : readable).push_back({kGuest + kData + 4096 + i * 4096U, length});
    }
    if ((kind & 0x20) != 0) readable.push_back({number(), static_cast<uint32_t>(number())});
    if ((kind & 0xc0) != 0xc0) writable.push_back({kGuest + kData + 64, 1});
    const auto id = static_cast<uint16_t>(ids_++ % kQueueSize);
    while (ring_->reap()) {
    }
    if (ids_ <= kQueueSize && !ring_->broken() && ring_->add(id, readable, writable)) (void)ring_->publish();
    if (ids_ == kQueueSize) restart_ids();
    kick();
  }
  // Ids come free as answers are reaped; a fresh ring forgets those that never will be.
  void restart_ids() {
    pump(4);
    ids_ = 0;
    send(Request::GetVringBase, vhost::VringState{0, 0});
    pump(2);
    std::memset(memory_, 0, kData);
    ring_ = std::make_unique<virtio::DriverRing>(options_, kQueueSize, memory_, kGuest);
    send(Request::GetInflightFd, vhost::Inflight{0, 0, 2, kQueueSize});
    send(Request::SetVringBase, vhost::VringState{0, ring_->base()});
    send(Request::SetVringKick, vhost::VringFd{0, true}, 1, true);
    pump(2);
  }
  void kick() {
    const uint64_t one = 1;
    (void)!::write(event_.get(), &one, sizeof one);
  }

  void message(uint8_t fds) {
    static constexpr Request kRequests[] = {
        Request::SetFeatures,  Request::SetMemTable,    Request::SetLogBase,     Request::SetVringNum,
        Request::SetVringAddr, Request::SetVringBase,   Request::GetVringBase,   Request::SetVringKick,
        Request::SetVringCall, Request::SetVringErr,    Request::SetVringEnable, Request::SetBackendReqFd,
        Request::GetConfig,    Request::SetConfig,      Request::GetInflightFd,  Request::SetInflightFd,
        Request::ResetDevice,  Request::AddMemReg,      Request::RemMemReg,      Request::SetStatus,
        Request::GetStatus,    Request::GetMaxMemSlots, Request::ResetOwner,     Request::GetFeatures};
    const Request request = kRequests[byte() % std::size(kRequests)];
    const uint32_t index = byte() & 3;
    fd_is_event_ = (byte() & 1) != 0;
    vhost::Body body;
    switch (request) {
      case Request::SetFeatures:
      case Request::SetStatus:
        body = vhost::NumberBody{number()};
        break;
      case Request::SetVringNum:
      case Request::SetVringBase:
      case Request::GetVringBase:
      case Request::SetVringEnable:
        body = vhost::VringState{index, static_cast<uint32_t>(number())};
        break;
      case Request::SetVringAddr:
        body = vhost::VringAddress{index, byte() & 1U, kUser + number(), kUser + number(), kUser + number(), number()};
        break;
      case Request::SetVringKick:
      case Request::SetVringCall:
      case Request::SetVringErr:
        body = vhost::VringFd{static_cast<uint8_t>(index), (fds & 1) != 0};
        break;
      case Request::SetMemTable:
        body = vhost::MemoryTable{
            {{kGuest + number() % 3 * 4096, kMemory - number() % 8 * 4096, kUser, number() % 2 * 4096}}};
        break;
      case Request::AddMemReg:
      case Request::RemMemReg:
        body =
            vhost::MemoryRegion{kGuest + number(), 4096 + number() % 16 * 4096, kUser + number(), number() % 4 * 4096};
        break;
      case Request::SetLogBase:
        body = vhost::LogArea{1 + number() % 8192, number() % 3 * 4096};
        break;
      case Request::GetConfig:
      case Request::SetConfig: {
        vhost::ConfigAccess access{byte(), byte(), byte() & 1U, {}};
        access.data.resize(access.size);
        body = std::move(access);
        break;
      }
      case Request::GetInflightFd:
      case Request::SetInflightFd:
        body = vhost::Inflight{number() % 65536, number() % 3 * 4096, static_cast<uint16_t>(index),
                               static_cast<uint16_t>(number())};
        break;
      default:
        break;
    }
    Bytes bytes;
    vhost::encode(bytes, request, vhost::kFlagNeedReply, body);
    send(bytes, fds % 4);
  }

  Reactor& reactor_;
  MemoryDisk disk_;
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  std::unique_ptr<VhostServer> server_;
  UniqueFd socket_;
  UniqueFd memory_fd_;
  UniqueFd event_;
  uint8_t* memory_ = nullptr;
  virtio::RingOptions options_;
  std::unique_ptr<virtio::DriverRing> ring_;
  unsigned ids_ = 0;
  bool fd_is_event_ = false;
  bool cut_ = false;  // the memory's file was cut
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 2048) return 0;
  static const std::unique_ptr<Reactor> reactor = [] {
    log::set_level(log::Level::Error);
    auto made = Reactor::create({.worker_count = 1});
    require(made.has_value());
    return std::move(*made);
  }();
  Session(*reactor, data, size).run();
  return 0;
}
