// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/io_backend.h"

#include "engine/base/log.h"

namespace vmferry {

Result<AioKind> parse_aio(std::string_view text) {
  if (text == "io_uring") return AioKind::IoUring;
  if (text == "libaio") return AioKind::LibAio;
  return fail(ErrorKind::InvalidArgument, "aio '{}' is neither io_uring nor libaio", text);
}

std::string_view to_string(AioKind kind) noexcept {
  return kind == AioKind::IoUring ? "io_uring" : "libaio";
}

Result<std::unique_ptr<IoBackend>> make_io_backend(Reactor& reactor, AioKind wanted) {
  if (wanted == AioKind::IoUring) {
    auto uring = make_uring_backend(reactor);
    if (uring) return uring;
    log::warn("aio=libaio reason=\"{}\"", uring.error().text);
  }
  return make_libaio_backend(reactor);
}

}  // namespace vmferry
