// SPDX-License-Identifier: Apache-2.0
//
// What the NBD server's tests put around it: an executor driven by hand, a stream of which the test holds the other
// end, and a disk in memory whose completions, errors and delays the test decides. Threads: one.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "blockdev/block_device.h"
#include "blockdev/nbd/nbd_server.h"
#include "engine/base/assert.h"
#include "tests/unit/netproto/nbd_test_client.h"

namespace vmferry::nbd_test {

class ManualExecutor final : public Executor {
 public:
  Nanoseconds now() const override { return now_; }
  Nanoseconds wall_now() const override { return now_; }
  void post(Task task) override { posted_.push_back(std::move(task)); }
  TimerId start_timer(Nanoseconds delay, Task task) override {
    timers_.emplace(++timer_last_, std::pair{now_ + delay, std::move(task)});
    return timer_last_;
  }
  void cancel_timer(TimerId id) override { timers_.erase(id); }
  void offload(Task work, Task done) override {
    work();
    post(std::move(done));
  }
  Id128 new_id() override { return Id128{{1}}; }

  // Runs what is posted, and what that posts, until nothing is left.
  void run() {
    while (!posted_.empty()) {
      Task task = std::move(posted_.front());
      posted_.pop_front();
      task();
    }
  }
  // Lets time pass; timers run in the order they are due.
  void advance(Nanoseconds duration) {
    const Nanoseconds until = now_ + duration;
    run();
    for (;;) {
      auto due = timers_.end();
      for (auto it = timers_.begin(); it != timers_.end(); ++it)
        if (it->second.first <= until && (due == timers_.end() || it->second.first < due->second.first)) due = it;
      if (due == timers_.end()) break;
      now_ = std::max(now_, due->second.first);
      Task task = std::move(due->second.second);
      timers_.erase(due);
      task();
      run();
    }
    now_ = until;
  }
  size_t timer_count() const { return timers_.size(); }

 private:
  Nanoseconds now_ = kSecond;
  std::deque<Task> posted_;
  std::map<TimerId, std::pair<Nanoseconds, Task>> timers_;
  TimerId timer_last_ = 0;
};

// The client's end of a MemoryStream, shared with it; outlives it.
struct Wire {
  StreamHandler* handler = nullptr;
  Bytes unsent;              // written by the server, not taken by the client yet
  bool client_reads = true;  // false: what the server writes stays unsent
  bool paused = false;
  bool open = true;
  bool client_gone = false;  // it closed; what it sent before may still be delivered
  Bytes inbox;               // sent by the client while reading was paused
  Bytes received;            // by the client
};

class MemoryStream final : public ByteStream {
 public:
  MemoryStream(Executor& executor, std::shared_ptr<Wire> wire) : executor_(executor), wire_(std::move(wire)) {}
  ~MemoryStream() override { close(); }
  void set_handler(StreamHandler* handler) override { wire_->handler = handler; }
  void write(ByteSpan bytes) override {
    wire_->unsent.insert(wire_->unsent.end(), bytes.begin(), bytes.end());
    executor_.post([wire = wire_] { take(*wire); });
  }
  void write(Bytes&& bytes) override { write(ByteSpan(bytes)); }
  size_t unsent_bytes() const override { return wire_->unsent.size(); }
  void pause_reading(bool paused) override {
    wire_->paused = paused;
    if (!paused) executor_.post([wire = wire_] { deliver(*wire, {}); });
  }
  void close() override {
    wire_->handler = nullptr;
    wire_->open = false;
  }
  void close_after_writing() override {}
  bool peer_gone() const override { return wire_->client_gone; }
  std::string peer_text() const override { return "memory"; }

  static void take(Wire& wire) {
    if (!wire.client_reads || wire.unsent.empty()) return;
    wire.received.insert(wire.received.end(), wire.unsent.begin(), wire.unsent.end());
    wire.unsent.clear();
    if (wire.handler != nullptr) wire.handler->stream_writable();
  }
  static void deliver(Wire& wire, ByteSpan bytes) {
    Bytes all;
    all.swap(wire.inbox);
    all.insert(all.end(), bytes.begin(), bytes.end());
    size_t used = 0;
    while (wire.handler != nullptr && !wire.paused && used < all.size()) {
      const size_t count = std::min<size_t>(all.size() - used, 256 << 10);  // a socket delivers no more in one call
      const ByteSpan part = ByteSpan(all).subspan(used, count);
      used += count;
      wire.handler->stream_readable(part);
    }
    wire.inbox.assign(all.begin() + static_cast<std::ptrdiff_t>(used), all.end());
  }

 private:
  Executor& executor_;
  std::shared_ptr<Wire> wire_;
};

// A disk in memory that knows which 4 KiB blocks were written.
class RamDevice final : public BlockDevice {
 public:
  RamDevice(Executor& executor, uint64_t size) : executor_(executor), content_(size), allocated_(size / 4096 + 1) {
    limits_.can_fast_zero = true;
  }

