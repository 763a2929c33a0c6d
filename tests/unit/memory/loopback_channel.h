// SPDX-License-Identifier: Apache-2.0
//
// A link between a MemorySource and a MemorySink in one thread: delays messages, keeps them in order per class, and
// loses everything under way when it is cut.
#pragma once

#include <deque>

#include "engine/memory/memory_sink.h"
#include "engine/memory/memory_source.h"

namespace vmferry {

class LoopbackLink {
 public:
  class End final : public GroupChannel {
   public:
    End(LoopbackLink& link, bool to_sink) : link_(link), to_sink_(to_sink) {}
    bool connected() const override { return link_.connected_; }
    bool peer_has(uint64_t) const override { return link_.connected_; }
    void send(TrafficClass, MessageType type, Bytes payload) override {
      if (link_.connected_) link_.transport(to_sink_, type, std::move(payload));
    }
    uint64_t queued_bytes(TrafficClass) const override { return link_.queued_; }
    uint64_t queue_limit(TrafficClass) const override { return 512_KiB; }
    LinkFigures figures() const override { return {.rtt = 2 * link_.delay_}; }

   private:
    LoopbackLink& link_;
    bool to_sink_;
  };

  LoopbackLink(Executor& executor, Nanoseconds delay) : executor_(executor), delay_(delay) {}

  End at_source{*this, true};
  End at_sink{*this, false};
  MemorySource* source = nullptr;
  MemorySink* sink = nullptr;
  std::function<void(MessageType, Bytes&)> tamper;  // of what goes to the sink
  uint64_t messages = 0;

  void connect() {
    connected_ = true;
    if (source != nullptr) source->channel_connected();
    if (sink != nullptr) sink->channel_connected();
  }
  void cut() {
    connected_ = false;
    ++connection_;
    queued_ = 0;
    if (source != nullptr) source->channel_disconnected();
    if (sink != nullptr) sink->channel_disconnected();
  }

 private:
  void transport(bool to_sink, MessageType type, Bytes payload) {
    ++messages;
    if (to_sink) queued_ += payload.size();
    if (to_sink && tamper) tamper(type, payload);
    // Equal delays keep the order: timers of one deadline run in the order started.
    executor_.start_timer(
        delay_, [this, alive = alive_.token(), to_sink, type, connection = connection_, payload = std::move(payload)] {
          if (!alive() || connection != connection_) return;
          if (to_sink) {
            queued_ -= payload.size();
            if (sink != nullptr)
              type == MessageType::MemoryData ? sink->handle_data(payload) : sink->handle_end(payload);
            if (source != nullptr) source->channel_writable();
          } else if (source != nullptr) {
            source->handle_ack(payload);
          }
        });
  }

  Executor& executor_;
  Nanoseconds delay_;
  bool connected_ = false;
  uint64_t connection_ = 0;
  uint64_t queued_ = 0;
  Alive alive_;
};

}  // namespace vmferry
