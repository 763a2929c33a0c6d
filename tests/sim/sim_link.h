// SPDX-License-Identifier: Apache-2.0
//
// The link between the daemons of two hosts: encoded messages with delay and a rate, in order within a class, cut at
// any moment. A cut drops everything in flight; each side notices it at its own time, and what it sends until then is
// lost without a word.
// Threads: the world's.
#pragma once

#include <array>
#include <functional>
#include <memory>

#include "engine/replicate/peer_channel.h"
#include "tests/sim/sim_world.h"

namespace vmferry::sim {

struct SimLinkTotals {
  uint64_t messages = 0;
  uint64_t lost_messages = 0;
  uint64_t cuts = 0;
};

class SimLink {
 public:
  explicit SimLink(SimLinkTotals& totals) : totals_(totals) {}
  void set_executors(SimExecutor& a, SimExecutor& b) {
    ends_[0].executor = &a;
    ends_[1].executor = &b;
  }

  // The channel of one daemon's life; the daemon's group listens from attach() to detach().
  std::unique_ptr<GroupChannel> make_channel(size_t side) { return std::make_unique<Channel>(*this, side); }
  void attach(size_t side, GroupChannelHandler* handler) {
    ends_[side].handler = handler;
    ends_[side].aware = false;
    ++ends_[side].life;
    connect();
  }
  // The daemon is gone; the other side learns it when it notices.
  void detach(size_t side) {
    ends_[side].handler = nullptr;
    ends_[side].aware = false;
    ++ends_[side].life;
    drop();
  }
  void cut() {
    if (!up_) return;
    up_ = false;
    ++totals_.cuts;
    drop();
  }
  void heal() {
    up_ = true;
    connect();
  }
  bool up() const { return up_; }
  bool connected() const { return connected_; }

  std::function<void(size_t side, MessageType type, ByteSpan payload)> on_send;
  Nanoseconds delay = 2 * kMillisecond;
  uint64_t bytes_per_second = 20'000'000;

 private:
  struct End {
    SimExecutor* executor = nullptr;
    GroupChannelHandler* handler = nullptr;
    uint64_t life = 0;
    bool aware = false;  // thinks that it is connected
    std::array<uint64_t, kTrafficClassCount> queued{};
    std::array<Nanoseconds, kTrafficClassCount> ready_at{};
    std::array<Nanoseconds, kTrafficClassCount> arrives_at{};
    uint64_t sent_bytes = 0;
  };

  class Channel final : public GroupChannel {
   public:
    Channel(SimLink& link, size_t side) : link_(link), side_(side) {}
    bool connected() const override { return link_.ends_[side_].aware; }
    bool peer_has(uint64_t) const override { return connected(); }
    void send(TrafficClass traffic, MessageType type, Bytes payload) override {
      link_.send(side_, traffic, type, std::move(payload));
    }
    uint64_t queued_bytes(TrafficClass traffic) const override {
      return link_.ends_[side_].queued[static_cast<size_t>(traffic)];
    }
    uint64_t queue_limit(TrafficClass) const override { return kQueueLimit; }
    LinkFigures figures() const override {
      return {.rtt = 2 * link_.delay,
              .send_rate = link_.bytes_per_second,
              .sent_bytes = link_.ends_[side_].sent_bytes,
              .received_bytes = 0};
    }

   private:
    SimLink& link_;
    const size_t side_;
  };

  static constexpr uint64_t kQueueLimit = 128U << 10;

  void connect() {
    if (!up_ || connected_ || ends_[0].handler == nullptr || ends_[1].handler == nullptr) return;
    if (ends_[0].aware || ends_[1].aware) return;  // comes back when the cut was noticed
    connected_ = true;
    ++generation_;
    for (End& end : ends_) {
      end.queued = {};
      end.ready_at = {};
      end.arrives_at = {};
      end.executor->post([this, &end, life = end.life, generation = generation_] {
        if (end.life != life || generation != generation_) return;
        end.aware = true;
        end.handler->channel_connected();
      });
    }
  }

  void drop() {
    if (!connected_) return;
    connected_ = false;
    ++generation_;
    for (End& end : ends_) {
      if (end.handler == nullptr) continue;
      const auto notice = static_cast<Nanoseconds>(end.executor->world().random().below(30)) * kMillisecond;
      end.executor->start_timer(notice, [this, &end, life = end.life] {
        if (end.life != life || !end.aware) return;
        end.aware = false;
        end.queued = {};
        end.handler->channel_disconnected();
        connect();
      });
    }
  }

  void send(size_t side, TrafficClass traffic, MessageType type, Bytes payload) {
    if (!ends_[side].aware) return;
    ++totals_.messages;
    if (on_send) on_send(side, type, payload);
    End& from = ends_[side];
    End& to = ends_[1 - side];
    const auto at = static_cast<size_t>(traffic);
    const uint64_t size = payload.size() + 32;
    from.queued[at] += size;
    from.sent_bytes += size;
    if (!connected_) {
      ++totals_.lost_messages;
      return;
    }
    const Nanoseconds now = from.executor->now();
    const auto duration = static_cast<Nanoseconds>(size * static_cast<uint64_t>(kSecond) / bytes_per_second);
    from.ready_at[at] = std::max(from.ready_at[at], now) + duration;
    from.executor->start_timer(from.ready_at[at] - now, [this, &from, at, size, generation = generation_, traffic] {
      if (generation != generation_) return;
      const bool was_full = from.queued[at] >= kQueueLimit / 2;
      from.queued[at] -= size;
      if (was_full && from.queued[at] < kQueueLimit / 2) from.handler->channel_writable(traffic);
    });
    const auto jitter = static_cast<Nanoseconds>(from.executor->world().random().below(500)) * kMicrosecond;
    to.arrives_at[at] = std::max(to.arrives_at[at] + 1, from.ready_at[at] + delay + jitter);
    to.executor->start_timer(to.arrives_at[at] - now,
                             [this, &to, generation = generation_, type, payload = std::move(payload)] {
                               if (generation != generation_ || to.handler == nullptr) {
                                 ++totals_.lost_messages;
                                 return;
                               }
                               to.handler->channel_message(type, payload);
                             });
  }

  SimLinkTotals& totals_;
  std::array<End, 2> ends_;
  bool up_ = false;
  bool connected_ = false;
  uint64_t generation_ = 0;
};

}  // namespace vmferry::sim
