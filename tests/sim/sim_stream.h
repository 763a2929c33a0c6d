// SPDX-License-Identifier: Apache-2.0
//
// A socketpair between two processes of the simulator: a bounded buffer in each direction, so that a reader which stops
// reading stops the writer, and an end of stream that arrives behind the bytes.
// Threads: the world's.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "engine/runtime/stream.h"
#include "tests/sim/sim_world.h"

namespace vmferry::sim {

class SimStream final : public ByteStream {
 public:
  static std::pair<std::unique_ptr<SimStream>, std::unique_ptr<SimStream>> pair(SimExecutor& a, SimExecutor& b) {
    auto shared = std::make_shared<Shared>();
    shared->sides[0].executor = &a;
    shared->sides[1].executor = &b;
    return {std::unique_ptr<SimStream>(new SimStream(shared, 0)), std::unique_ptr<SimStream>(new SimStream(shared, 1))};
  }
  ~SimStream() override { close(); }

  void set_handler(StreamHandler* handler) override {
    mine().handler = handler;
    deliver(shared_, side_);
  }
  void write(ByteSpan bytes) override {
    if (!mine().open) return;
    mine().tx.insert(mine().tx.end(), bytes.begin(), bytes.end());
    flow(shared_, side_);
  }
  void write(Bytes&& bytes) override { write(ByteSpan(bytes)); }
  size_t unsent_bytes() const override { return shared_->sides[side_].tx.size(); }
  void pause_reading(bool paused) override {
    mine().paused = paused;
    if (!paused) deliver(shared_, side_);
  }
  void close() override {
    Side& side = mine();
    if (!side.open) return;
    side.open = false;
    side.handler = nullptr;
    side.tx.clear();
    finish(shared_, side_);
  }
  void close_after_writing() override {
    Side& side = mine();
    side.handler = nullptr;
    side.closing = true;
    if (side.tx.empty()) close();
  }
  std::string peer_text() const override { return "socketpair"; }

 private:
  static constexpr size_t kCapacity = 16U << 10;
  struct Side {
    SimExecutor* executor = nullptr;
    StreamHandler* handler = nullptr;
    Bytes rx;  // arrived, not yet read
    Bytes tx;  // written, did not fit into the other's rx
    bool rx_end = false;
    bool end_told = false;
    bool paused = false;
    bool open = true;
    bool closing = false;
    bool delivering = false;
  };
  struct Shared {
    std::array<Side, 2> sides;
  };

  SimStream(std::shared_ptr<Shared> shared, size_t side) : shared_(std::move(shared)), side_(side) {}
  Side& mine() { return shared_->sides[side_]; }

  static void finish(const std::shared_ptr<Shared>& shared, size_t from) {
    Side& other = shared->sides[1 - from];
    other.rx_end = true;
    other.tx.clear();
    deliver(shared, 1 - from);
  }

  static void flow(const std::shared_ptr<Shared>& shared, size_t from) {
    Side& side = shared->sides[from];
    Side& other = shared->sides[1 - from];
    if (side.tx.empty() || !other.open) return;
    const size_t room = kCapacity - std::min(kCapacity, other.rx.size());
    const auto size = static_cast<std::ptrdiff_t>(std::min(room, side.tx.size()));
    if (size == 0) return;
    other.rx.insert(other.rx.end(), side.tx.begin(), side.tx.begin() + size);
    side.tx.erase(side.tx.begin(), side.tx.begin() + size);
    deliver(shared, 1 - from);
    if (!side.tx.empty()) return;
    if (side.closing) {
      side.open = false;
      return finish(shared, from);
    }
    side.executor->post([shared, from] {
      Side& writer = shared->sides[from];
      if (writer.open && writer.handler != nullptr && writer.tx.empty()) writer.handler->stream_writable();
    });
  }

  static void deliver(const std::shared_ptr<Shared>& shared, size_t to) {
    Side& side = shared->sides[to];
    if (side.delivering || !side.open || side.handler == nullptr || side.end_told) return;
    if (side.rx.empty() ? !side.rx_end : side.paused) return;
    side.delivering = true;
    const auto delay = static_cast<Nanoseconds>(side.executor->world().random().below(100)) * kMicrosecond;
    side.executor->start_timer(delay, [shared, to] {
      Side& reader = shared->sides[to];
      reader.delivering = false;
      if (!reader.open || reader.handler == nullptr) return;
      if (!reader.rx.empty()) {
        if (reader.paused) return;
        const Bytes chunk = std::exchange(reader.rx, {});
        reader.handler->stream_readable(chunk);
        flow(shared, 1 - to);
        return deliver(shared, to);
      }
      if (!reader.rx_end || reader.end_told) return;
      reader.end_told = true;
      reader.handler->stream_closed(0);
    });
  }

  std::shared_ptr<Shared> shared_;
  const size_t side_;
};

}  // namespace vmferry::sim
