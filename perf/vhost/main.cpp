// SPDX-License-Identifier: Apache-2.0
//
// vmferry-vhost-bench: loads any vhost-user-blk back-end as a guest would, without one, and prints one JSON object.
//
//   vmferry-vhost-bench --socket /run/vda.vhost --pattern randread --depth 32 --seconds 10
// Ends with 1 when a request failed or content was wrong. Threads: one per queue.
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "engine/base/text.h"
#include "perf/vhost/driver/load.h"

namespace vmferry::perf {
namespace {

struct Arguments {
  std::string socket;
  std::string pattern = "randread";
  std::string block = "4K";
  std::string area;  // "" = the whole disk
  uint16_t queues = 1;
  uint16_t depth = 32;
  uint16_t queue_size = 256;
  double seconds = 5;
  bool packed = false;
  bool no_event_idx = false;
  bool verify = false;
  bool busy_poll = false;
  uint64_t seed = 1;
};

const std::map<std::string, Pattern> kPatterns = {{"read", Pattern::Read},
                                                  {"write", Pattern::Write},
                                                  {"randread", Pattern::RandomRead},
                                                  {"randwrite", Pattern::RandomWrite},
                                                  {"randrw", Pattern::RandomMixed}};

Result<nlohmann::json> measure(const Arguments& arguments) {
  const auto block = parse_size(arguments.block);
  if (!block) return tl::unexpected(block.error());
  if (*block < virtio::kSectorSize || *block % virtio::kSectorSize != 0 || *block > 32_MiB)
    return fail(ErrorKind::InvalidArgument, "block size '{}' is not a multiple of 512 up to 32M", arguments.block);
  const auto block_bytes = static_cast<uint32_t>(*block);
  FrontendOptions options;
  options.ring = {.packed = arguments.packed, .indirect = true, .event_idx = !arguments.no_event_idx};
  options.queues = arguments.queues;
  options.queue_size = arguments.queue_size;
  const uint64_t queue_memory = BlkQueue::memory_needed(arguments.depth, block_bytes);
  options.data_bytes = queue_memory * arguments.queues;
  auto frontend = Frontend::create(options);
  if (!frontend) return tl::unexpected(frontend.error());
  auto socket = Frontend::dial(arguments.socket);
  if (!socket) return tl::unexpected(socket.error());
  if (Status connected = (*frontend)->connect(std::move(*socket)); !connected) return tl::unexpected(connected.error());

  uint64_t area = (*frontend)->config().size;
  if (!arguments.area.empty()) {
    const auto size = parse_size(arguments.area);
    if (!size) return tl::unexpected(size.error());
    area = std::min(area, *size);
  }
  const uint64_t blocks = area / block_bytes / arguments.queues;
  if (blocks < arguments.depth) return fail(ErrorKind::InvalidArgument, "{} bytes are too few for this load", area);

  std::vector<std::unique_ptr<BlkQueue>> queues;
  std::vector<LoadResult> results(arguments.queues);
  std::vector<std::thread> threads;
  for (uint16_t i = 0; i < arguments.queues; ++i)
    queues.push_back(std::make_unique<BlkQueue>(**frontend, i, arguments.depth, block_bytes, i * queue_memory));
  for (uint16_t i = 0; i < arguments.queues; ++i) {
    threads.emplace_back([&, i] {
      results[i] = Load(*queues[i], {.pattern = kPatterns.at(arguments.pattern),
                                     .depth = arguments.depth,
                                     .block_bytes = block_bytes,
                                     .first_block = blocks * i,
                                     .blocks = blocks,
                                     .seconds = arguments.seconds,
                                     .verify = arguments.verify,
                                     .busy_poll = arguments.busy_poll,
                                     .seed = arguments.seed + i})
                       .run();
    });
  }
  for (std::thread& thread : threads) thread.join();

  LoadResult total;
  double iops = 0;
  nlohmann::json per_queue = nlohmann::json::array();
  for (const LoadResult& result : results) {
    total.requests += result.requests;
    total.errors += result.errors;
    total.mismatches += result.mismatches;
    total.verified += result.verified;
    total.seconds = std::max(total.seconds, result.seconds);
    if (result.seconds > 0) iops += static_cast<double>(result.requests) / result.seconds;
    total.latency_ns.insert(total.latency_ns.end(), result.latency_ns.begin(), result.latency_ns.end());
    per_queue.push_back(result.requests);
  }
  std::sort(total.latency_ns.begin(), total.latency_ns.end());
  const auto percentile = [&](double share) {
    if (total.latency_ns.empty()) return 0.0;
    const auto last = static_cast<double>(total.latency_ns.size() - 1);
    return total.latency_ns[static_cast<size_t>(share * last)] / 1000.0;
  };
  const double sum = std::accumulate(total.latency_ns.begin(), total.latency_ns.end(), 0.0);
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return nlohmann::json{
      {"iops", iops},
      {"mb_per_s", iops * block_bytes / 1e6},
      {"latency_us",
       {{"mean", total.latency_ns.empty() ? 0.0 : sum / static_cast<double>(total.latency_ns.size()) / 1000.0},
        {"p50", percentile(0.5)},
        {"p99", percentile(0.99)},
        {"max", percentile(1.0)}}},
      {"requests", total.requests},
      {"requests_of_queue", per_queue},
      {"errors", total.errors},
      {"verified", total.verified},
      {"mismatches", total.mismatches},
      {"seconds", total.seconds},
      {"client_cpu_s", static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                           static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6},
      {"disk_bytes", (*frontend)->config().size},
      {"features", (*frontend)->features()}};
}

int run(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Loads a vhost-user-blk back-end as a guest would and prints one JSON object.", "vmferry-vhost-bench");
  app.footer("Example:\n  vmferry-vhost-bench --socket /run/vda.vhost --pattern randwrite --depth 32 --verify");
  app.add_option("--socket", arguments.socket, "vhost-user socket of the back-end")->required();
  std::vector<std::string> names;
  for (const auto& [name, pattern] : kPatterns) names.push_back(name);
  app.add_option("--pattern", arguments.pattern, "what to do")->check(CLI::IsMember(names));
  app.add_option("--block", arguments.block, "bytes of a request (4K)");
  app.add_option("--area", arguments.area, "bytes of the disk to use (default: all)");
  app.add_option("--queues", arguments.queues, "queues, one thread each (1)")->check(CLI::Range(1, 64));
  app.add_option("--depth", arguments.depth, "requests in flight per queue (32)")->check(CLI::Range(1, 1024));
  app.add_option("--queue-size", arguments.queue_size, "entries of a ring (256)")
      ->check(CLI::IsMember({16, 32, 64, 128, 256, 512, 1024}));
  app.add_option("--seconds", arguments.seconds, "how long (5)")->check(CLI::Range(0.01, 86400.0));
  app.add_option("--seed", arguments.seed, "of the random order (1)");
  app.add_flag("--packed", arguments.packed, "packed rings");
  app.add_flag("--no-event-idx", arguments.no_event_idx, "notifications without event index");
  app.add_flag("--verify", arguments.verify, "check the content of everything written, then read it all again");
  app.add_flag("--busy-poll", arguments.busy_poll, "never sleep while waiting");
  CLI11_PARSE(app, argc, argv);
  if (arguments.depth > arguments.queue_size) {
    std::fprintf(stderr, "--depth %u is more than --queue-size %u\n", arguments.depth, arguments.queue_size);
    return 2;
  }
  const auto measured = measure(arguments);
  if (!measured) {
    std::fprintf(stderr, "%s\n", measured.error().text.c_str());
    return 1;
  }
  std::printf("%s\n", measured->dump().c_str());
  return (*measured)["errors"] == 0 && (*measured)["mismatches"] == 0 ? 0 : 1;
}

}  // namespace
}  // namespace vmferry::perf

int main(int argc, char** argv) {
  return vmferry::perf::run(argc, argv);
}
