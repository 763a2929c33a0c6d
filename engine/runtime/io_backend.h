// SPDX-License-Identifier: Apache-2.0
//
// Asynchronous file I/O under the stores: io_uring, or libaio with workers where the kernel or a sandbox refuses it.
//
// Flow: FileStore -> IoBackend -> kernel -> Reactor -> IoCompletion. Requests are linked into the backend's queues, so
// nothing is allocated per request. Threads: the reactor's.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "engine/base/result.h"
#include "engine/runtime/reactor.h"

namespace vmferry {

enum class IoKind : uint8_t {
  Read,
  Write,
  DataSync,  // fdatasync
  Allocate,  // fallocate with `flags` as its mode
};

struct IoRequest;

class IoCompletion {
 public:
  // Bytes transferred (which may be fewer than asked, 0 at end of file) or -errno; 0 for DataSync and Allocate. EINTR
  // and EAGAIN are never reported. May destroy the backend when nothing else is in flight.
  virtual void io_done(IoRequest& request, int64_t result) noexcept = 0;

 protected:
  ~IoCompletion() = default;
};

struct IoRequest {
  IoKind kind = IoKind::Read;
  bool direct = false;  // the descriptor is O_DIRECT: libaio may use io_submit without blocking
  int fd = -1;
  int flags = 0;  // Write: RWF_DSYNC; Allocate: FALLOC_FL_*
  uint64_t offset = 0;
  uint64_t length = 0;  // Read, Write: at most kIoLengthMax
  uint8_t* data = nullptr;
  IoCompletion* completion = nullptr;

  IoRequest* next = nullptr;  // the backend's
};
inline constexpr uint64_t kIoLengthMax = 1U << 30;

class IoBackend {
 public:
  virtual ~IoBackend() = default;  // nothing may be in flight
  // Completes exactly once, never inline. Requests of one round of the loop go to the kernel together.
  virtual void submit(IoRequest& request) noexcept = 0;
  virtual std::string_view name() const noexcept = 0;
};

enum class AioKind : uint8_t { IoUring, LibAio };
Result<AioKind> parse_aio(std::string_view text);
std::string_view to_string(AioKind kind) noexcept;

// The wanted backend, or libaio with a warning that gives the reason when io_uring cannot be had.
Result<std::unique_ptr<IoBackend>> make_io_backend(Reactor& reactor, AioKind wanted);
Result<std::unique_ptr<IoBackend>> make_uring_backend(Reactor& reactor);
Result<std::unique_ptr<IoBackend>> make_libaio_backend(Reactor& reactor);

}  // namespace vmferry
