// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/peer_requests.h"

#include <utility>

namespace vmferry {

void PeerRequests::refuse_later(Done done, Error error) {
  executor_.post([alive = alive_.token(), done = std::move(done), error = std::move(error)] {
    if (alive()) done(tl::unexpected(error));
  });
}

void PeerRequests::request(const std::string& method, std::string json, Nanoseconds timeout, Done done) {
  if (json.size() > kPeerRequestTextMax || method.size() > kPeerMethodSizeMax) {
    return refuse_later(std::move(done), {ErrorKind::LimitExceeded, fmt::format("request '{}' is too long", method)});
  }
  if (outgoing_.size() >= kOutgoingMax) {
    return refuse_later(std::move(done),
                        {ErrorKind::Busy, fmt::format("{} requests to the peer are waiting already", kOutgoingMax)});
  }
  const uint64_t id = next_id_++;
  Waiting& waiting = outgoing_[id];
  waiting = {.method = method, .done = std::move(done), .timeout = std::make_unique<Timer>(executor_)};
  waiting.timeout->start(timeout, [this, id, timeout] {
    auto node = outgoing_.extract(id);
    timed_out_.insert(id);
    if (timed_out_.size() > kOutgoingMax) timed_out_.erase(timed_out_.begin());
    node.mapped().done(fail(ErrorKind::Timeout, "the peer did not answer '{}' within {} ms", node.mapped().method,
                            timeout / kMillisecond));
  });
  send_(MessageType::PeerRequest, encode(PeerRequest{.id = id, .method = method, .json = std::move(json)}));
}

Status PeerRequests::take_request(ByteSpan payload) {
  auto request = decode_peer_request(payload);
  if (!request) return tl::unexpected(request.error());
  const uint64_t id = request->id;
  if (incoming_.contains(id)) return fail(ErrorKind::Corrupt, "the peer used request id {} twice", id);
  const uint64_t generation = generation_;
  if (incoming_.size() >= kIncomingMax) {
    incoming_.insert(id);
    answer(generation, id, fail(ErrorKind::Busy, "{} requests are being answered already", kIncomingMax));
    return {};
  }
  incoming_.insert(id);
  serve_(request->method, request->json, [this, alive = alive_.token(), generation, id](Result<std::string> result) {
    if (alive()) answer(generation, id, result);
  });
  return {};
}

void PeerRequests::answer(uint64_t generation, uint64_t id, const Result<std::string>& result) {
  if (generation != generation_ || incoming_.erase(id) == 0) return;  // asked over a connection that is gone
  PeerReply reply{.id = id, .ok = result.has_value()};
  if (result.has_value() && result->size() > kPeerRequestTextMax) {
    reply.ok = false;
    reply.error = ErrorKind::LimitExceeded;
    reply.text = fmt::format("the answer is longer than {} bytes", kPeerRequestTextMax);
  } else if (result.has_value()) {
    reply.text = *result;
  } else {
    reply.error = result.error().kind;
    reply.text = result.error().text.substr(0, 4096);
  }
  send_(MessageType::PeerReply, encode(reply));
}

Status PeerRequests::take_reply(ByteSpan payload) {
  auto reply = decode_peer_reply(payload);
  if (!reply) return tl::unexpected(reply.error());
  if (timed_out_.erase(reply->id) != 0) return {};
  auto node = outgoing_.extract(reply->id);
  if (node.empty()) return fail(ErrorKind::Corrupt, "the peer answered request {} which was not asked", reply->id);
  if (reply->ok) {
    node.mapped().done(std::move(reply->text));
  } else {
    node.mapped().done(tl::unexpected(Error{reply->error, std::move(reply->text)}));
  }
  return {};
}

void PeerRequests::disconnected(const Error& error) {
  ++generation_;
  incoming_.clear();
  timed_out_.clear();
  // From tasks: a `done` that asks again or removes the peer must not find us in the middle of this.
  for (auto& [id, waiting] : std::exchange(outgoing_, {})) refuse_later(std::move(waiting.done), error);
}

}  // namespace vmferry
