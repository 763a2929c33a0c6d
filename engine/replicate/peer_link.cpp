// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/peer_link.h"

#include <algorithm>
#include <utility>

#include "engine/base/assert.h"
#include "engine/base/log.h"
#include "engine/replicate/peer_group_port.h"
#include "engine/replicate/peer_identity.h"

namespace vmferry {

namespace {

// Two daemons that dial each other at the same time make two connections, of which one is dropped again. The side
// with the greater key waits this much longer, so that it rarely happens.
constexpr Nanoseconds kSecondDiallerDelay = 300 * kMillisecond;
// A connection that lived this long was a good one: the next loss begins with the shortest backoff again.
constexpr Nanoseconds kGoodConnection = 2 * kSecond;

Id128 first_half(const KeyHash& key) {
  return node_id_of(key);
}

}  // namespace

Hello LocalNode::hello(const std::string& our_name_for_them) const {
  return {.version_min = version_min,
          .version_max = version_max,
          .features = features,
          .features_required = features_required,
          .node_id = first_half(identity.key_hash()),
          .boot_id = boot_id,
          .daemon_version = daemon_version,
          .your_name = our_name_for_them};
}

PeerLink::PeerLink(Executor& executor, Dialer& dialer, const LocalNode& local, const PeerLinkOptions& options,
                   Target target, PeerLinkHandler& handler)
    : executor_(executor),
      dialer_(dialer),
      local_(local),
      options_(options),
      target_(std::move(target)),
      handler_(handler),
      dial_timer_(executor),
      jitter_(xxh3_64(executor.new_id().bytes)),
      watch_timer_(executor),
      pump_timer_(executor),
      requests_(
          executor,
          [this](MessageType type, Bytes payload) {
            send(TrafficClass::Control, type, std::nullopt, std::move(payload));
          },
          [this](const std::string& method, const std::string& json, PeerRequests::Answer answer) {
            handler_.link_request(*this, method, json, std::move(answer));
          }) {
  queue_.set_weights(options_.weights);
}

PeerLink::~PeerLink() {
  for (auto& [id, port] : groups_) port->detach();
}

void PeerLink::start() {
  started_ = true;
  const bool we_wait = target_.key < local_.identity.key_hash();
  dial_after(we_wait ? kSecondDiallerDelay : 0);
}

void PeerLink::stop(const Error& reason) {
  started_ = false;
  target_.addresses.clear();
  dial_.reset();
  dial_timer_.cancel();
  drop_connection(reason);
}

void PeerLink::set_addresses(std::vector<std::string> addresses) {
  target_.addresses = std::move(addresses);
  next_address_ = 0;
  if (started_ && !up_ && !dial_) dial_after(0);
}

void PeerLink::dial_after(Nanoseconds delay) {
  if (target_.addresses.empty()) return;  // the peer dials us
  dial_timer_.start(delay, [this] { dial(); });
}

void PeerLink::dial() {
  if (up_ || dial_ || target_.addresses.empty()) return;
  dial_timer_.cancel();
  const std::string& address = target_.addresses[next_address_ % target_.addresses.size()];
  dial_ = std::make_unique<PeerDial>(
      executor_, dialer_, local_.identity,
      PeerDialOptions{.address = address,
                      .pinned_key = target_.key,
                      .connect_timeout = options_.connect_timeout,
                      .answer_timeout = options_.answer_timeout},
      [this](const PeerConnection&) -> Result<PeerDial::FirstMessage> {
        return PeerDial::FirstMessage{MessageType::Hello, encode(local_.hello(target_.name))};
      },
      [this](Result<PeerDial::Answer> answer) { dialled(std::move(answer)); });
}

void PeerLink::dialled(Result<PeerDial::Answer> answer) {
  const std::unique_ptr<PeerDial> finished = std::move(dial_);
  if (!answer) return dial_failed(answer.error().text);
  const std::string where = answer->connection->peer_text();
  if (answer->type == MessageType::HelloReject) {
    const auto reject = decode_hello_reject(answer->payload);
    if (reject && reject->reason == RejectReason::Duplicate && up_) return;
    return dial_failed(
        fmt::format("{} refuses us: {}", where, reject ? reject->text : std::string("for no reason that can be read")));
  }
  if (answer->type != MessageType::Hello) return dial_failed(fmt::format("{} does not answer with Hello", where));
  const auto hello = decode_hello(answer->payload);
  if (!hello) return dial_failed(fmt::format("{}: {}", where, hello.error().text));
  const auto negotiated = check_hello(local_.hello(target_.name), *hello);
  if (!negotiated) {
    answer->connection->send_and_close(MessageType::HelloReject, encode(negotiated.error()));
    return dial_failed(fmt::format("{}: {}", where, negotiated.error().text));
  }
  if (!is_preferred(true, *hello)) {
    const HelloReject reject{.reason = RejectReason::Duplicate, .text = "another connection is in use"};
    return answer->connection->send_and_close(MessageType::HelloReject, encode(reject));
  }
  adopt(std::move(answer->connection), true, *hello, *negotiated);
}

void PeerLink::dial_failed(const std::string& text) {
  if (text != last_error_) log::warn("peer={} error=\"{}\"", target_.name, text);
  if (!up_) last_error_ = text;
  ++next_address_;
  const unsigned doublings = std::min(failures_++, 16U);
  const Nanoseconds backoff = std::min(options_.backoff_min << doublings, options_.backoff_max);
  // 80..120 %, so that two daemons, or many after one cut, do not stay in step.
  const auto permille = static_cast<Nanoseconds>(800 + jitter_.below(401));
  if (!up_) dial_after(backoff / 1000 * permille);
}

// The rule that both sides come to alone: of two connections the one wins that the side with the smaller key dialled;
// a newer one of the same dialler replaces the older, which its dialler has given up; and a peer with another boot id
// has restarted, so whatever came before is dead.
bool PeerLink::is_preferred(bool dialled_by_us, const Hello& theirs) const {
  if (!up_ || theirs.boot_id != peer_hello_.boot_id || dialled_by_us == up_dialled_by_us_) return true;
  const bool ours_is_smaller = local_.identity.key_hash() < target_.key;
  return dialled_by_us == ours_is_smaller;
}

void PeerLink::accept(std::unique_ptr<PeerConnection> connection, const Hello& hello) {
  const Hello ours = local_.hello(target_.name);
  const auto negotiated = check_hello(ours, hello);
  if (!negotiated) {
    if (negotiated.error().text != last_error_) {
      log::warn("peer={} from={} refused=\"{}\"", target_.name, connection->peer_text(), negotiated.error().text);
    }
    if (!up_) last_error_ = negotiated.error().text;
    return connection->send_and_close(MessageType::HelloReject, encode(negotiated.error()));
  }
  if (!is_preferred(false, hello)) {
    const HelloReject reject{.reason = RejectReason::Duplicate, .text = "another connection is in use"};
    return connection->send_and_close(MessageType::HelloReject, encode(reject));
  }
  connection->send(MessageType::Hello, encode(ours));
  adopt(std::move(connection), false, hello, *negotiated);
}

void PeerLink::adopt(std::unique_ptr<PeerConnection> connection, bool dialled_by_us, const Hello& theirs,
                     const Negotiated& negotiated) {
  if (up_) drop_connection({ErrorKind::Unavailable, "replaced by a newer connection"});
  // An attempt that has not spoken yet can be dropped without a trace; one that has is settled by the peer's answer.
  if (dial_ && !dial_->first_message_sent()) dial_.reset();
  dial_timer_.cancel();
  up_ = std::move(connection);
  up_dialled_by_us_ = dialled_by_us;
  up_since_ = executor_.now();
  peer_hello_ = theirs;
  negotiated_ = negotiated;
  last_error_.clear();
  log::info("peer={} state=connected address={} dialled_by={} version={} daemon={}", target_.name, up_->peer_text(),
            dialled_by_us ? "us" : "peer", negotiated.version, theirs.daemon_version);
  up_->set_handler(*this);
  send_ping();
  watch_timer_.start(options_.ping_interval / 2, [this] { watch_peer(); });
  handler_.link_connected(*this);
  for (const Id128& id : group_ids()) {
    if (GroupPort* port = find_group(id); port != nullptr && up_) announce(*port);
  }
}

void PeerLink::reconnect(const Error& reason) {
  drop_connection(reason);
  if (started_ && !up_ && !dial_) dial_after(0);
}

void PeerLink::drop_connection(const Error& error) {
  if (!up_) return;
  received_before_ += up_->received_bytes();
  if (executor_.now() - up_since_ >= kGoodConnection) failures_ = 0;
  up_->close();
  // The connection may be the caller: it dies in a task of its own.
  executor_.post([connection = std::shared_ptr<PeerConnection>(std::move(up_))] {});
  log::warn("peer={} state=disconnected error=\"{}\"", target_.name, error.text);
  last_error_ = error.text;
  watch_timer_.cancel();
  pump_timer_.cancel();
  queue_.clear();
  meter_.idle(executor_.now());
  ping_stamps_.clear();
  stopped_ = {};
  requests_.disconnected({ErrorKind::Unavailable, fmt::format("peer '{}': {}", target_.name, error.text)});
  const Nanoseconds delay = options_.backoff_min << std::min(failures_++, 16U);
  dial_after(std::min(delay, options_.backoff_max));
  for (const Id128& id : group_ids()) {
    if (GroupPort* port = find_group(id); port != nullptr && port->announced) {
      port->announced = false;
      port->handler().channel_disconnected();
    }
  }
  handler_.link_disconnected(*this, error);
}

void PeerLink::connection_message(MessageType type, ByteSpan payload) {
  if (is_group_message(type)) return group_message(type, payload);
  Status taken;
  switch (type) {
    case MessageType::Ping:
      if (auto ping = decode_ping(payload); !ping) {
        taken = tl::unexpected(ping.error());
      } else {
        send(TrafficClass::Control, MessageType::Pong, std::nullopt, encode(*ping));
      }
      break;
    case MessageType::Pong:
      return take_pong(payload);
    case MessageType::PeerRequest:
      taken = requests_.take_request(payload);
      break;
    case MessageType::PeerReply:
      taken = requests_.take_reply(payload);
      break;
    case MessageType::HelloReject: {
      const auto reject = decode_hello_reject(payload);
      taken =
          fail(ErrorKind::Mismatch, "the peer ends the connection: {}", reject ? reject->text : reject.error().text);
      break;
    }
    default:
      taken = fail(ErrorKind::Corrupt, "message type {} does not belong here", static_cast<unsigned>(type));
  }
  if (!taken) drop_connection(taken.error());
}

void PeerLink::group_message(MessageType type, ByteSpan payload) {
  ByteReader reader(payload);
  Id128 group;
  reader.copy_to(MutableByteSpan(group.bytes));
  if (!reader.ok() || group.is_none()) {
    return drop_connection(
        {ErrorKind::Corrupt, fmt::format("message type {} without a group", static_cast<unsigned>(type))});
  }
  const ByteSpan body = reader.rest();
  const PeerConnection* const connection = up_.get();
  if (find_group(group) == nullptr) handler_.link_unknown_group(*this, group, type, body);
  GroupPort* const port = find_group(group);
  if (port == nullptr || up_.get() != connection) return;
  announce(*port);
  if (find_group(group) == port && up_.get() == connection) port->handler().channel_message(type, body);
}

PeerLink::GroupPort* PeerLink::find_group(const Id128& group) {
  const auto found = groups_.find(group);
  return found == groups_.end() ? nullptr : found->second;
}

// A handler may open and close groups while all are being told something, so the ids are walked, not the map.
std::vector<Id128> PeerLink::group_ids() const {
  std::vector<Id128> ids;
  for (const auto& [id, port] : groups_) ids.push_back(id);
  return ids;
}

void PeerLink::announce(GroupPort& port) {
  if (port.announced) return;
  port.announced = true;
  port.handler().channel_connected();
}

std::unique_ptr<GroupChannel> PeerLink::open_group(const Id128& group, GroupChannelHandler& handler) {
  VF_ASSERT(!group.is_none());
  VF_ASSERT(find_group(group) == nullptr);
  auto port = std::make_unique<GroupPort>(*this, group, handler);
  groups_.emplace(group, port.get());
  executor_.post([this, alive = alive_.token(), group] {
    if (!alive() || !up_) return;
    if (GroupPort* opened = find_group(group)) announce(*opened);
  });
  return port;
}

void PeerLink::request(const std::string& method, std::string json, PeerRequests::Done done, Nanoseconds timeout) {
  if (!up_) {
    return requests_.refuse_later(std::move(done),
                                  {ErrorKind::Unavailable, fmt::format("peer '{}' is not connected{}{}", target_.name,
                                                                       last_error_.empty() ? "" : ": ", last_error_)});
  }
  requests_.request(method, std::move(json), timeout, std::move(done));
}

void PeerLink::ping(PingDone done, Nanoseconds timeout) {
  const uint64_t number = next_ping_++;
  WaitingPing& ping = pings_[number];
  ping = {.done = std::move(done), .timeout = std::make_unique<Timer>(executor_)};
  ping.timeout->start(timeout, [this, number, timeout] {
    auto node = pings_.extract(number);
    node.mapped().done(fail(up_ ? ErrorKind::Timeout : ErrorKind::Unavailable,
                            "peer '{}' did not answer within {} ms{}{}", target_.name, timeout / kMillisecond,
                            last_error_.empty() ? "" : ": ", last_error_));
  });
  if (up_) {
    send_ping();
  } else if (!dial_) {
    dial_after(0);
  }
}

void PeerLink::send_ping() {
  constexpr size_t kStampsMax = 64;
  const auto stamp = static_cast<uint64_t>(executor_.now());
  pinged_at_ = executor_.now();
  if (ping_stamps_.size() >= kStampsMax) ping_stamps_.erase(ping_stamps_.begin());
  ping_stamps_.push_back(stamp);
  send(TrafficClass::Control, MessageType::Ping, std::nullopt, encode(Ping{.stamp = stamp}));
}

void PeerLink::take_pong(ByteSpan payload) {
  const auto pong = decode_ping(payload);
  if (!pong) return drop_connection(pong.error());
  // Only a stamp that is out counts: a made-up one would set the round trip to anything.
  const auto found = std::find(ping_stamps_.begin(), ping_stamps_.end(), pong->stamp);
  if (found == ping_stamps_.end()) return;
  ping_stamps_.erase(ping_stamps_.begin(), found + 1);
  const Nanoseconds rtt = executor_.now() - static_cast<Nanoseconds>(pong->stamp);
  rtt_.saw(rtt);
  for (auto& [number, waiting] : std::exchange(pings_, {})) {
    executor_.post([alive = alive_.token(), done = std::move(waiting.done), rtt] {
      if (alive()) done(rtt);
    });
  }
}

void PeerLink::watch_peer() {
  const Nanoseconds now = executor_.now();
  if (now - up_->received_at() >= options_.dead_after) {
    return drop_connection(
        {ErrorKind::Timeout, fmt::format("nothing came from the peer for {} ms", options_.dead_after / kMillisecond)});
  }
  if (now - pinged_at_ >= options_.ping_interval) send_ping();
  watch_timer_.start(options_.ping_interval / 2, [this] { watch_peer(); });
}

LinkFigures PeerLink::figures() const {
  return {.rtt = rtt_.rtt(),
          .send_rate = meter_.rate(),
          .sent_bytes = sent_bytes_,
          .received_bytes = received_before_ + (up_ ? up_->received_bytes() : 0)};
}

void PeerLink::set_rate_limit(uint64_t bytes_per_s) {
  // What was measured under another cap says nothing about the link.
  if (bytes_per_s != limiter_.rate()) meter_ = {};
  limiter_.set_rate(bytes_per_s, executor_.now());
  schedule_pump();
}

void PeerLink::send(TrafficClass traffic, MessageType type, const std::optional<Id128>& group, Bytes payload) {
  if (!up_) return;
  queue_.push(traffic, type, group, std::move(payload));
  const uint64_t queued = queue_.queued_bytes(traffic);
  const uint64_t limit = options_.queue_limits[lane_of(traffic)];
  if (queued >= limit) stopped_[lane_of(traffic)] = true;
  if (queued > 4 * limit + 16_MiB) {
    // From a task: the caller is in the middle of its own work.
    executor_.post([this, alive = alive_.token(), traffic, connection = up_.get()] {
      if (!alive() || up_.get() != connection) return;
      drop_connection({ErrorKind::LimitExceeded,
                       fmt::format("the queue of class {} is beyond all limits", static_cast<unsigned>(traffic))});
    });
    return;
  }
  schedule_pump();
}

void PeerLink::schedule_pump() {
  if (pump_posted_ || !up_) return;
  pump_posted_ = true;
  executor_.post([this, alive = alive_.token()] {
    if (!alive()) return;
    pump_posted_ = false;
    pump();
  });
}

void PeerLink::pump() {
  if (!up_) return;
  const Nanoseconds now = executor_.now();
  while (!queue_.empty() && up_->unsent_bytes() < options_.stream_unsent_max) {
    meter_.busy(now);
    // Control messages do not wait for tokens, they only pay: a GO is worth more than a smooth rate.
    const bool may_send = limiter_.may_send(now);
    chunk_.clear();
    queue_.fill(chunk_, limiter_.chunk_size(), !may_send);
    if (chunk_.empty()) {
      pump_timer_.start(limiter_.wait(now), [this] { pump(); });
      break;
    }
    const size_t tls_bytes = up_->send_frames(chunk_);
    limiter_.charge(tls_bytes);
    sent_bytes_ += tls_bytes;
    meter_.sent(tls_bytes, now);
  }
  if (queue_.empty() && up_->unsent_bytes() == 0) meter_.idle(now);
  tell_writable();
}

void PeerLink::tell_writable() {
  for (size_t lane = 0; lane < kTrafficClassCount; ++lane) {
    const auto traffic = static_cast<TrafficClass>(lane);
    // Half of the limit, so that a producer is called for a batch of work, not for each message.
    if (!stopped_[lane] || queue_.queued_bytes(traffic) > options_.queue_limits[lane] / 2) continue;
    stopped_[lane] = false;
    for (const Id128& id : group_ids()) {
      if (GroupPort* port = find_group(id); port != nullptr && port->announced) {
        port->handler().channel_writable(traffic);
      }
    }
  }
}

bool PeerLink::GroupPort::connected() const {
  return link_ != nullptr && link_->up_ != nullptr;
}

bool PeerLink::GroupPort::peer_has(uint64_t feature) const {
  return connected() && (link_->negotiated().features & feature) != 0;
}

void PeerLink::GroupPort::send(TrafficClass traffic, MessageType type, Bytes payload) {
  VF_ASSERT(is_group_message(type));
  if (link_ != nullptr) link_->send(traffic, type, group_, std::move(payload));
}

uint64_t PeerLink::GroupPort::queued_bytes(TrafficClass traffic) const {
  return link_ == nullptr ? 0 : link_->queue_.queued_bytes(traffic);
}

uint64_t PeerLink::GroupPort::queue_limit(TrafficClass traffic) const {
  return link_ == nullptr ? 0 : link_->options_.queue_limits[lane_of(traffic)];
}

LinkFigures PeerLink::GroupPort::figures() const {
  return link_ == nullptr ? LinkFigures{} : link_->figures();
}

PeerLink::GroupPort::~GroupPort() {
  if (link_ != nullptr) link_->groups_.erase(group_);
}

}  // namespace vmferry
