// SPDX-License-Identifier: Apache-2.0
//
// A network of daemons in one thread with virtual time, for the tests of the peer link: streams that deliver in pieces
// of any size, with a rate and a delay, and that can be cut or fall silent.
// Threads: one.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <queue>
#include <string>

#include "engine/base/random.h"
#include "engine/replicate/dialer.h"
#include "engine/runtime/executor.h"
#include "engine/runtime/stream.h"

namespace vmferry::test {

class VirtualExecutor final : public Executor {
 public:
  Nanoseconds now() const override { return now_; }
  Nanoseconds wall_now() const override { return 1'700'000'000 * kSecond + now_; }
  void post(Task task) override { start_timer(0, std::move(task)); }
  TimerId start_timer(Nanoseconds delay, Task task) override {
    const TimerId id = next_++;
    tasks_.emplace(std::pair(now_ + std::max<Nanoseconds>(delay, 0), id), std::move(task));
    due_.emplace(id, now_ + std::max<Nanoseconds>(delay, 0));
    return id;
  }
  void cancel_timer(TimerId id) override {
    const auto found = due_.find(id);
    if (found == due_.end()) return;
    const auto key = std::pair(found->second, id);
    due_.erase(found);
    const auto task = tasks_.extract(key);  // destroyed last: it may own more timers
  }
  void offload(Task work, Task done) override {
    post([work = std::move(work), done = std::move(done)] {
      work();
      done();
    });
  }
  Id128 new_id() override {
    Id128 id;
    for (uint8_t& byte : id.bytes) byte = static_cast<uint8_t>(random_.next() | 1);
    return id;
  }

  // Runs tasks until `condition` holds or `limit` of virtual time has passed; true when it holds.
  template <typename Condition>
  bool run_until(Condition condition, Nanoseconds limit = 60 * kSecond) {
    const Nanoseconds end = now_ + limit;
    while (!condition()) {
      if (tasks_.empty() || tasks_.begin()->first.first > end) {
        now_ = end;
        return condition();
      }
      step();
    }
    return true;
  }
  void run_for(Nanoseconds time) {
    run_until([] { return false; }, time);
  }
  void drop_tasks() {
    while (!tasks_.empty()) {
      due_.erase(tasks_.begin()->first.second);
      const auto task = tasks_.extract(tasks_.begin());
    }
  }

 private:
  void step() {
    auto node = tasks_.extract(tasks_.begin());
    now_ = node.key().first;
    due_.erase(node.key().second);
    node.mapped()();
  }
  Nanoseconds now_ = kSecond;
  TimerId next_ = 1;
  std::map<std::pair<Nanoseconds, TimerId>, Task> tasks_;
  std::map<TimerId, Nanoseconds> due_;
  Random random_{7};
};

struct Wire {
  size_t piece = 1 << 20;  // bytes per delivery
  uint64_t rate = 0;       // bytes per second and direction; 0 = no limit
  Nanoseconds delay = 0;   // one way
  bool silent = false;     // swallows everything, as a dead link does
  uint64_t delivered = 0;  // bytes, both directions
  uint64_t cut_after = 0;  // bytes delivered until every stream is cut; 0 = never
};

class MemoryStream final : public ByteStream {
 public:
  // Both ends of a connection.
  static std::pair<std::unique_ptr<MemoryStream>, std::unique_ptr<MemoryStream>> make_pair(
      Executor& executor, Wire& wire, const std::string& first_text, const std::string& second_text) {
    auto a = std::make_shared<End>();
    auto b = std::make_shared<End>();
    a->other = b;
    b->other = a;
    return {std::unique_ptr<MemoryStream>(new MemoryStream(executor, wire, a, first_text)),
            std::unique_ptr<MemoryStream>(new MemoryStream(executor, wire, b, second_text))};
  }
  ~MemoryStream() override { close(); }

  void set_handler(StreamHandler* handler) override {
    end_->handler = handler;
    deliver_held(executor_, end_);
  }
  void write(ByteSpan bytes) override { write(Bytes(bytes.begin(), bytes.end())); }
  void write(Bytes&& bytes) override {
    if (end_->closed || end_->closing) return;
    end_->outgoing.insert(end_->outgoing.end(), bytes.begin(), bytes.end());
    kick(executor_, wire_, end_);
  }
  size_t unsent_bytes() const override { return end_->outgoing.size(); }
  void pause_reading(bool paused) override { end_->paused = paused; }
  void close() override {
    if (end_->closed) return;
    end_->closed = true;
    end_->handler = nullptr;
    tell_closed(executor_, wire_, end_, 0);
  }
  void close_after_writing() override {
    if (end_->closed) return;
    end_->closing = true;
    kick(executor_, wire_, end_);
  }
  std::string peer_text() const override { return text_; }
  // The connection breaks for both sides.
  static void cut(Executor& executor, const std::shared_ptr<void>& end) {
    const auto mine = std::static_pointer_cast<End>(end);
    for (const auto& one : {mine, mine->other.lock()}) {
      if (!one || one->closed) continue;
      one->closed = true;
      executor.post([one] {
        if (StreamHandler* handler = std::exchange(one->handler, nullptr)) handler->stream_closed(ECONNRESET);
      });
    }
  }
  std::shared_ptr<void> end() const { return end_; }

