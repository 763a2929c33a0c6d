// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "engine/base/random.h"
#include "engine/runtime/socket_stream.h"
#include "tests/unit/memory/loopback_channel.h"

namespace vmferry {
namespace {

// The two QEMUs: one writes a given stream, the other collects at a chosen speed.
class MemoryTransfer : public testing::Test {
 protected:
  void SetUp() override { reactor = std::move(*Reactor::create()); }

  struct Collector final : StreamHandler {
    Bytes bytes;
    void stream_readable(ByteSpan piece) override { bytes.insert(bytes.end(), piece.begin(), piece.end()); }
    void stream_writable() override {}
    void stream_closed(Errno) override {}
  };

  void start(Bytes stream, Nanoseconds delay = kMillisecond) {
    sent = std::move(stream);
    link = std::make_unique<LoopbackLink>(*reactor, delay);
    link->connect();
    auto out = make_socket_pair();
    auto in = make_socket_pair();
    ASSERT_TRUE(out.has_value() && in.has_value());
    qemu_out = std::make_unique<SocketStream>(*reactor, std::move(out->first), "qemu-out");
    qemu_in = std::make_unique<SocketStream>(*reactor, std::move(in->first), "qemu-in");
    qemu_in->set_handler(&collector);
    qemu_out->write(ByteSpan(sent));
    qemu_out->close_after_writing();
    from_qemu = std::move(out->second);
    to_qemu = std::move(in->second);
  }
  void start_sink() {
    sink = std::make_unique<MemorySink>(
        *reactor, link->at_sink, std::make_unique<SocketStream>(*reactor, std::move(to_qemu), "to"), attempt,
        MemorySink::Events{[this](bool equal) { complete = equal; }, [this](Error error) { sink_error = error; }});
    link->sink = sink.get();
  }
  void start_source(MemorySourceOptions options = {}) {
    options.attempt = attempt;
    source = std::make_unique<MemorySource>(
        *reactor, link->at_source, std::make_unique<SocketStream>(*reactor, std::move(from_qemu), "from"), options,
        MemorySource::Events{[this] { ended = true; }, [this](Error error) { source_error = error; }});
    link->source = source.get();
  }
  bool run(const std::function<bool()>& condition, Nanoseconds timeout = 30 * kSecond) {
    return reactor->run_until(condition, timeout);
  }
  void TearDown() override {
    if (link) link->source = nullptr, link->sink = nullptr;
    source.reset();
    sink.reset();
  }
  // Pages as guests have them: zero, text that repeats, noise.
  static Bytes memory_like(size_t size, uint64_t seed) {
    Random random(seed);
    Bytes bytes(size);
    for (size_t at = 0; at < size; at += 4096) {
      const uint64_t kind = random.below(4);
      for (size_t i = at; i < std::min(at + 4096, size) && kind != 0; ++i)
        bytes[i] = static_cast<uint8_t>(kind == 1 ? random.next() : 'a' + (i + seed) % (3 + kind * 5));
    }
    return bytes;
  }