  uint64_t size() const noexcept override { return content_.size(); }
  const BlockLimits& limits() const noexcept override { return limits_; }
  void submit(BlockRequest& request) noexcept override {
    VF_ASSERT(request.op == BlockOp::Flush || fits_in(request.range.offset, request.range.length, content_.size()));
    seen.push_back(request);
    if (holding) return held.push_back(&request);
    executor_.post([this, &request] { carry_out(request); });
  }
  void query_extents(ByteRange range, size_t extents_max, ExtentsDone done) override {
    extents_asked.push_back(extents_max);
    executor_.post([this, range, extents_max, done = std::move(done)] {
      if (fail_extents) return done(fail(ErrorKind::Io, "broken"));
      std::vector<Extent> extents;
      for (uint64_t at = range.offset; at < range.end() && extents.size() < extents_max;) {
        const uint64_t end = std::min(range.end(), round_down(at, 4096) + 4096);
        const bool hole = !allocated_[at / 4096];
        extents.push_back({{at, end - at}, hole, hole});
        at = end;
      }
      if (extents_too_long) extents.back().range.length += 1 << 20;
      done(std::move(extents));
    });
  }
  // Completes the oldest held request.
  void release_one() {
    BlockRequest* request = held.front();
    held.erase(held.begin());
    executor_.post([this, request] { carry_out(*request); });
  }
  void release_all() {
    while (!held.empty()) release_one();
  }

  Bytes& content() { return content_; }
  BlockLimits& limits() { return limits_; }

  bool holding = false;
  std::vector<BlockRequest*> held;
  std::vector<BlockRequest> seen;  // copies, in the order submitted
  std::vector<size_t> extents_asked;
  Errno next_error = 0;  // of all requests, until changed
  bool fail_extents = false;
  bool extents_too_long = false;

 private:
  void carry_out(BlockRequest& request) {
    Errno error = next_error;
    if (error == 0 && request.fast_only && !limits_.can_fast_zero) error = ENOTSUP;
    if (error == 0) {
      uint8_t* at = content_.data() + request.range.offset;
      if (request.op == BlockOp::Read) std::memcpy(request.data, at, request.range.length);
      if (request.op == BlockOp::Write) std::memcpy(at, request.data, request.range.length);
      if (request.op == BlockOp::WriteZeroes) std::memset(at, 0, request.range.length);
      if (is_mutating(request.op))
        for (uint64_t block = request.range.offset / 4096; block * 4096 < request.range.end(); ++block)
          allocated_[block] = !request.may_unmap;
    }
    request.completion->block_done(request, error);
  }

  Executor& executor_;
  Bytes content_;
  std::vector<bool> allocated_;
  BlockLimits limits_;
};

struct ConnectOptions {
  std::string name = "vda";
  bool structured = false;
  bool extended = false;
  bool base_allocation = false;
  bool block_sizes = false;
};

// One client of a server; drives the executor.
class Client {
 public:
  Client(ManualExecutor& executor, NbdServer& server) : executor_(executor), wire_(std::make_shared<Wire>()) {
    server.accept(std::make_unique<MemoryStream>(executor, wire_));
    executor_.run();
    if (wire_->open && wire_->received.size() >= 18)
      wire_->received.erase(wire_->received.begin(), wire_->received.begin() + 18);
  }
  void send(ByteSpan bytes) {
    MemoryStream::deliver(*wire_, bytes);
    executor_.run();
  }
  // From greeting to transmission; false when the server refused.
  bool go(const ConnectOptions& options = {}) {
    send(client_flags(3));
    if (options.structured) send(option(kOptStructuredReply));
    if (options.extended) send(option(kOptExtendedHeaders));
    if (options.base_allocation) send(option(kOptSetMeta, meta_data(options.name, {"base:allocation"})));
    send(option(kOptGo,
                go_data(options.name, options.block_sizes ? std::vector<uint16_t>{3} : std::vector<uint16_t>{})));
    const auto answers = option_answers(wire_->received);
    wire_->received.clear();
    return answers && !answers->empty() && answers->back().type == kRepAck;
  }
  std::optional<Reply> reply(size_t read_size = 0) { return take_reply(wire_->received, read_size); }
  // The error of the next simple reply or error chunk, 0 for success; -1 when there is none.
  int64_t error(size_t read_size = 0) {
    const auto answer = reply(read_size);
    return answer ? static_cast<int64_t>(answer->error) : -1;
  }
  // Sends one request and gives the error of its reply.
  int64_t ask(uint16_t command, uint16_t flags, uint64_t offset, uint32_t length, ByteSpan payload = {}) {
    send(request(command, flags, ++cookie_, offset, length, payload));
    return error(command == kCmdRead ? length : 0);
  }
  void disconnect() {
    if (wire_->handler == nullptr) return;
    StreamHandler* handler = wire_->handler;
    wire_->handler = nullptr;
    handler->stream_closed(0);
    executor_.run();
  }
  void read_again() {
    wire_->client_reads = true;
    MemoryStream::take(*wire_);
    executor_.run();
  }
  Wire& wire() { return *wire_; }
  bool open() const { return wire_->open; }

 private:
  ManualExecutor& executor_;
  std::shared_ptr<Wire> wire_;
  uint64_t cookie_ = 0;
};

}  // namespace vmferry::nbd_test
