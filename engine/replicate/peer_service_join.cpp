// SPDX-License-Identifier: Apache-2.0
//
// PeerService, the joining side of `peer join`: dial the inviter, prove the token, pin its key.
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/base/log.h"
#include "engine/replicate/peer_identity.h"
#include "engine/replicate/peer_service_parts.h"

namespace vmferry {

namespace {

ErrorKind to_error_kind(JoinResult result) {
  switch (result) {
    case JoinResult::Version:
      return ErrorKind::Mismatch;
    case JoinResult::Refused:
    case JoinResult::Ok:
      return ErrorKind::Internal;
    default:
      return ErrorKind::Denied;
  }
}

}  // namespace

void PeerService::join(const JoinOptions& options, std::function<void(Result<JoinOutcome>)> done) {
  constexpr size_t kJoinsMax = 8;
  const uint64_t id = next_id_++;
  auto join = std::make_unique<Join>();
  join->options = options;
  join->done = std::move(done);
  if (join->options.as.empty()) join->options.as = options_.default_name;
  const auto refuse = [&](const Error& error) {
    executor_.post([done = std::move(join->done), error] { done(tl::unexpected(error)); });
  };
  for (const std::string& name : {join->options.name, join->options.as}) {
    if (!is_valid_name(name)) {
      return refuse(
          {ErrorKind::InvalidArgument,
           fmt::format("'{}' is not a name: letters, digits, '.', '_' and '-', at most 64", printable(name, 64))});
    }
  }
  auto token = decode_token(options.token);
  if (!token) return refuse(token.error());
  if (token->inviter_key == own_key()) {
    return refuse({ErrorKind::InvalidArgument, "the token was made by this daemon: use it on the other host"});
  }
  const PeerRecord* const named = directory_.find(options.name);
  if (named != nullptr && named->key != token->inviter_key) {
    return refuse({ErrorKind::Exists, fmt::format("another peer is called '{}' already", options.name)});
  }
  const PeerRecord* const known = directory_.find(token->inviter_key);
  if (known != nullptr && known->name != options.name) {
    return refuse({ErrorKind::Exists, fmt::format("that daemon is known already, as peer '{}'", known->name)});
  }
  if (joins_.size() >= kJoinsMax || !running_) return refuse({ErrorKind::Busy, "too many joins are under way"});
  join->token = std::move(*token);
  joins_.emplace(id, std::move(join));
  dial_join(id);
}

void PeerService::dial_join(uint64_t id) {
  Join& join = *joins_.at(id);
  if (join.next_address >= join.token.addresses.size()) {
    return finish_join(id, fail(ErrorKind::Unavailable, "the inviter cannot be reached: {}", join.failures));
  }
  join.dial = std::make_unique<PeerDial>(
      executor_, dialer_, local_.identity,
      PeerDialOptions{.address = join.token.addresses[join.next_address++],
                      .pinned_key = join.token.inviter_key,
                      .connect_timeout = 2 * options_.link.connect_timeout,
                      .answer_timeout = 2 * options_.link.answer_timeout},
      [this, id](const PeerConnection& connection) -> Result<PeerDial::FirstMessage> {
        const Join& asking = *joins_.at(id);
        const auto exporter = connection.export_secret(kJoinExporterLabel);
        if (!exporter) return tl::unexpected(exporter.error());
        JoinRequest request{.version_min = local_.version_min,
                            .version_max = local_.version_max,
                            .token = asking.token.id,
                            .node_id = node_id_of(own_key()),
                            .requested_name = asking.options.as,
                            .grants = asking.options.grants,
                            .listen_port = options_.listen_port,
                            .addresses = options_.listen_addresses};
        const Bytes statement = join_statement(*exporter, asking.token.inviter_key, own_key(), request);
        const auto proof = sign_with_token(asking.token.secret, statement);
        if (!proof) return tl::unexpected(proof.error());
        request.proof = *proof;
        return PeerDial::FirstMessage{MessageType::JoinRequest, encode(request)};
      },
      [this, id](Result<PeerDial::Answer> answer) { join_answered(id, std::move(answer)); });
}

void PeerService::join_answered(uint64_t id, Result<PeerDial::Answer> answer) {
  Join& join = *joins_.at(id);
  const std::unique_ptr<PeerDial> finished = std::move(join.dial);
  if (!answer) {
    // Once the proof is out, another try would find the token used: the error is the result.
    if (finished->first_message_sent()) return finish_join(id, tl::unexpected(answer.error()));
    join.failures += (join.failures.empty() ? "" : "; ") + answer.error().text;
    return dial_join(id);
  }
  answer->connection->close();
  if (answer->type == MessageType::HelloReject) {
    const auto reject = decode_hello_reject(answer->payload);
    return finish_join(
        id, fail(ErrorKind::Mismatch, "the inviter refuses us: {}", reject ? reject->text : reject.error().text));
  }
  if (answer->type != MessageType::JoinReply) {
    return finish_join(id, fail(ErrorKind::Corrupt, "the inviter does not answer with JoinReply"));
  }
  const auto reply = decode_join_reply(answer->payload);
  if (!reply) return finish_join(id, tl::unexpected(reply.error()));
  if (reply->result != JoinResult::Ok) {
    return finish_join(id, fail(to_error_kind(reply->result), "the inviter refuses: {}", reply->text));
  }
  join_accepted(id, *reply);
}

void PeerService::join_accepted(uint64_t id, const JoinReply& reply) {
  const Join& join = *joins_.at(id);
  PeerRecord record{.name = join.options.name,
                    .key = join.token.inviter_key,
                    .addresses = join.token.addresses,
                    .rights = join.options.grants,
                    .granted = reply.grants,
                    .their_name_for_us = reply.your_name,
                    .paired_at_s = now_s()};
  const bool is_new = directory_.find(record.key) == nullptr;
  const Status added = is_new ? directory_.add(record) : directory_.update(record);
  if (!added) return finish_join(id, tl::unexpected(added.error()));
  save([this, alive = alive_.token(), id, record = std::move(record), is_new](const Status& saved) {
    if (!alive()) return;
    if (!saved) {
      if (is_new) directory_.remove(record.name);
      return finish_join(id, tl::unexpected(saved.error()));
    }
    log::info("peer={} state=paired key={} grants=\"{}\"", record.name, to_hex(record.key), to_string(record.rights));
    if (PeerLink* known = link(record.name)) {
      known->set_addresses(record.addresses);
    } else if (running_) {
      make_link(record);
    }
    finish_join(id, JoinOutcome{.name = record.name,
                                .their_name_for_us = record.their_name_for_us,
                                .granted_to_them = record.rights,
                                .granted_to_us = record.granted});
  });
}

void PeerService::finish_join(uint64_t id, Result<JoinOutcome> outcome) {
  auto node = joins_.extract(id);
  if (!node.empty()) node.mapped()->done(std::move(outcome));
}

}  // namespace vmferry