  const Id128 attempt = random_id();
  std::unique_ptr<Reactor> reactor;
  Bytes sent;
  std::unique_ptr<LoopbackLink> link;
  std::unique_ptr<SocketStream> qemu_out, qemu_in;
  UniqueFd from_qemu, to_qemu;
  Collector collector;
  std::unique_ptr<MemorySource> source;
  std::unique_ptr<MemorySink> sink;
  std::optional<bool> complete;
  bool ended = false;
  std::optional<Error> source_error, sink_error;
};

// One byte changed, lost or doubled on the way is a guest that crashes at the destination.
TEST_F(MemoryTransfer, StreamArrivesIdenticalAndItsHashIsCompared) {
  start(memory_like(20'000'123, 1));
  start_sink();
  start_source();
  ASSERT_TRUE(run([&] { return complete.has_value(); })) << (sink_error ? sink_error->text : "");
  EXPECT_TRUE(*complete);
  EXPECT_TRUE(ended);
  ASSERT_TRUE(run([&] { return collector.bytes.size() == sent.size(); }));
  EXPECT_TRUE(collector.bytes == sent);
  ASSERT_TRUE(run([&] { return source->figures().queued_bytes == 0; }));
  EXPECT_EQ(source->figures().raw_bytes, sent.size());
  EXPECT_LT(source->figures().wire_bytes, sent.size() / 2) << "a quarter is noise, the rest compresses";
}

// Either side may be ready first, and the sink's first word may be lost.
TEST_F(MemoryTransfer, SourceMayStartBeforeTheSink) {
  start(memory_like(300'000, 2));
  start_source();
  EXPECT_FALSE(run([&] { return ended; }, 30 * kMillisecond));
  start_sink();
  ASSERT_TRUE(run([&] { return complete.has_value(); }));
  EXPECT_TRUE(*complete);
}

TEST_F(MemoryTransfer, EmptyStreamCompletes) {
  start({});
  start_sink();
  start_source();
  ASSERT_TRUE(run([&] { return complete.has_value(); }));
  EXPECT_TRUE(*complete);
}

// A cut at any moment: what was under way is sent again, once, with a new compression history.
TEST_F(MemoryTransfer, CutsAtRandomPointsOnlyDelay) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    complete.reset();
    ended = false;
    collector.bytes.clear();
    start(memory_like(6'000'000 + seed * 1000, seed), 500 * kMicrosecond);
    start_sink();
    start_source();
    Random random(seed);
    for (int cut = 0; cut < 6; ++cut) {
      run([&] { return complete.has_value(); },
          static_cast<Nanoseconds>(random.below(static_cast<uint64_t>(15 * kMillisecond))));
      link->cut();
      run([] { return false; }, static_cast<Nanoseconds>(random.below(static_cast<uint64_t>(3 * kMillisecond))));
      link->connect();
    }
    ASSERT_TRUE(run([&] { return complete.has_value(); }))
        << "seed " << seed << (sink_error ? sink_error->text : "") << (source_error ? source_error->text : "");
    EXPECT_TRUE(*complete) << seed;
    ASSERT_TRUE(run([&] { return collector.bytes.size() == sent.size(); })) << seed;
    EXPECT_TRUE(collector.bytes == sent) << seed;
    TearDown();
  }
}

// What is not sent yet when QEMU is stopped is paid during the pause; what is kept for repetition is memory (I9).
TEST_F(MemoryTransfer, SinkThatDoesNotReadHoldsQemuBackWithinTheLimit) {
  start(memory_like(60'000'000, 3));
  qemu_in->pause_reading(true);
  start_sink();
  start_source();
  run([] { return false; }, 500 * kMillisecond);
  const MemorySourceFigures figures = source->figures();
  EXPECT_LE(figures.queued_bytes, MemoryWindow::kLimitMax + 256_KiB);
  EXPECT_LT(figures.raw_bytes, 20_MiB);
  EXPECT_GT(qemu_out->unsent_bytes(), 30'000'000U) << "the brake: QEMU cannot get rid of its bytes";
  qemu_in->pause_reading(false);
  ASSERT_TRUE(run([&] { return complete.has_value(); }));
  EXPECT_TRUE(*complete);
}

TEST_F(MemoryTransfer, HeldSourceReadsNothing) {
  start(memory_like(3'000'000, 4));
  start_sink();
  start_source({.held = true});
  EXPECT_FALSE(run([&] { return source->figures().raw_bytes > 0; }, 50 * kMillisecond));
  source->hold(false);
  ASSERT_TRUE(run([&] { return source->figures().raw_bytes > 500'000; }));
  source->hold(true);
  run([] { return false; }, 20 * kMillisecond);
  const uint64_t before = source->figures().raw_bytes;
  EXPECT_FALSE(run([&] { return source->figures().raw_bytes > before; }, 50 * kMillisecond));
  source->hold(false);
  ASSERT_TRUE(run([&] { return complete.has_value(); }));
}

// Damage behind the TLS layer (a bug, a hostile peer) must end the attempt, not reach the guest as success.
TEST_F(MemoryTransfer, DamagedFramesAreDetected) {
  for (const size_t where : {size_t{20}, size_t{28}, size_t{34}, size_t{200}}) {
    complete.reset();
    sink_error.reset();
    start(memory_like(2'000'000, 5));
    int count = 0;
    link->tamper = [&](MessageType type, Bytes& payload) {
      if (type == MessageType::MemoryData && payload.size() > where && ++count == 2) payload[where] ^= 0x10;
    };
    start_sink();
    start_source();
    ASSERT_TRUE(run([&] { return sink_error.has_value() || complete.has_value(); }, 10 * kSecond)) << where;
    EXPECT_TRUE(sink_error || !*complete) << where;
    TearDown();
  }
}

TEST_F(MemoryTransfer, WrongHashAtTheEndIsReported) {
  start(memory_like(100'000, 6));
  link->tamper = [&](MessageType type, Bytes& payload) {
    if (type == MessageType::MemoryEnd) payload.back() ^= 1;
  };
  start_sink();
  start_source();
  ASSERT_TRUE(run([&] { return complete.has_value(); }));
  EXPECT_FALSE(*complete);
}

TEST_F(MemoryTransfer, DestinationThatClosesEarlyFailsTheAttempt) {
  start(memory_like(30'000'000, 7));
  start_sink();
  start_source();
  ASSERT_TRUE(run([&] { return collector.bytes.size() > 100'000; }));
  qemu_in.reset();
  ASSERT_TRUE(run([&] { return sink_error.has_value(); }));
  EXPECT_FALSE(complete.has_value());
}

TEST_F(MemoryTransfer, MessagesOfAnotherAttemptAreIgnored) {
  start(memory_like(200'000, 8));
  start_sink();
  start_source();
  sink->handle_end(encode(MemoryEnd{random_id(), 5, {}}));
  sink->handle_data(encode(MemoryData{random_id(), 1, 0, as_bytes("xxxxxxxx")}));
  source->handle_ack(encode(MemoryAck{random_id(), 99, 99}));
  ASSERT_TRUE(run([&] { return complete.has_value(); }));
  EXPECT_TRUE(*complete);
  EXPECT_FALSE(source_error || sink_error);
}

// A peer that acknowledges what it cannot have would make us forget bytes that it lacks.
TEST_F(MemoryTransfer, ImpossibleAcknowledgementsFailTheSource) {
  start(memory_like(200'000, 9));
  start_source();
  source->handle_ack(encode(MemoryAck{attempt, 1, 0}));
  ASSERT_TRUE(run([&] { return source_error.has_value(); }));
  EXPECT_EQ(source_error->kind, ErrorKind::Corrupt);
}

// A source that floods without waiting must not fill the sink's memory.
TEST_F(MemoryTransfer, FloodIsCutOff) {
  start({});
  qemu_in->pause_reading(true);
  start_sink();
  const Bytes garbage(kMemoryChunkSizeMax, 1);
  for (uint64_t i = 0; i < 200 && !sink_error; ++i)
    sink->handle_data(encode(MemoryData{attempt, 1, i * garbage.size(), garbage}));
  ASSERT_TRUE(run([&] { return sink_error.has_value(); }));
}

TEST(MemoryWindow, LimitFollowsRateBetweenPauseAndPipe) {
  MemoryWindow window(300 * kMillisecond);
  EXPECT_EQ(window.limit(), MemoryWindow::kLimitAtStart);
  uint64_t delivered = 0;
  Nanoseconds now = 0;
  const auto run = [&](uint64_t rate, int count) {
    for (int i = 0; i < count; ++i) {
      now += 100 * kMillisecond;
      delivered += rate / 10;
      window.acknowledged(delivered, now);
    }
  };
  run(12'500'000, 30);
  EXPECT_NEAR(static_cast<double>(window.limit()), 1'250'000, 50'000) << "a third of 300 ms at 100 Mbit/s";
  window.saw_round_trip(200 * kMillisecond);
  EXPECT_NEAR(static_cast<double>(window.limit()), 3'750'000, 50'000) << "1.5 round trips keep the link full";
  window.saw_round_trip(900 * kMillisecond);
  EXPECT_NEAR(static_cast<double>(window.limit()), 3'750'000, 50'000) << "our own queue does not count";
  run(1'000'000'000, 30);
  EXPECT_EQ(window.limit(), MemoryWindow::kLimitMax);
  run(1000, 40);
  EXPECT_EQ(window.limit(), MemoryWindow::kLimitMin);
}

}  // namespace
}  // namespace vmferry
