// SPDX-License-Identifier: Apache-2.0
//
// One side of the peer tests: a PeerService with a handler that remembers what it was told, as the daemon would have
// it. Threads: one.
#pragma once

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "engine/base/log.h"
#include "engine/replicate/peer_service.h"
#include "tests/unit/replicate/peer_test_net.h"

namespace vmferry::test {

inline const Id128 kGroup{{1, 2, 3, 4}};

class RecordingGroup final : public GroupChannelHandler {
 public:
  void channel_connected() override { ++connected; }
  void channel_disconnected() override { ++disconnected; }
  void channel_message(MessageType type, ByteSpan payload) override {
    received_bytes += payload.size();
    messages.emplace_back(type, keep_payloads ? Bytes(payload.begin(), payload.end()) : Bytes{});
    if (on_message) on_message(type, payload);
  }
  void channel_writable(TrafficClass traffic) override {
    if (on_writable) on_writable(traffic);
  }
  int connected = 0;
  int disconnected = 0;
  bool keep_payloads = true;
  uint64_t received_bytes = 0;
  std::vector<std::pair<MessageType, Bytes>> messages;
  std::function<void(MessageType, ByteSpan)> on_message;
  std::function<void(TrafficClass)> on_writable;
};

class TestDaemon final : public PeerServiceHandler {
 public:
  TestDaemon(Executor& executor, VirtualNet& net, std::string address, PeerServiceOptions options = {},
             std::shared_ptr<TlsIdentity> identity = nullptr)
      : executor_(executor),
        net_(net),
        address_(std::move(address)),
        identity_(identity ? std::move(identity) : std::make_shared<TlsIdentity>(TlsIdentity::generate().value())) {
    options.daemon_version = "0.1-test";
    options_ = options;
    restart();
  }

  // Ends the service and begins a new one from what was saved, as a restart of the daemon does.
  void restart() {
    service.reset();
    service = std::make_unique<PeerService>(executor_, net_, *identity_, options_, *this);
    EXPECT_TRUE(service->load(saved).has_value());
    service->start();
    net_.listen(address_, [this](std::unique_ptr<ByteStream> stream) {
      if (service) service->accept(std::move(stream));
    });
  }

  void link_connected(PeerLink&) override { ++connected; }
  void link_disconnected(PeerLink&, const Error& error) override {
    ++disconnected;
    last_disconnect = error.text;
  }
  void link_unknown_group(PeerLink& link, const Id128& group, MessageType, ByteSpan) override {
    ++unknown_groups;
    if (open_unknown) channel = link.open_group(group, group_handler);
  }
  void link_request(PeerLink&, const std::string& method, const std::string& json,
                    PeerRequests::Answer answer) override {
    if (on_request) return on_request(method, json, std::move(answer));
    answer(fail(ErrorKind::NotFound, "no such method"));
  }
  void save_peers(const nlohmann::json& state, std::function<void(Status)> done) override {
    if (save_fails) return done(fail(ErrorKind::Io, "disk full"));
    saved = state;
    done({});
  }
  void peer_added(PeerLink&) override { ++added; }
  void peer_removed(const std::string&) override { ++removed; }

  void open_group(const std::string& peer) { channel = service->link(peer)->open_group(kGroup, group_handler); }
  const std::string& address() const { return address_; }
  const std::shared_ptr<TlsIdentity>& identity() const { return identity_; }

  Executor& executor_;
  VirtualNet& net_;
  std::string address_;
  std::shared_ptr<TlsIdentity> identity_;
  PeerServiceOptions options_;
  nlohmann::json saved;
  int connected = 0, disconnected = 0, unknown_groups = 0, added = 0, removed = 0;
  bool open_unknown = false;
  bool save_fails = false;
  std::string last_disconnect;
  std::function<void(const std::string&, const std::string&, PeerRequests::Answer)> on_request;
  RecordingGroup group_handler;
  std::unique_ptr<PeerService> service;
  std::unique_ptr<GroupChannel> channel;
};

// Two hosts that can reach each other. Log lines are kept, for what must not be in them.
class PeerTest : public ::testing::Test {
 public:
  PeerTest() {
    log::set_sink([this](log::Level, std::string_view line) { log_lines.emplace_back(line); });
  }
  ~PeerTest() override {
    a.reset();
    b.reset();
    executor.drop_tasks();
    log::set_sink({});
  }

  void make_daemons(const PeerServiceOptions& options_a = {}, const PeerServiceOptions& options_b = {}) {
    a = std::make_unique<TestDaemon>(executor, net, "192.0.2.1:4410", options_a);
    b = std::make_unique<TestDaemon>(executor, net, "192.0.2.2:4410", options_b);
  }
  std::string invite(PeerRights grants = {}) {
    std::string token;
    a->service->invite({.addresses = {a->address()}, .grants = grants}, [&](const Result<Invitation>& made) {
      ASSERT_TRUE(made.has_value()) << made.error().text;
      token = made->token;
    });
    executor.run_until([&] { return !token.empty(); });
    return token;
  }
  Result<JoinOutcome> join(TestDaemon& joiner, const std::string& token, const std::string& name,
                           const std::string& as = "bee") {
    std::optional<Result<JoinOutcome>> outcome;
    joiner.service->join({.token = token, .name = name, .as = as},
                         [&](Result<JoinOutcome> result) { outcome = std::move(result); });
    executor.run_until([&] { return outcome.has_value(); });
    executor.run_for(100 * kMillisecond);  // the inviter hears of a refusal after the joiner
    return outcome ? *outcome : Result<JoinOutcome>(fail(ErrorKind::Internal, "join never ended"));
  }
  // A calls B "bee", B calls A "ay".
  void pair_daemons() {
    const auto joined = join(*b, invite(), "ay");
    ASSERT_TRUE(joined.has_value()) << joined.error().text;
    ASSERT_TRUE(executor.run_until([&] { return both_connected(); }));
  }
  bool both_connected() {
    const PeerLink* to_b = a->service->link("bee");
    const PeerLink* to_a = b->service->link("ay");
    return to_b != nullptr && to_a != nullptr && to_b->connected() && to_a->connected();
  }
  static std::string last_refusal(const TestDaemon& daemon) {
    return daemon.service->refusals().empty() ? "" : daemon.service->refusals().back();
  }
  bool logged(std::string_view text) {
    return std::any_of(log_lines.begin(), log_lines.end(),
                       [&](const std::string& line) { return line.find(text) != std::string::npos; });
  }

  VirtualExecutor executor;
  VirtualNet net{executor};
  std::unique_ptr<TestDaemon> a;
  std::unique_ptr<TestDaemon> b;
  std::vector<std::string> log_lines;
};

}  // namespace vmferry::test
