// SPDX-License-Identifier: Apache-2.0
//
// vmferryd: reads the configuration, starts the daemon, and ends it in order at SIGTERM or SIGINT.
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <cstdio>
#include <utility>

#include "engine/control/config.h"
#include "engine/daemon/daemon.h"
#include "engine/daemon/nbd_tls.h"
#include "engine/daemon/passed_sockets.h"
#include "engine/runtime/reactor.h"

namespace {

using namespace vmferry;

constexpr int kDone = 0;
constexpr int kFailed = 1;
constexpr int kUsage = 2;

// Many guests, each with several connections, do not fit into the usual 1024 descriptors.
void raise_descriptor_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
}

int serve(Reactor& reactor, const DaemonConfig& config, PassedSockets passed) {
  int status = kDone;
  Daemon daemon(reactor, config, std::move(passed));
  bool stopping = false;
  const auto stop = [&](int signal_number) {
    if (stopping) return;
    stopping = true;
    log::info("signal={} shutting down", signal_number);
    daemon.shut_down([&](const Status& result) {
      if (!result) {
        log::error("shutdown: {}", result.error().text);
        status = kFailed;
      }
      reactor.stop();
    });
  };
  const auto signals = SignalWatch::create(reactor, {SIGTERM, SIGINT}, stop);
  if (!signals) {
    log::error("start: {}", signals.error().text);
    return kFailed;
  }
  daemon.start([&](const Status& result) {
    if (result) return;
    log::error("start: {}", result.error().text);
    status = kFailed;
    reactor.stop();
  });
  reactor.run();
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<ConfigProblem> problems_of_passed;
  PassedSockets passed = PassedSockets::take(problems_of_passed);
  ConfigOutcome outcome = load_config(std::vector<std::string>(argv + 1, argv + argc), passed.addresses());
  if (!outcome.help.empty()) {
    std::fputs(outcome.help.c_str(), stdout);
    return kDone;
  }
  outcome.problems.insert(outcome.problems.begin(), problems_of_passed.begin(), problems_of_passed.end());
  if (outcome.config.check_only) {
    check_files(outcome.config, outcome.problems);
    if (const auto credentials = load_nbd_credentials(outcome.config.nbd_tls); !credentials) {
      outcome.problems.push_back(
          {place_of(outcome.config.places, {"nbd-tls-certificates", "nbd-tls-psk"}), credentials.error().text});
    }
  }
  for (const ConfigProblem& problem : outcome.problems) {
    std::fprintf(stderr, "vmferryd: %s\n", problem.to_string().c_str());
  }
  if (!outcome.problems.empty()) return kUsage;
  if (outcome.config.check_only) {
    std::printf("the configuration is correct: %zu volumes\n", outcome.config.volumes.size());
    return kDone;
  }
  umask(0077);
  std::signal(SIGPIPE, SIG_IGN);
  raise_descriptor_limit();
  log::set_level(outcome.config.log_level);
  // Signals are blocked before the reactor starts its workers, so that the loop alone takes them.
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGTERM);
  sigaddset(&blocked, SIGINT);
  sigprocmask(SIG_BLOCK, &blocked, nullptr);
  const auto reactor = Reactor::create();
  if (!reactor) {
    log::error("start: {}", reactor.error().text);
    return kFailed;
  }
  return serve(**reactor, outcome.config, std::move(passed));
}
