// SPDX-License-Identifier: Apache-2.0
//
// The link to one peer. It outlives connections: it dials again after each loss, queues by traffic class, obeys the
// rate cap, measures, and carries the messages of all groups and the control questions.
//
// Flow: PeerService owns one per peer and hands it authenticated incoming connections; groups talk through
// open_group(). Queues are emptied when a connection is lost (peer_channel.h says why).
// Threads: the executor's thread. See docs/replication-protocol.md sections 1 and 2.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/base/random.h"
#include "engine/replicate/link_queue.h"
#include "engine/replicate/link_rate.h"
#include "engine/replicate/peer_channel.h"
#include "engine/replicate/peer_dial.h"
#include "engine/replicate/peer_requests.h"

namespace vmferry {

struct PeerLinkOptions {
  Nanoseconds backoff_min = 200 * kMillisecond;
  Nanoseconds backoff_max = 10 * kSecond;
  Nanoseconds connect_timeout = 3 * kSecond;
  Nanoseconds answer_timeout = 5 * kSecond;
  Nanoseconds ping_interval = 2 * kSecond;
  Nanoseconds dead_after = 10 * kSecond;  // without a byte from the peer
  // Per TrafficClass. Producers stop at the limit; a queue of four times the limit and 16 MiB ends the connection,
  // because then a producer has not obeyed.
  std::array<uint64_t, kTrafficClassCount> queue_limits = {1_MiB, 8_MiB, 1_MiB, 4_MiB};
  LinkQueue::Weights weights{};
  // Bytes that may wait in the stream, outside of the priorities, besides what the kernel holds unsent.
  size_t stream_unsent_max = 128_KiB;
};

// What this daemon says about itself; outlives all links.
struct LocalNode {
  const TlsIdentity& identity;
  Id128 boot_id;
  std::string daemon_version;
  uint64_t features = kFeaturesKnown;
  uint64_t features_required = 0;
  uint16_t version_min = kProtocolVersionMin;
  uint16_t version_max = kProtocolVersionMax;

  Hello hello(const std::string& our_name_for_them) const;
};

class PeerLink;

// Implemented by the daemon (through PeerService). A link may not be destroyed inside these calls; PeerService::remove
// takes care of that.
class PeerLinkHandler {
 public:
  virtual void link_connected(PeerLink& link) = 0;
  virtual void link_disconnected(PeerLink& link, const Error& error) = 0;
  // A message for a group that nobody has opened. When it is open on return, the message is delivered to it.
  virtual void link_unknown_group(PeerLink& link, const Id128& group, MessageType type, ByteSpan payload) = 0;
  // A control question. `answer` may be called at once or later; the last call wins nothing: only the first counts.
  virtual void link_request(PeerLink& link, const std::string& method, const std::string& json,
                            PeerRequests::Answer answer) = 0;

 protected:
  ~PeerLinkHandler() = default;
};

class PeerLink final : private PeerConnectionHandler {
 public:
  struct Target {
    std::string name;
    KeyHash key{};
    std::vector<std::string> addresses;
  };
  using PingDone = std::function<void(Result<Nanoseconds>)>;

  PeerLink(Executor& executor, Dialer& dialer, const LocalNode& local, const PeerLinkOptions& options, Target target,
           PeerLinkHandler& handler);
  ~PeerLink();
  PeerLink(const PeerLink&) = delete;
  PeerLink& operator=(const PeerLink&) = delete;

  void start();  // begins to dial, when there is an address
  // Ends the connection and never dials again; groups are told. Before the link is destroyed.
  void stop(const Error& reason);
  // Ends the connection and dials at once; all groups say hello again.
  void reconnect(const Error& reason);
  void set_addresses(std::vector<std::string> addresses);

  const std::string& name() const { return target_.name; }
  const KeyHash& key() const { return target_.key; }
  bool connected() const { return up_ != nullptr; }
  const Negotiated& negotiated() const { return negotiated_; }   // of the last connection
  const Hello& peer_hello() const { return peer_hello_; }        // of the last connection
  const std::string& last_error() const { return last_error_; }  // "" when connected and nothing went wrong before
  LinkFigures figures() const;

