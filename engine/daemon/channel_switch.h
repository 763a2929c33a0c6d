// SPDX-License-Identifier: Apache-2.0
//
// A group's channel that is always there: forwards to the peer's link when the group has a peer, and is a disconnected
// channel otherwise. Sender, receiver and coordinator keep one reference for their whole life.
// Threads: the group's executor.
#pragma once

#include <memory>

#include "engine/replicate/peer_channel.h"

namespace vmferry {

class ChannelSwitch final : public GroupChannel {
 public:
  void set(std::unique_ptr<GroupChannel> target) { target_ = std::move(target); }
  bool has_target() const { return target_ != nullptr; }

  bool connected() const override { return target_ != nullptr && target_->connected(); }
  bool peer_has(uint64_t feature) const override { return target_ != nullptr && target_->peer_has(feature); }
  void send(TrafficClass traffic, MessageType type, Bytes payload) override {
    if (target_ != nullptr) target_->send(traffic, type, std::move(payload));
  }
  uint64_t queued_bytes(TrafficClass traffic) const override {
    return target_ != nullptr ? target_->queued_bytes(traffic) : 0;
  }
  uint64_t queue_limit(TrafficClass traffic) const override {
    return target_ != nullptr ? target_->queue_limit(traffic) : 0;
  }
  LinkFigures figures() const override { return target_ != nullptr ? target_->figures() : LinkFigures{}; }

 private:
  std::unique_ptr<GroupChannel> target_;
};

}  // namespace vmferry
