// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/peer_service.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "engine/base/log.h"
#include "engine/replicate/peer_identity.h"
#include "engine/replicate/peer_service_parts.h"

namespace vmferry {

PeerService::PeerService(Executor& executor, Dialer& dialer, const TlsIdentity& identity, PeerServiceOptions options,
                         PeerServiceHandler& handler)
    : executor_(executor),
      dialer_(dialer),
      options_(std::move(options)),
      handler_(handler),
      local_{.identity = identity,
             .boot_id = executor.new_id(),
             .daemon_version = options_.daemon_version,
             .features = options_.features,
             .features_required = options_.features_required,
             .version_min = options_.version_min,
             .version_max = options_.version_max} {}

PeerService::~PeerService() = default;

Status PeerService::load(const nlohmann::json& state) {
  if (state.is_null() || state.empty()) return {};
  if (!state.is_object() || !state.contains("peers") || !state.contains("tokens")) {
    return fail(ErrorKind::Corrupt, "the saved peers are malformed");
  }
  auto directory = PeerDirectory::from_json(state.at("peers"));
  if (!directory) return tl::unexpected(directory.error());
  auto invites = InviteBook::from_json(state.at("tokens"));
  if (!invites) return tl::unexpected(invites.error());
  directory_ = std::move(*directory);
  invites_ = std::move(*invites);
  return {};
}

void PeerService::start() {
  running_ = true;
  for (const PeerRecord& record : directory_.peers()) make_link(record);
}

void PeerService::stop() {
  running_ = false;
  strangers_.clear();
  for (auto& [name, link] : links_) link->stop({ErrorKind::Unavailable, "this daemon is stopping"});
  for (auto& [id, join] : std::exchange(joins_, {})) {
    join->done(fail(ErrorKind::Unavailable, "this daemon is stopping"));
  }
}

void PeerService::save(std::function<void(Status)> done) {
  handler_.save_peers({{"peers", directory_.to_json()}, {"tokens", invites_.to_json()}}, std::move(done));
}

void PeerService::make_link(const PeerRecord& record) {
  auto link = std::make_unique<PeerLink>(
      executor_, dialer_, local_, options_.link,
      PeerLink::Target{.name = record.name, .key = record.key, .addresses = record.addresses}, handler_);
  PeerLink& made = *link;
  links_[record.name] = std::move(link);
  handler_.peer_added(made);
  made.start();
}

void PeerService::drop_link(const std::string& name) {
  auto node = links_.extract(name);
  if (node.empty()) return;
  node.mapped()->stop({ErrorKind::Denied, "the peer was removed"});
  // From a task: the command may have come from one of the link's own callbacks.
  executor_.post([link = std::shared_ptr<PeerLink>(std::move(node.mapped()))] {});
}

PeerLink* PeerService::link(const std::string& name) const {
  const auto found = links_.find(name);
  return found == links_.end() ? nullptr : found->second.get();
}

Status PeerService::check_right(const std::string& name, bool PeerRights::*right) const {
  const PeerRecord* record = directory_.find(name);
  if (record == nullptr) return fail(ErrorKind::NotFound, "there is no peer '{}'", printable(name, 64));
  if (record->rights.*right) return {};
  PeerRights missing = kNoRights;
  missing.*right = true;
  return fail(ErrorKind::Denied, "peer '{}' has no right '{}' here: remove it and invite it again with --grant", name,
              to_string(missing));
}

std::vector<PeerStatus> PeerService::list() const {
  std::vector<PeerStatus> out;
  for (const PeerRecord& record : directory_.peers()) {
    PeerStatus status{.record = record};
    if (const PeerLink* found = link(record.name)) {
      status.connected = found->connected();
      status.last_error = found->last_error();
      status.daemon_version = found->peer_hello().daemon_version;
      status.figures = found->figures();
      status.rate_limit = found->rate_limit();
    }
    out.push_back(std::move(status));
  }
  return out;
}

void PeerService::ping(const std::string& name, PeerLink::PingDone done, Nanoseconds timeout) {
  PeerLink* const found = link(name);
  if (found != nullptr) return found->ping(std::move(done), timeout);
  executor_.post([done = std::move(done), name] {
    done(fail(ErrorKind::NotFound, "there is no peer '{}'", printable(name, 64)));
  });
}

void PeerService::remove(const std::string& name, std::function<void(Status)> done) {
  if (auto removed = directory_.remove(name); !removed) {
    executor_.post([done = std::move(done), removed] { done(removed); });
    return;
  }
  // Its key is worth nothing from here on, whether or not the disk takes the news; a failed save is reported.
  drop_link(name);
  save([this, alive = alive_.token(), name, done = std::move(done)](const Status& saved) {
    if (!alive()) return;
    log::info("peer={} state=removed", name);
    handler_.peer_removed(name);
    done(saved);
  });
}

void PeerService::invite(const InviteOptions& options, std::function<void(Result<Invitation>)> done) {
  Status valid;
  if (options.addresses.empty() || options.addresses.size() > kPeerAddressesMax) {
    valid = fail(ErrorKind::InvalidArgument, "a token holds 1 to {} addresses", kPeerAddressesMax);
  }
  for (const std::string& address : options.addresses) {
    if (!is_valid_peer_address(address)) {
      valid = fail(ErrorKind::InvalidArgument, "'{}' is not HOST:PORT", printable(address, 255));
    }
  }
  auto token = valid ? invites_.issue(own_key(), options.addresses, options.grants, now_s())
                     : Result<PairingToken>(tl::unexpected(valid.error()));
  if (!token) {
    executor_.post([done = std::move(done), error = token.error()] { done(tl::unexpected(error)); });
    return;
  }
  Invitation invitation{.token = encode_token(*token), .grants = options.grants, .lifetime_s = InviteBook::kLifetimeS};
  save([done = std::move(done), invitation = std::move(invitation)](const Status& saved) {
    if (!saved) return done(tl::unexpected(saved.error()));
    done(invitation);
  });
}

void PeerService::note_refusal(const std::string& text) {
  constexpr size_t kRefusalsMax = 16;
  constexpr unsigned kLinesPerWindow = 10;
  constexpr Nanoseconds kWindow = 10 * kSecond;
  refusals_.push_back(text);
  if (refusals_.size() > kRefusalsMax) refusals_.pop_front();
  // Whoever can reach the port can cause these lines, so they are limited.
  if (refusals_logged_ == 0 || executor_.now() - refusals_window_ > kWindow) {
    refusals_window_ = executor_.now();
    refusals_logged_ = 0;
  }
  if (++refusals_logged_ <= kLinesPerWindow) log::warn("refused=\"{}\"", text);
}

}  // namespace vmferry