 private:
  struct End {
    std::weak_ptr<End> other;
    StreamHandler* handler = nullptr;
    std::deque<uint8_t> outgoing;
    Bytes held;  // arrived before there was a handler
    bool busy = false;
    bool closed = false;
    bool closing = false;
    bool paused = false;
    bool end_seen = false;
  };
  MemoryStream(Executor& executor, Wire& wire, std::shared_ptr<End> end, std::string text)
      : executor_(executor), wire_(wire), end_(std::move(end)), text_(std::move(text)) {}

  static void deliver_held(Executor& executor, const std::shared_ptr<End>& end) {
    executor.post([end] {
      if (end->held.empty() || end->handler == nullptr || end->closed || end->closing) return;
      const Bytes held = std::exchange(end->held, {});
      end->handler->stream_readable(held);
    });
  }
  static void tell_closed(Executor& executor, Wire& wire, const std::shared_ptr<End>& end, Errno error) {
    executor.start_timer(wire.delay, [other = end->other.lock(), error, &wire] {
      if (!other || other->closed || wire.silent) return;
      other->closed = true;
      if (StreamHandler* handler = std::exchange(other->handler, nullptr)) handler->stream_closed(error);
    });
  }
  static void kick(Executor& executor, Wire& wire, const std::shared_ptr<End>& end) {
    if (end->busy) return;
    end->busy = true;
    executor.post([&executor, &wire, end] { send_piece(executor, wire, end); });
  }
  static void send_piece(Executor& executor, Wire& wire, const std::shared_ptr<End>& end) {
    end->busy = false;
    if (end->closed) return;
    // With a rate, 1 ms worth at a time: what a real line would have taken by then.
    const size_t piece = wire.rate == 0 ? wire.piece : std::min<size_t>(wire.piece, wire.rate / 1000 + 1);
    const size_t size = std::min(piece, end->outgoing.size());
    if (size > 0) {
      const auto from = end->outgoing.begin();
      Bytes piece(from, from + static_cast<ptrdiff_t>(size));
      end->outgoing.erase(from, from + static_cast<ptrdiff_t>(size));
      executor.start_timer(wire.delay, [&executor, &wire, other = end->other.lock(), piece = std::move(piece)] {
        arrive(executor, wire, other, piece);
      });
    }
    if (!end->outgoing.empty() || (wire.rate != 0 && size > 0)) {
      end->busy = true;
      const auto wait =
          wire.rate == 0 ? 0 : static_cast<Nanoseconds>(size) * kSecond / static_cast<Nanoseconds>(wire.rate);
      executor.start_timer(wait, [&executor, &wire, end] { send_piece(executor, wire, end); });
    } else if (end->closing) {
      end->closed = true;
      tell_closed(executor, wire, end, 0);
      if (StreamHandler* handler = std::exchange(end->handler, nullptr)) handler->stream_closed(0);
      return;
    }
    if (size > 0 && end->handler != nullptr && end->outgoing.size() < 65536) end->handler->stream_writable();
  }
  static void arrive(Executor& executor, Wire& wire, const std::shared_ptr<End>& end, const Bytes& piece) {
    if (!end || end->closed || end->closing || wire.silent) return;
    if (wire.cut_after != 0 && wire.delivered + piece.size() > wire.cut_after) {
      const size_t part = wire.cut_after - wire.delivered;
      wire.delivered = wire.cut_after;
      wire.cut_after = 0;
      if (part > 0 && end->handler != nullptr) end->handler->stream_readable(ByteSpan(piece).first(part));
      return cut(executor, end);
    }
    wire.delivered += piece.size();
    if (end->handler == nullptr) {
      end->held.insert(end->held.end(), piece.begin(), piece.end());
    } else {
      end->handler->stream_readable(piece);
    }
  }

  Executor& executor_;
  Wire& wire_;
  std::shared_ptr<End> end_;
  std::string text_;
};

// Addresses and who listens there.
class VirtualNet final : public Dialer {
 public:
  explicit VirtualNet(Executor& executor) : executor_(executor) {}
  using Accept = std::function<void(std::unique_ptr<ByteStream>)>;

  void listen(const std::string& address, Accept accept) { listeners_[address] = std::move(accept); }
  void connect(const std::string& address, Done done) override {
    ++dialled;
    executor_.start_timer(2 * wire.delay, [this, address, done = std::move(done)] {
      const auto found = listeners_.find(address);
      if (wire.silent) return;  // no answer: the caller's timeout ends it
      if (found == listeners_.end()) return done(fail(ErrorKind::Unavailable, "connect {}: refused", address));
      auto [near, far] = MemoryStream::make_pair(executor_, wire, address, "192.0.2.7:50000");
      ends_.push_back(near->end());
      found->second(std::move(far));
      done(std::unique_ptr<ByteStream>(std::move(near)));
    });
  }
  void cut_all() {
    for (const auto& end : std::exchange(ends_, {})) MemoryStream::cut(executor_, end);
  }

  Wire wire;
  int dialled = 0;

 private:
  Executor& executor_;
  std::map<std::string, Accept> listeners_;
  std::vector<std::shared_ptr<void>> ends_;
};

}  // namespace vmferry::test
