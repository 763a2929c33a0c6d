// SPDX-License-Identifier: Apache-2.0
//
// All that a daemon has to do with its peers: who they are, how they are paired, and the links to them.
//
// Flow: the daemon creates one, loads what it saved, hands it accepted streams, and calls the `peer` commands of
// design section 9. A stranger's connection ends here; a peer's goes to its PeerLink.
// Threads: the executor's thread. See docs/replication-protocol.md sections 1 to 3.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "engine/replicate/pairing.h"
#include "engine/replicate/peer_directory.h"
#include "engine/replicate/peer_link.h"

namespace vmferry {

class PeerServiceHandler : public PeerLinkHandler {
 public:
  // Makes peers and tokens durable; `state` is what load() takes. `done` may run inline. Saves complete in order.
  virtual void save_peers(const nlohmann::json& state, std::function<void(Status)> done) = 0;
  virtual void peer_added(PeerLink& link) = 0;
  virtual void peer_removed(const std::string& name) = 0;  // its link is gone when this returns

 protected:
  ~PeerServiceHandler() = default;
};

struct PeerServiceOptions {
  PeerLinkOptions link{};
  std::string daemon_version{};
  std::string default_name = "peer";  // what inviters call us when `--as` is not given: the host name
  // Where inviters can dial us afterwards: the port at the address they see, then these. 0: we do not listen.
  uint16_t listen_port = 0;
  std::vector<std::string> listen_addresses{};
  Nanoseconds first_message_timeout = 10 * kSecond;  // for a stranger to finish TLS and say what it wants
  size_t strangers_max = 64;                         // beyond, the oldest is dropped for the newest
  uint64_t features = kFeaturesKnown;
  uint64_t features_required = 0;
  uint16_t version_min = kProtocolVersionMin;
  uint16_t version_max = kProtocolVersionMax;
};

struct InviteOptions {
  std::vector<std::string> addresses;  // "HOST:PORT" under which the joiner reaches us; at least one
  PeerRights grants{};                 // what the joiner may do here
};
struct Invitation {
  std::string token;  // one line; whoever has it may join
  PeerRights grants{};
  int64_t lifetime_s = 0;
};
struct JoinOptions {
  std::string token;
  std::string name;     // what we call the inviter
  std::string as{};     // what it shall call us; "" = default_name
  PeerRights grants{};  // what the inviter may do here
};
struct JoinOutcome {
  std::string name;
  std::string their_name_for_us;
  PeerRights granted_to_them{};
  PeerRights granted_to_us{};
};

struct PeerStatus {
  PeerRecord record;
  bool connected = false;
  std::string last_error{};
  std::string daemon_version{};  // of the last connection
  LinkFigures figures{};
  uint64_t rate_limit = 0;
};

class PeerService {
 public:
  // `identity` and `handler` outlive the service.
  PeerService(Executor& executor, Dialer& dialer, const TlsIdentity& identity, PeerServiceOptions options,
              PeerServiceHandler& handler);
  ~PeerService();

  // What save_peers() was given; null and [] mean nothing. Before start().
  Status load(const nlohmann::json& state);
  void start();  // begins to dial
  void stop();   // drops all connections; nothing is dialled or accepted any more

  // A connection that the daemon's listener accepted.
  void accept(std::unique_ptr<ByteStream> stream);

  void invite(const InviteOptions& options, std::function<void(Result<Invitation>)> done);
  void join(const JoinOptions& options, std::function<void(Result<JoinOutcome>)> done);
  void remove(const std::string& name, std::function<void(Status)> done);
  void ping(const std::string& name, PeerLink::PingDone done, Nanoseconds timeout = 5 * kSecond);

  std::vector<PeerStatus> list() const;
  PeerLink* link(const std::string& name) const;  // null: no such peer
  const PeerRecord* find(const std::string& name) const { return directory_.find(name); }
  // Whether a peer may do something here; Denied names the right and how to give it.
  Status check_right(const std::string& name, bool PeerRights::*right) const;
  // The last connections that were turned away, newest last, for `status` and `events`.
  const std::deque<std::string>& refusals() const { return refusals_; }
  const KeyHash& own_key() const { return local_.identity.key_hash(); }

 private:
  class Stranger;
  struct Join;

  void stranger_message(uint64_t id, MessageType type, ByteSpan payload);
  void stranger_closed(uint64_t id, const Error& error);
  void stranger_hello(uint64_t id, ByteSpan payload);
  void stranger_join(uint64_t id, ByteSpan payload);
  void admit(uint64_t id, const JoinRequest& request, const InviteBook::Verdict& verdict);
  void reply_join(uint64_t id, const JoinReply& reply);
  void reject(uint64_t id, RejectReason reason, const std::string& text);
  void note_refusal(const std::string& text);

  void dial_join(uint64_t id);
  void join_answered(uint64_t id, Result<PeerDial::Answer> answer);
  void join_accepted(uint64_t id, const JoinReply& reply);
  void finish_join(uint64_t id, Result<JoinOutcome> outcome);

  void make_link(const PeerRecord& record);
  void drop_link(const std::string& name);
  void save(std::function<void(Status)> done);
  int64_t now_s() const { return executor_.wall_now() / kSecond; }

  Executor& executor_;
  Dialer& dialer_;
  PeerServiceOptions options_;
  PeerServiceHandler& handler_;
  LocalNode local_;
  bool running_ = false;
  PeerDirectory directory_;
  InviteBook invites_;
  std::map<std::string, std::unique_ptr<PeerLink>> links_;
  std::map<uint64_t, std::unique_ptr<Stranger>> strangers_;  // by number, so the first is the oldest
  std::map<uint64_t, std::unique_ptr<Join>> joins_;
  uint64_t next_id_ = 1;
  std::deque<std::string> refusals_;
  Nanoseconds refusals_window_ = 0;  // log lines about strangers are limited per window
  unsigned refusals_logged_ = 0;
  Alive alive_;
};

}  // namespace vmferry
