// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstdio>
#include <filesystem>

#include "engine/base/log.h"
#include "engine/base/random.h"
#include "engine/runtime/connector.h"
#include "engine/runtime/listener.h"
#include "tests/unit/runtime/reactor_fixture.h"

namespace vmferry {
namespace {

int option_of(int fd, int level, int option) {
  int value = -1;
  socklen_t size = sizeof value;
  EXPECT_EQ(getsockopt(fd, level, option, &value, &size), 0);
  return value;
}

struct Recorder final : StreamHandler {
  Bytes received;
  int writable = 0;
  int closed = 0;
  Errno error = -1;
  std::function<void()> on_read, on_closed;

  void stream_readable(ByteSpan bytes) override {
    received.insert(received.end(), bytes.begin(), bytes.end());
    if (on_read) on_read();
  }
  void stream_writable() override { ++writable; }
  void stream_closed(Errno reason) override {
    ++closed;
    error = reason;
    if (on_closed) on_closed();
  }
};

class SocketTest : public testing::TestWithParam<WaitsIn> {
 protected:
  void SetUp() override {
    reactor = make_reactor(GetParam());
    char pattern[] = "/tmp/vmferry-socket-XXXXXX";
    folder = mkdtemp(pattern);
  }
  void TearDown() override { std::filesystem::remove_all(folder); }
  void make_pair(SocketOptions options = {}) {
    auto pair = make_socket_pair();
    ASSERT_TRUE(pair.has_value());
    a = std::make_unique<SocketStream>(*reactor, std::move(pair->first), "a", options);
    b = std::make_unique<SocketStream>(*reactor, std::move(pair->second), "b", options);
  }
  bool run(const std::function<bool()>& condition, Nanoseconds timeout = 5 * kSecond) {
    return reactor->run_until(condition, timeout);
  }
  std::unique_ptr<Reactor> reactor;
  std::string folder;
  std::unique_ptr<SocketStream> a, b;
  Recorder at_a, at_b;
};

INSTANTIATE_TEST_SUITE_P(All, SocketTest, kBothLoops, name_of);

Bytes random_bytes(size_t size, uint64_t seed) {
  Random random(seed);
  Bytes bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
  return bytes;
}

// Partial sends across buffer borders are where bytes get lost or doubled.
TEST_P(SocketTest, ManyWritesOfAllSizesArriveWholeAndInOrder) {
  make_pair({.send_buffer = 8192});
  b->set_handler(&at_b);
  Bytes sent;
  Random random(1);
  for (uint64_t i = 0; i < 300; ++i) {
    Bytes piece = random_bytes(random.chance(1, 4) ? random.below(100'000) : random.below(200), i);
    sent.insert(sent.end(), piece.begin(), piece.end());
    if (random.chance(1, 2)) {
      a->write(ByteSpan(piece));
    } else {
      a->write(std::move(piece));
    }
  }
  EXPECT_EQ(a->unsent_bytes(), sent.size());
  ASSERT_TRUE(run([&] { return at_b.received.size() >= sent.size(); }));
  EXPECT_TRUE(at_b.received == sent);
  EXPECT_EQ(a->unsent_bytes(), 0U);
}

// The brake of a migration is a paused reader: the queue must then stay at the sender, and nothing may be delivered.
TEST_P(SocketTest, PausedReaderHoldsTheSenderAndLosesNothing) {
  make_pair();
  a->set_handler(&at_a);
  b->set_handler(&at_b);
  b->pause_reading(true);
  const Bytes sent = random_bytes(4_MiB, 7);
  a->write(ByteSpan(sent));
  a->set_low_mark(1_MiB);
  EXPECT_FALSE(run([&] { return !at_b.received.empty() || at_a.writable > 0; }, 50 * kMillisecond));
  EXPECT_GT(a->unsent_bytes(), 3_MiB);
  b->pause_reading(false);
  ASSERT_TRUE(run([&] { return at_b.received.size() == sent.size(); }));
  EXPECT_TRUE(at_b.received == sent);
  EXPECT_EQ(at_a.writable, 2) << "once below the low mark, once when empty";
}

// A hang-up of the other side while paused must not spin the loop, and must be seen once reading goes on.
TEST_P(SocketTest, HangUpWhilePausedIsSilentUntilReadingGoesOn) {
  make_pair();
  b->set_handler(&at_b);
  b->pause_reading(true);
  a->write(as_bytes("last words"));
  a->close_after_writing();
  int rounds = 0;
  reactor->run_until(
      [&] {
        ++rounds;
        return false;
      },
      30 * kMillisecond);
  EXPECT_LT(rounds, 20);
  EXPECT_EQ(at_b.closed, 0);
  b->pause_reading(false);
  ASSERT_TRUE(run([&] { return at_b.closed == 1; }));
  EXPECT_EQ(as_text(at_b.received), "last words");
  EXPECT_EQ(at_b.error, 0);
}

// SIGPIPE would end the daemon with every guest that it serves.
TEST_P(SocketTest, WriteToAClosedPeerReportsAnErrorInsteadOfASignal) {
  make_pair();
  a->set_handler(&at_a);
  b.reset();
  a->pause_reading(true);
  a->write(as_bytes("x"));
  EXPECT_EQ(at_a.closed, 0) << "never inline";
  ASSERT_TRUE(run([&] { return at_a.closed == 1; }));
  EXPECT_EQ(at_a.error, EPIPE);
}

TEST_P(SocketTest, StreamMayBeDestroyedInsideItsCallbacks) {
  make_pair();
  at_b.on_read = [&] { b.reset(); };
  b->set_handler(&at_b);
  a->set_handler(&at_a);
  at_a.on_closed = [&] { a.reset(); };
  a->write(as_bytes("x"));
  ASSERT_TRUE(run([&] { return at_a.closed == 1; }));
  EXPECT_EQ(a, nullptr);
  EXPECT_EQ(b, nullptr);
  EXPECT_EQ(at_b.closed, 0) << "destruction is no reason for a callback";
}

// QEMU's getfd expects the descriptor with the bytes of its command.
TEST_P(SocketTest, DescriptorTravelsWithItsBytes) {
  auto pair = make_socket_pair();
  ASSERT_TRUE(pair.has_value());
  SocketStream sender(*reactor, std::move(pair->first), "sender");
  auto carried = make_socket_pair();
  ASSERT_TRUE(carried.has_value());
  sender.write(as_bytes("before"));
  sender.write_with_fd(as_bytes("with"), std::move(carried->second));
  sender.write(as_bytes("after"));
  ASSERT_TRUE(run([&] { return sender.unsent_bytes() == 0; }));

  std::string text;
  std::string at_fd;
  UniqueFd received;
  for (int i = 0; i < 5 && text.size() < 15; ++i) {
    char buffer[64];
    iovec vector{buffer, sizeof buffer};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t count = recvmsg(pair->second.get(), &message, MSG_CMSG_CLOEXEC);
    ASSERT_GT(count, 0);
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message)) {
      int fd = -1;
      memcpy(&fd, CMSG_DATA(header), sizeof fd);
      received.reset(fd);
      at_fd.assign(buffer, static_cast<size_t>(count));
    }
    text.append(buffer, static_cast<size_t>(count));
  }
  EXPECT_EQ(text, "beforewithafter");
  EXPECT_TRUE(at_fd.ends_with("with")) << at_fd << ": not one byte later, not with another command";
  ASSERT_TRUE(received.valid());
  ASSERT_EQ(::write(received.get(), "hi", 2), 2);
  char echo[2];
  EXPECT_EQ(::read(carried->first.get(), echo, 2), 2);
}

TEST(Endpoint, ParsesWhatItPrintsAndRefusesTheRest) {
  for (const char* good : {"unix:/a/b", "127.0.0.1:80", "[::1]:10809", "host.example:1", ":7"})
    EXPECT_EQ(Endpoint::parse(good)->to_string(), good);
  EXPECT_EQ(Endpoint::parse("tcp:[::1]:5")->host, "::1");
  for (const char* bad : {"", "unix:", "host", "host:", "host:x", "host:65536", "::1:80", "host:-1", "host: 1"})
    EXPECT_FALSE(Endpoint::parse(bad)) << bad;
  EXPECT_TRUE(Endpoint::parse("unix:" + std::string(107, 'x')));
  EXPECT_FALSE(Endpoint::parse("unix:" + std::string(108, 'x')));
  EXPECT_TRUE(Endpoint::parse("127.3.2.1:1")->is_loopback());
  EXPECT_TRUE(Endpoint::parse("[::1]:1")->is_loopback());
  EXPECT_FALSE(Endpoint::parse("10.0.0.1:1")->is_loopback());
  EXPECT_FALSE(Endpoint::parse("127.0.0.1.example:1")->is_loopback());
}

TEST_P(SocketTest, TcpConnectAndListenOnBothFamilies) {
  for (const char* address : {"127.0.0.1:0", "[::1]:0"}) {
    std::unique_ptr<SocketStream> server;
    auto listener =
        Listener::create(*reactor, *Endpoint::parse(address), {}, [&](auto stream) { server = std::move(stream); });
    ASSERT_TRUE(listener.has_value()) << address;
    ASSERT_NE((*listener)->local().port, 0);
    Connector connector(*reactor);
    std::unique_ptr<SocketStream> client;
    connector.connect((*listener)->local(), {.socket = {.notsent_lowat = 65536, .congestion = "bbr"}},
                      [&](auto result) {
                        ASSERT_TRUE(result.has_value()) << result.error().text;
                        client = std::move(*result);
                      });
    ASSERT_TRUE(run([&] { return client && server; }));
    Recorder at_server;
    server->set_handler(&at_server);
    client->write(as_bytes("hello"));
    ASSERT_TRUE(run([&] { return at_server.received.size() == 5; }));
    // A host that vanishes says nothing; its connections would count against the limit of their listener for ever.
    for (const SocketStream* side : {client.get(), server.get()}) {
      EXPECT_EQ(option_of(side->fd(), SOL_SOCKET, SO_KEEPALIVE), 1);
      EXPECT_LE(option_of(side->fd(), IPPROTO_TCP, TCP_KEEPIDLE), 60);
    }
  }
}

// Removing a live daemon's socket would leave two daemons, each thinking that it serves.
TEST_P(SocketTest, StaleUnixSocketIsReplacedALiveOneIsNot) {
  const Endpoint endpoint = *Endpoint::parse("unix:" + folder + "/s");
  {
    const UniqueFd dead(socket(AF_UNIX, SOCK_STREAM, 0));
    const auto address = resolve(endpoint, ResolveFor::Listen);
    ASSERT_EQ(bind(dead.get(), (*address)[0].get(), (*address)[0].size), 0);
  }
  int accepted = 0;
  auto listener = Listener::create(*reactor, endpoint, {.mode = 0640}, [&](auto) { ++accepted; });
  ASSERT_TRUE(listener.has_value()) << listener.error().text;
  struct stat info {};
  ASSERT_EQ(stat(endpoint.path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640U);
  auto second = Listener::create(*reactor, endpoint, {}, [](auto) {});
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().kind, ErrorKind::Busy);
  listener->reset();
  EXPECT_NE(stat(endpoint.path.c_str(), &info), 0) << "its socket goes with the listener";
  { const UniqueFd file(open(endpoint.path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600)); }
  EXPECT_EQ(Listener::create(*reactor, endpoint, {}, [](auto) {}).error().kind, ErrorKind::Exists);
  EXPECT_EQ(stat(endpoint.path.c_str(), &info), 0) << "a file that is no socket is not ours to remove";
}

// The service manager keeps the socket for the next daemon: without the file nobody could connect any more, and clients
// that come between two daemons must not be turned away.
TEST_P(SocketTest, AnAdoptedSocketStaysTheOnesWhoMadeIt) {
  const Endpoint endpoint = *Endpoint::parse("unix:" + folder + "/s");
  const UniqueFd theirs(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const auto address = resolve(endpoint, ResolveFor::Listen);
  ASSERT_EQ(bind(theirs.get(), (*address)[0].get(), (*address)[0].size), 0);
  ASSERT_EQ(listen(theirs.get(), 8), 0);
  ASSERT_EQ(local_address(theirs.get())->to_string(), endpoint.to_string());
  for (int daemon = 0; daemon < 2; ++daemon) {
    const UniqueFd client(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(connect(client.get(), (*address)[0].get(), (*address)[0].size), 0) << "nobody accepts yet";
    int accepted = 0;
    auto listener = Listener::adopt(*reactor, UniqueFd(dup(theirs.get())), endpoint, {}, [&](auto) { ++accepted; });
    EXPECT_EQ(listener->local().path, endpoint.path);
    ASSERT_TRUE(run([&] { return accepted == 1; }));
  }
  struct stat info {};
  EXPECT_EQ(stat(endpoint.path.c_str(), &info), 0);
}

// An export whose address cannot be told is no use to a client, and an abstract socket is open to every user.
TEST(LocalAddress, IsAnAbsolutePathOrATcpAddress) {
  const auto bound = [](int family, const sockaddr* address, socklen_t size) {
    const UniqueFd fd(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (address != nullptr) {
      EXPECT_EQ(bind(fd.get(), address, size), 0) << errno_text(errno);
    }
    return local_address(fd.get());
  };
  sockaddr_in v4{.sin_family = AF_INET, .sin_port = 0, .sin_addr = {htonl(INADDR_LOOPBACK)}, .sin_zero = {}};
  const auto tcp = bound(AF_INET, reinterpret_cast<const sockaddr*>(&v4), sizeof v4);
  ASSERT_TRUE(tcp);
  EXPECT_EQ(tcp->host, "127.0.0.1");
  EXPECT_NE(tcp->port, 0);
  sockaddr_un abstract{};
  abstract.sun_family = AF_UNIX;
  std::snprintf(abstract.sun_path + 1, sizeof abstract.sun_path - 1, "vmferry-test-%d", getpid());
  EXPECT_FALSE(bound(AF_UNIX, reinterpret_cast<const sockaddr*>(&abstract), sizeof(sa_family_t) + 24));
  EXPECT_FALSE(bound(AF_UNIX, nullptr, 0)) << "not bound at all";
  EXPECT_FALSE(bound(AF_NETLINK, nullptr, 0));
  EXPECT_FALSE(local_address(-1));
}

TEST_P(SocketTest, ConnectReportsRefusalTimeoutAndUnknownNames) {
  Connector connector(*reactor);
  std::optional<Error> error;
  const auto keep = [&](auto result) {
    ASSERT_FALSE(result.has_value());
    error = result.error();
  };
  connector.connect(*Endpoint::parse("unix:" + folder + "/none"), {}, keep);
  EXPECT_FALSE(error) << "never inline";
  ASSERT_TRUE(run([&] { return error.has_value(); }));
  EXPECT_EQ(error->kind, ErrorKind::Unavailable);

  // A listener whose backlog is full never answers: only the timeout ends it.
  const UniqueFd full(socket(AF_INET, SOCK_STREAM, 0));
  SocketAddress address = (*resolve(*Endpoint::parse("127.0.0.1:0"), ResolveFor::Listen))[0];
  ASSERT_EQ(bind(full.get(), address.get(), address.size), 0);
  ASSERT_EQ(listen(full.get(), 0), 0);
  ASSERT_EQ(getsockname(full.get(), reinterpret_cast<sockaddr*>(&address.storage), &address.size), 0);
  std::vector<UniqueFd> fillers;
  for (int i = 0; i < 4; ++i) {
    fillers.emplace_back(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ::connect(fillers.back().get(), address.get(), address.size);
  }
  error.reset();
  connector.connect(*Endpoint::parse(address.to_string()), {.timeout = 50 * kMillisecond}, keep);
  ASSERT_TRUE(run([&] { return error.has_value(); }));
  EXPECT_EQ(error->kind, ErrorKind::Timeout);

  error.reset();
  connector.connect(*Endpoint::parse("unix:" + folder + "/none"), {}, keep);
  connector.cancel();
  EXPECT_FALSE(run([&] { return error.has_value(); }, 50 * kMillisecond)) << "cancelled";
}

// Without a pause a listener that is out of descriptors eats a whole core and starves the guests.
TEST_P(SocketTest, AcceptBacksOffWhenDescriptorsRunOutAndRecovers) {
  const Endpoint endpoint = *Endpoint::parse("unix:" + folder + "/s");
  std::vector<std::unique_ptr<SocketStream>> accepted;
  auto listener = Listener::create(*reactor, endpoint, {}, [&](auto stream) { accepted.push_back(std::move(stream)); });
  ASSERT_TRUE(listener.has_value());
  const UniqueFd client(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
  const auto address = resolve(endpoint, ResolveFor::Connect);
  ASSERT_EQ(::connect(client.get(), (*address)[0].get(), (*address)[0].size), 0);

  // Into a variable: the sanitizers need a descriptor of their own when the standard logger is used the first time.
  int warnings = 0;
  log::set_sink([&](log::Level, std::string_view) { ++warnings; });
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  rlimit tight = before;
  tight.rlim_cur = 3;
  setrlimit(RLIMIT_NOFILE, &tight);
  int rounds = 0;
  reactor->run_until(
      [&] {
        ++rounds;
        return false;
      },
      60 * kMillisecond);
  setrlimit(RLIMIT_NOFILE, &before);
  log::set_sink({});
  EXPECT_EQ(warnings, 1);
  EXPECT_LT(rounds, 10);
  EXPECT_TRUE(accepted.empty());
  EXPECT_TRUE(run([&] { return accepted.size() == 1; }, kSecond));
  EXPECT_EQ(accepted[0]->credentials()->pid, getpid());
}

}  // namespace
}  // namespace vmferry