  // The channel outlives the link safely, but is dead then. One per group; `handler` outlives the channel.
  // channel_connected() follows from a task when the link is up.
  std::unique_ptr<GroupChannel> open_group(const Id128& group, GroupChannelHandler& handler);

  void request(const std::string& method, std::string json, PeerRequests::Done done,
               Nanoseconds timeout = 10 * kSecond);
  // Round trip. Without a connection it waits for one, and dials at once; Timeout (with the last error) after that.
  void ping(PingDone done, Nanoseconds timeout = 5 * kSecond);

  void set_rate_limit(uint64_t bytes_per_s);  // 0: none
  uint64_t rate_limit() const { return limiter_.rate(); }
  void set_weights(const LinkQueue::Weights& weights) { queue_.set_weights(weights); }
  void set_queue_limit(TrafficClass traffic, uint64_t bytes) { options_.queue_limits[lane_of(traffic)] = bytes; }

  // An incoming connection whose key is this peer's, with its Hello. Answers Hello or HelloReject.
  void accept(std::unique_ptr<PeerConnection> connection, const Hello& hello);
  // What a rejection at pairing or by PeerService has to say about this peer.
  void note_error(const std::string& text) { last_error_ = text; }

 private:
  class GroupPort;
  struct WaitingPing {
    PingDone done;
    std::unique_ptr<Timer> timeout;
  };

  // Dialling
  void dial_after(Nanoseconds delay);
  void dial();
  void dialled(Result<PeerDial::Answer> answer);
  void dial_failed(const std::string& text);
  bool is_preferred(bool dialled_by_us, const Hello& theirs) const;

  // One connection
  void adopt(std::unique_ptr<PeerConnection> connection, bool dialled_by_us, const Hello& theirs,
             const Negotiated& negotiated);
  void drop_connection(const Error& error);
  void connection_established() override {}
  void connection_message(MessageType type, ByteSpan payload) override;
  void connection_writable() override { schedule_pump(); }
  void connection_closed(const Error& error) override { drop_connection(error); }
  void group_message(MessageType type, ByteSpan payload);
  void take_pong(ByteSpan payload);
  void watch_peer();
  void send_ping();

  // Sending
  void send(TrafficClass traffic, MessageType type, const std::optional<Id128>& group, Bytes payload);
  void schedule_pump();
  void pump();
  void tell_writable();

  GroupPort* find_group(const Id128& group);
  void announce(GroupPort& port);
  std::vector<Id128> group_ids() const;

  Executor& executor_;
  Dialer& dialer_;
  const LocalNode& local_;
  PeerLinkOptions options_;
  Target target_;
  PeerLinkHandler& handler_;

  bool started_ = false;
  size_t next_address_ = 0;
  unsigned failures_ = 0;  // in a row; the backoff grows with it
  std::string last_error_;
  std::unique_ptr<PeerDial> dial_;
  Timer dial_timer_;
  Random jitter_;

  std::unique_ptr<PeerConnection> up_;  // null: not connected
  bool up_dialled_by_us_ = false;
  Nanoseconds up_since_ = 0;
  Hello peer_hello_;
  Negotiated negotiated_;
  Timer watch_timer_;
  Nanoseconds pinged_at_ = 0;

  LinkQueue queue_;
  std::array<bool, kTrafficClassCount> stopped_{};  // at the limit: the groups are owed channel_writable()
  bool pump_posted_ = false;
  Timer pump_timer_;
  RateLimiter limiter_;
  RateMeter meter_;
  Bytes chunk_;
  uint64_t sent_bytes_ = 0;
  uint64_t received_before_ = 0;  // by earlier connections
  RttMeter rtt_;

  std::map<Id128, GroupPort*> groups_;
  PeerRequests requests_;
  std::map<uint64_t, WaitingPing> pings_;  // by number; answered by the next pong
  uint64_t next_ping_ = 1;
  std::vector<uint64_t> ping_stamps_;  // sent and not yet answered, oldest first
  Alive alive_;
};

}  // namespace vmferry
