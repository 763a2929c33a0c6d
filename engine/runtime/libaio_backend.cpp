// SPDX-License-Identifier: Apache-2.0
//
// IoBackend on libaio: the fallback where io_uring is forbidden.
//
// io_submit is asynchronous only for O_DIRECT reads and writes; everything else (buffered transfers, fdatasync,
// fallocate) would block the reactor and runs on the CPU workers.
#include <fcntl.h>
#include <libaio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include <cerrno>

#include "engine/base/assert.h"
#include "engine/runtime/io_queue.h"

namespace vmferry {

namespace {

constexpr int kInFlightMax = 256;
constexpr int kBatch = 64;

int64_t run_blocking(const IoRequest& request) {
  for (;;) {
    int64_t result = 0;
    const iovec vector{request.data, request.length};
    const auto offset = static_cast<off_t>(request.offset);
    switch (request.kind) {
      case IoKind::Read:
        result = ::preadv(request.fd, &vector, 1, offset);
        break;
      case IoKind::Write:
        result = ::pwritev2(request.fd, &vector, 1, offset, request.flags);
        break;
      case IoKind::DataSync:
        result = ::fdatasync(request.fd);
        break;
      case IoKind::Allocate:
        result = ::fallocate(request.fd, request.flags, offset, static_cast<off_t>(request.length));
        break;
    }
    if (result >= 0) return result;
    if (errno != EINTR && errno != EAGAIN) return -static_cast<int64_t>(errno);
  }
}

class LibAioBackend final : public IoBackend {
 public:
  explicit LibAioBackend(Reactor& reactor) : reactor_(reactor), submit_later_(reactor, [this] { submit_waiting(); }) {}
  ~LibAioBackend() override {
    VF_ASSERT(in_flight_ == 0 && on_workers_ == 0 && waiting_.empty());
    reactor_.unwatch(watch_);
    if (context_ != nullptr) io_destroy(context_);
  }

  Status start() {
    event_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!event_.valid()) return fail(ErrorKind::LimitExceeded, "eventfd: {}", errno_text(errno));
    const int result = io_setup(kInFlightMax, &context_);
    if (result != 0)
      return fail(ErrorKind::LimitExceeded, "io_setup failed: {} (see /proc/sys/fs/aio-max-nr)", errno_text(-result));
    blocks_.resize(kInFlightMax);
    for (iocb& block : blocks_) free_.push_back(&block);
    watch_ = reactor_.watch(event_.get(), EPOLLIN, [this](uint32_t) { reap(); });
    return {};
  }

  void submit(IoRequest& request) noexcept override {
    const bool transfer = request.kind == IoKind::Read || request.kind == IoKind::Write;
    if (!transfer || !request.direct) return submit_to_worker(request);
    waiting_.push(request);
    submit_later_.schedule();
  }
  std::string_view name() const noexcept override { return "libaio"; }

 private:
  void submit_to_worker(IoRequest& request) {
    ++on_workers_;
    auto result = std::make_shared<int64_t>(0);
    reactor_.offload([&request, result] { *result = run_blocking(request); },
                     [this, &request, result] {
                       --on_workers_;
                       request.completion->io_done(request, *result);
                     });
  }

  void submit_waiting() {
    while (!waiting_.empty() && !free_.empty()) {
      iocb* batch[kBatch];
      int count = 0;
      while (count < kBatch && !waiting_.empty() && !free_.empty()) {
        IoRequest& request = waiting_.pop();
        iocb* block = free_.back();
        free_.pop_back();
        prepare(*block, request);
        batch[count++] = block;
      }
      const int taken = io_submit(context_, count, batch);
      if (taken < 0) {
        // The first one is refused: run it the slow way, which also finds the errno; the others get another try.
        IoRequest& refused = *static_cast<IoRequest*>(batch[0]->data);
        free_.push_back(batch[0]);
        submit_to_worker(refused);
        take_back(batch, 1, count);
        continue;
      }
      in_flight_ += taken;
      take_back(batch, taken, count);
      if (taken < count) {
        submit_later_.cancel();
        return retry_.start(kMillisecond, [this] { submit_waiting(); });
      }
    }
  }

  void take_back(iocb** batch, int from, int count) {
    for (int i = count - 1; i >= from; --i) {
      waiting_.push_front(*static_cast<IoRequest*>(batch[i]->data));
      free_.push_back(batch[i]);
    }
  }

  void prepare(iocb& block, IoRequest& request) {
    const auto offset = static_cast<long long>(request.offset);
    if (request.kind == IoKind::Read) {
      io_prep_pread(&block, request.fd, request.data, request.length, offset);
    } else {
      io_prep_pwrite(&block, request.fd, request.data, request.length, offset);
      block.aio_rw_flags = static_cast<decltype(block.aio_rw_flags)>(request.flags);
    }
    io_set_eventfd(&block, event_.get());
    block.data = &request;
  }

  void reap() {
    uint64_t ignored = 0;
    [[maybe_unused]] const ssize_t got = ::read(event_.get(), &ignored, sizeof ignored);
    const auto alive = alive_.token();
    for (;;) {
      io_event events[kBatch];
      timespec zero{};
      const int count = io_getevents(context_, 0, kBatch, events, &zero);
      if (count <= 0) return;
      // Give all control blocks back before the first callback, which may submit again.
      for (int i = 0; i < count; ++i) free_.push_back(events[i].obj);
      for (int i = 0; i < count; ++i) {
        --in_flight_;
        IoRequest& request = *static_cast<IoRequest*>(events[i].data);
        const auto result = static_cast<int64_t>(events[i].res);
        if (result == -EINTR || result == -EAGAIN) {
          submit(request);
          continue;
        }
        request.completion->io_done(request, result);
        if (!alive()) return;  // destroyed: then nothing was in flight, so this was the last
      }
      if (!waiting_.empty()) submit_later_.schedule();
    }
  }

  Reactor& reactor_;
  io_context_t context_ = nullptr;
  UniqueFd event_;
  std::vector<iocb> blocks_;
  std::vector<iocb*> free_;
  IoQueue waiting_;
  int in_flight_ = 0;
  int on_workers_ = 0;
  WatchId watch_ = 0;
  DeferredCall submit_later_;
  Timer retry_{reactor_};
  Alive alive_;
};

}  // namespace

Result<std::unique_ptr<IoBackend>> make_libaio_backend(Reactor& reactor) {
  auto backend = std::make_unique<LibAioBackend>(reactor);
  if (Status status = backend->start(); !status) return tl::unexpected(status.error());
  return backend;
}

}  // namespace vmferry
