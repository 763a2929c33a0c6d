// SPDX-License-Identifier: Apache-2.0
//
// IoBackend on the reactor's io_uring (engine/runtime/uring.h).
#include "engine/runtime/io_backend.h"
#include "engine/runtime/uring.h"

namespace vmferry {

namespace {

class UringBackend final : public IoBackend {
 public:
  explicit UringBackend(Uring& uring) : uring_(uring) {}
  void submit(IoRequest& request) noexcept override { uring_.submit(request); }
  std::string_view name() const noexcept override { return "io_uring"; }

 private:
  Uring& uring_;
};

}  // namespace

Result<std::unique_ptr<IoBackend>> make_uring_backend(Reactor& reactor) {
  const auto uring = reactor.uring();
  if (!uring) return tl::unexpected(uring.error());
  return std::make_unique<UringBackend>(**uring);
}

}  // namespace vmferry
