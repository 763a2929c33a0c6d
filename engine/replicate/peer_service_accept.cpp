// SPDX-License-Identifier: Apache-2.0
//
// PeerService, the accepting side: strangers that say Hello go to their link, those with a token are paired.
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/base/log.h"
#include "engine/replicate/peer_identity.h"
#include "engine/replicate/peer_service_parts.h"

namespace vmferry {

namespace {

// "10.0.0.1:4411" -> "10.0.0.1"; "" when it is no internet address (a test's stream, a unix socket).
std::string host_of(const std::string& peer_text) {
  return is_valid_peer_address(peer_text) ? peer_text.substr(0, peer_text.rfind(':')) : "";
}

std::vector<std::string> addresses_of(const JoinRequest& request, const std::string& peer_text) {
  std::vector<std::string> out;
  const std::string host = host_of(peer_text);
  if (request.listen_port != 0 && !host.empty()) out.push_back(fmt::format("{}:{}", host, request.listen_port));
  for (const std::string& address : request.addresses) {
    if (out.size() < kPeerAddressesMax && std::find(out.begin(), out.end(), address) == out.end()) {
      out.push_back(address);
    }
  }
  return out;
}

}  // namespace

void PeerService::accept(std::unique_ptr<ByteStream> stream) {
  if (!running_) return;
  auto tls = TlsSession::create(local_.identity, TlsSession::Side::Server);
  if (!tls) return note_refusal(tls.error().text);
  // Forty clients that stall in the handshake must not keep the forty-first out: the oldest makes room.
  if (strangers_.size() >= options_.strangers_max) strangers_.erase(strangers_.begin());
  const uint64_t id = next_id_++;
  auto connection = std::make_unique<PeerConnection>(executor_, std::move(stream), std::move(*tls));
  auto stranger = std::make_unique<Stranger>(*this, id, std::move(connection));
  Stranger& made = *stranger;
  strangers_.emplace(id, std::move(stranger));
  made.begin();
}

void PeerService::stranger_closed(uint64_t id, const Error& error) {
  const auto found = strangers_.find(id);
  if (found == strangers_.end()) return;
  note_refusal(fmt::format("{}: {}", found->second->connection->peer_text(), error.text));
  strangers_.erase(found);
}

void PeerService::reject(uint64_t id, RejectReason reason, const std::string& text) {
  auto node = strangers_.extract(id);
  note_refusal(fmt::format("{}: {}", node.mapped()->connection->peer_text(), text));
  node.mapped()->connection->send_and_close(
      MessageType::HelloReject,
      encode(HelloReject{
          .reason = reason, .version_min = local_.version_min, .version_max = local_.version_max, .text = text}));
}

void PeerService::stranger_message(uint64_t id, MessageType type, ByteSpan payload) {
  const auto found = strangers_.find(id);
  if (found == strangers_.end()) return;
  if (found->second->answering) return stranger_closed(id, {ErrorKind::Corrupt, "spoke before it was answered"});
  found->second->stop_timeout();
  switch (type) {
    case MessageType::Hello:
      return stranger_hello(id, payload);
    case MessageType::JoinRequest:
      return stranger_join(id, payload);
    case MessageType::HelloReject: {
      // It dialled us and does not want us: most likely our key is not the one that it has pinned.
      const auto said = decode_hello_reject(payload);
      const std::string text = fmt::format("the other side refuses us: {}", said ? said->text : said.error().text);
      const PeerRecord* record = directory_.find(found->second->connection->peer_key_hash());
      PeerLink* known = record != nullptr ? link(record->name) : nullptr;
      if (known != nullptr && !known->connected()) known->note_error(text);
      return stranger_closed(id, {ErrorKind::Mismatch, text});
    }
    default:
      return reject(id, RejectReason::Other,
                    fmt::format("the first message is of type {}, not Hello", static_cast<unsigned>(type)));
  }
}

void PeerService::stranger_hello(uint64_t id, ByteSpan payload) {
  const KeyHash key = strangers_.at(id)->connection->peer_key_hash();
  const PeerRecord* const record = directory_.find(key);
  PeerLink* const known = record != nullptr ? link(record->name) : nullptr;
  if (known == nullptr) {
    return reject(id, RejectReason::KeyNotPinned,
                  fmt::format("the key {} is not paired here; pair the daemons with 'vmferry peer invite' and "
                              "'vmferry peer join'",
                              to_hex(key)));
  }
  const auto hello = decode_hello(payload);
  if (!hello) return reject(id, RejectReason::Other, hello.error().text);
  auto node = strangers_.extract(id);
  known->accept(std::move(node.mapped()->connection), *hello);
}

void PeerService::reply_join(uint64_t id, const JoinReply& reply) {
  auto node = strangers_.extract(id);
  if (node.empty()) return;  // the joiner has gone meanwhile
  if (reply.result != JoinResult::Ok) {
    note_refusal(fmt::format("{}: pairing: {}", node.mapped()->connection->peer_text(), reply.text));
  }
  node.mapped()->connection->send_and_close(MessageType::JoinReply, encode(reply));
}

void PeerService::stranger_join(uint64_t id, ByteSpan payload) {
  Stranger& stranger = *strangers_.at(id);
  const auto request = decode_join_request(payload);
  if (!request) return reject(id, RejectReason::Other, request.error().text);
  if (request->version_max < local_.version_min || request->version_min > local_.version_max) {
    return reply_join(
        id, {.result = JoinResult::Version,
             .text = fmt::format("the inviter speaks protocol versions {}..{}, the joiner {}..{}", local_.version_min,
                                 local_.version_max, request->version_min, request->version_max)});
  }
  const auto exporter = stranger.connection->export_secret(kJoinExporterLabel);
  if (!exporter) return reject(id, RejectReason::Other, exporter.error().text);
  const Bytes statement = join_statement(*exporter, own_key(), stranger.connection->peer_key_hash(), *request);
  const InviteBook::Verdict verdict = invites_.judge(*request, statement, now_s());
  stranger.answering = true;
  if (verdict.result == JoinResult::Ok) return admit(id, *request, verdict);
  const JoinReply reply{.result = verdict.result, .text = verdict.text};
  if (!verdict.changed) return reply_join(id, reply);
  save([this, alive = alive_.token(), id, reply](const Status&) {
    if (alive()) reply_join(id, reply);
  });
}

// The proof is good and the token used up: pins the joiner's key, durably, before it hears of it.
void PeerService::admit(uint64_t id, const JoinRequest& request, const InviteBook::Verdict& verdict) {
  const PeerConnection& connection = *strangers_.at(id)->connection;
  const KeyHash key = connection.peer_key_hash();
  const PeerRecord* const before = directory_.find(key);
  // A daemon that pairs again keeps the name under which replications know it.
  PeerRecord record{.name = before != nullptr ? before->name : directory_.unique_name(request.requested_name),
                    .key = key,
                    .addresses = addresses_of(request, connection.peer_text()),
                    .rights = verdict.grants,
                    .granted = request.grants,
                    .their_name_for_us = {},
                    .paired_at_s = now_s()};
  const bool is_new = before == nullptr;
  const Status added = is_new ? directory_.add(record) : directory_.update(record);
  if (!added) return reply_join(id, {.result = JoinResult::Refused, .text = added.error().text});
  invites_.note_user(request.token, record.name);
  save([this, alive = alive_.token(), id, record = std::move(record), is_new](const Status& saved) {
    if (!alive()) return;
    if (!saved) {
      if (is_new) directory_.remove(record.name);
      return reply_join(id,
                        {.result = JoinResult::Refused, .text = "the inviter cannot store it: " + saved.error().text});
    }
    log::info("peer={} state=paired key={} grants=\"{}\"", record.name, to_hex(record.key), to_string(record.rights));
    reply_join(id, {.result = JoinResult::Ok,
                    .text = {},
                    .your_name = record.name,
                    .grants = record.rights,
                    .node_id = node_id_of(own_key())});
    if (PeerLink* known = link(record.name)) {
      known->set_addresses(record.addresses);
    } else if (running_) {
      make_link(record);
    }
  });
}

}  // namespace vmferry
