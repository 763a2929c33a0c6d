// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/commands.h"
#include "engine/daemon/daemon.h"

namespace vmferry {

namespace {

void invite(Daemon& daemon, const RpcCallPtr& call) {
  const auto address = call->text("address");
  const auto grant = call->optional_text("grant");
  if (!address) return call->error(address.error());
  if (!grant) return call->error(grant.error());
  const auto endpoint = Endpoint::parse(*address);
  if (!endpoint || endpoint->is_unix || endpoint->port == 0 || endpoint->host.empty()) {
    return call->error({ErrorKind::InvalidArgument, fmt::format("--address '{}' is not HOST:PORT", *address)});
  }
  InviteOptions options;
  options.addresses = {endpoint->to_string()};
  // Named and empty is a mistake, of a script for one: it must not grant everything.
  if (call->params().contains("grant")) {
    const auto rights = parse_rights(*grant);
    if (!rights) return call->error(rights.error());
    options.grants = *rights;
  }
  daemon.peers().invite(options, [call](const Result<Invitation>& invitation) {
    if (!invitation) return call->error(invitation.error());
    call->result({{"token", invitation->token},
                  {"grants", to_string(invitation->grants)},
                  {"lifetime_s", invitation->lifetime_s}});
  });
}

void join(Daemon& daemon, const RpcCallPtr& call) {
  const auto token = call->text("token");
  const auto name = call->text("name");
  const auto as = call->optional_text("as");
  if (!token) return call->error(token.error());
  if (!name) return call->error(name.error());
  if (!as) return call->error(as.error());
  for (const std::string* given : {&*name, &*as}) {
    if (given == &*as && as->empty()) continue;
    if (!is_valid_name(*given)) {
      return call->error({ErrorKind::InvalidArgument, fmt::format("'{}' is not a name for a peer", *given)});
    }
  }
  daemon.peers().join({.token = *token, .name = *name, .as = *as}, [call](const Result<JoinOutcome>& outcome) {
    if (!outcome) return call->error(outcome.error());
    call->result({{"name", outcome->name},
                  {"as", outcome->their_name_for_us},
                  {"grants", to_string(outcome->granted_to_them)},
                  {"granted_to_us", to_string(outcome->granted_to_us)}});
  });
}

Json peer_json(const PeerStatus& peer) {
  return {{"name", peer.record.name},
          {"connected", peer.connected},
          {"address", peer.record.addresses},
          {"grants", to_string(peer.record.rights)},
          {"granted_to_us", to_string(peer.record.granted)},
          {"rtt_ms", static_cast<double>(peer.figures.rtt) / 1e6},
          {"sent_bytes", peer.figures.sent_bytes},
          {"received_bytes", peer.figures.received_bytes},
          {"rate_limit", peer.rate_limit},
          {"version", peer.daemon_version},
          {"last_error", peer.last_error}};
}

void remove(Daemon& daemon, const RpcCallPtr& call) {
  const auto name = call->text("name");
  if (!name) return call->error(name.error());
  // By the record: those whose volumes have failed count as well.
  for (const auto& [id, group] : daemon.state().record().groups) {
    if (group.peer != *name) continue;
    return call->error(
        {ErrorKind::Busy, fmt::format("volume '{0}' belongs to peer '{1}'; end that first: vmferry replicate "
                                      "stop {0}",
                                      group.members.front(), *name)});
  }
  daemon.peers().remove(*name, [call](const Status& status) {
    if (status)
      call->result(Json::object());
    else
      call->error(status.error());
  });
}

}  // namespace

void add_peer_methods(RpcServer& server, Daemon& daemon) {
  server.add_method("peer.invite", [&daemon](const RpcCallPtr& call) { invite(daemon, call); });
  server.add_method("peer.join", [&daemon](const RpcCallPtr& call) { join(daemon, call); });
  server.add_method("peer.list", [&daemon](const RpcCallPtr& call) {
    Json peers = Json::array();
    for (const PeerStatus& peer : daemon.peers().list()) peers.push_back(peer_json(peer));
    call->result({{"peers", peers}, {"refusals", daemon.peers().refusals()}});
  });
  server.add_method("peer.ping", [&daemon](const RpcCallPtr& call) {
    const auto name = call->text("name");
    if (!name) return call->error(name.error());
    daemon.peers().ping(*name, [call](const Result<Nanoseconds>& rtt) {
      if (!rtt) return call->error(rtt.error());
      call->result({{"rtt_ms", static_cast<double>(*rtt) / 1e6}});
    });
  });
  server.add_method("peer.remove", [&daemon](const RpcCallPtr& call) { remove(daemon, call); });
}

}  // namespace vmferry
