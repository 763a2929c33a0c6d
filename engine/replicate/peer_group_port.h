// SPDX-License-Identifier: Apache-2.0
//
// PeerLink's GroupChannel: one group's door to the link. Only for peer_link.cpp.
// Threads: the executor's thread.
#pragma once

#include "engine/replicate/peer_link.h"

namespace vmferry {

class PeerLink::GroupPort final : public GroupChannel {
 public:
  GroupPort(PeerLink& link, const Id128& group, GroupChannelHandler& handler)
      : link_(&link), group_(group), handler_(handler) {}
  ~GroupPort() override;

  bool connected() const override;
  bool peer_has(uint64_t feature) const override;
  void send(TrafficClass traffic, MessageType type, Bytes payload) override;
  uint64_t queued_bytes(TrafficClass traffic) const override;
  uint64_t queue_limit(TrafficClass traffic) const override;
  LinkFigures figures() const override;

  GroupChannelHandler& handler() { return handler_; }
  void detach() { link_ = nullptr; }  // the link is gone

  bool announced = false;  // the handler has been told of the present connection

 private:
  PeerLink* link_;  // null once the link is gone
  Id128 group_;
  GroupChannelHandler& handler_;
};

}  // namespace vmferry
