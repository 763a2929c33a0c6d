// SPDX-License-Identifier: Apache-2.0
//
// An NBD server without the daemon around it, for functional tests and for measuring the export alone.
//
//   nbd-testserver --listen unix:PATH|HOST:PORT... --export NAME=FILE|NAME=ram:BYTES [--read-only NAME] [--cache ...]
//
// Prints one line per listener ("listening ADDRESS") and then "ready"; on SIGUSR1 its statistics as one line of
// key=value; on SIGTERM it drains and exits 0.
// A RAM export answers at once; "ram:BYTES:slow" completes each request 50 ms later, "ram:BYTES:failing" fails every
// request below 1 MiB with EIO and writes above with ENOSPC, EPERM by the next MiB.
#include <signal.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdio>
#include <cstring>

#include "blockdev/file_store.h"
#include "blockdev/nbd/nbd_server.h"
#include "engine/base/log.h"
#include "engine/runtime/listener.h"
#include "engine/runtime/reactor.h"
#include "tests/functional/nbd_testserver/ram_disk.h"

namespace vmferry {
namespace {

struct Options {
  std::vector<std::string> listen;
  std::vector<std::string> exports;
  std::vector<std::string> read_only;
  std::string cache = "writeback";
  std::string log_level = "warn";
  int64_t drain_grace_ms = 0;  // 0, as for the others: the default
  uint64_t connection_bytes = 0;
  uint64_t server_bytes = 0;
};

Result<std::unique_ptr<BlockDevice>> open_device(Reactor& reactor, const Options& options, const std::string& source,
                                                 bool read_only) {
  if (source.starts_with("ram:")) return RamDisk::parse(reactor, std::string_view(source).substr(4));
  const auto cache = parse_cache(options.cache);
  if (!cache) return tl::unexpected(cache.error());
  auto store = FileStore::open(reactor, source, {.cache = *cache, .read_only = read_only});
  if (!store) return tl::unexpected(store.error());
  return std::unique_ptr<BlockDevice>(std::move(*store));
}

void print_stats(const NbdServer& server) {
  const NbdStats stats = server.stats();
  fmt::print("stats connections={} handshakes={} connections_total={} refused={} requests={} errors={} inflight={}\n",
             stats.connections, stats.handshakes, stats.connections_total, stats.refused_total, stats.requests_total,
             stats.errors_total, stats.inflight_bytes);
  std::fflush(stdout);
}

Status serve(const Options& options) {
  const auto level = log::parse_level(options.log_level);
  if (!level) return tl::unexpected(level.error());
  log::set_level(*level);
  signal(SIGPIPE, SIG_IGN);
  auto reactor = Reactor::create({.worker_count = 1});
  if (!reactor) return tl::unexpected(reactor.error());

  NbdLimits limits;
  if (options.connection_bytes != 0) limits.connection_inflight_bytes_max = options.connection_bytes;
  if (options.drain_grace_ms != 0) limits.drain_grace = options.drain_grace_ms * kMillisecond;
  if (options.server_bytes != 0) limits.inflight_bytes_max = options.server_bytes;
  std::vector<std::unique_ptr<BlockDevice>> devices;
  NbdServer server(**reactor, limits);
  for (const std::string& text : options.exports) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos) return fail(ErrorKind::InvalidArgument, "--export {}: NAME=SOURCE", text);
    const std::string name = text.substr(0, equals);
    const bool read_only =
        std::find(options.read_only.begin(), options.read_only.end(), name) != options.read_only.end();
    auto device = open_device(**reactor, options, text.substr(equals + 1), read_only);
    if (!device) return fail_with(device.error(), text);
    devices.push_back(std::move(*device));
    const Status added = server.add_export(
        {.name = name, .description = "test " + name, .device = devices.back().get(), .read_only = read_only});
    if (!added) return added;
  }

  std::vector<std::unique_ptr<Listener>> listeners;
  for (const std::string& text : options.listen) {
    const auto endpoint = Endpoint::parse(text);
    if (!endpoint) return tl::unexpected(endpoint.error());
    auto listener =
        Listener::create(**reactor, *endpoint, {.backlog = 1024},
                         [&server](std::unique_ptr<SocketStream> stream) { server.accept(std::move(stream)); });
    if (!listener) return tl::unexpected(listener.error());
    fmt::print("listening {}\n", (*listener)->local().to_string());
    listeners.push_back(std::move(*listener));
  }
  auto signals = SignalWatch::create(**reactor, {SIGTERM, SIGINT, SIGUSR1}, [&](int number) {
    if (number == SIGUSR1) return print_stats(server);
    listeners.clear();
    server.drain([&] { (*reactor)->stop(); });
  });
  if (!signals) return tl::unexpected(signals.error());
  fmt::print("ready\n");
  std::fflush(stdout);
  (*reactor)->run();
  print_stats(server);
  return {};
}

}  // namespace
}  // namespace vmferry

int main(int argc, char** argv) {
  vmferry::Options options;
  CLI::App app{"NBD server for tests"};
  app.add_option("--listen", options.listen, "unix:PATH or HOST:PORT")->required();
  app.add_option("--export", options.exports, "NAME=FILE or NAME=ram:BYTES[:slow|:failing]")->required();
  app.add_option("--read-only", options.read_only, "name of an export that refuses writes");
  app.add_option("--cache", options.cache, "writeback or none");
  app.add_option("--log-level", options.log_level, "debug, info, warn, error");
  app.add_option("--connection-bytes", options.connection_bytes, "in-flight limit of one connection");
  app.add_option("--drain-grace-ms", options.drain_grace_ms, "how long a server that stops answers what still comes");
  app.add_option("--server-bytes", options.server_bytes, "in-flight limit of the server");
  CLI11_PARSE(app, argc, argv);
  const vmferry::Status status = vmferry::serve(options);
  if (status) return 0;
  fmt::print(stderr, "nbd-testserver: {}\n", status.error().text);
  return 1;
}
