// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/epoch_foreign.h"

#include <memory>

#include "engine/delta/block_scan.h"

namespace vmferry {

namespace {

constexpr uint64_t kReadSize = 1U << 20;
constexpr uint64_t kQuerySize = 1U << 30;

struct Search : std::enable_shared_from_this<Search> {
  BlockDevice& device;
  Alive::Token alive;
  std::function<void(Result<bool>)> done;
  uint64_t at = 0;
  Bytes buffer;

  Search(BlockDevice& d, Alive::Token a, std::function<void(Result<bool>)> f)
      : device(d), alive(std::move(a)), done(std::move(f)) {}

  void query() {
    if (at >= device.size()) return done(false);
    const uint64_t length = std::min(kQuerySize, device.size() - at);
    device.query_extents({at, length}, 1, [self = shared_from_this()](Result<std::vector<Extent>> extents) {
      if (!self->alive()) return;
      // A store that cannot tell is read.
      if (!extents || extents->empty())
        return self->read(self->at + std::min(kReadSize, self->device.size() - self->at));
      const Extent& first = extents->front();
      if (first.hole || first.zero) {
        self->at = first.range.end();
        return self->query();
      }
      self->read(first.range.end());
    });
  }

  void read(uint64_t until) {
    if (at >= until) return query();
    buffer.resize(std::min(kReadSize, until - at));
    read_block(device, at, buffer.data(), buffer.size(), [self = shared_from_this(), until](Errno error) {
      if (!self->alive()) return;
      if (error != 0) return self->done(fail(ErrorKind::Io, "read at {}: {}", self->at, errno_text(error)));
      if (!delta::is_zero(self->buffer)) return self->done(true);
      self->at += self->buffer.size();
      self->read(until);
    });
  }
};

}  // namespace

void find_data(BlockDevice& device, Alive::Token alive, std::function<void(Result<bool>)> done) {
  std::make_shared<Search>(device, std::move(alive), std::move(done))->query();
}

}  // namespace vmferry
