// SPDX-License-Identifier: Apache-2.0
//
// The daemon's command line. CLI11 splits it; the keys are known to config.cpp alone.
#include <CLI/CLI.hpp>
#include <fstream>
#include <sstream>

#include "engine/control/config_internal.h"

namespace vmferry {

namespace {

constexpr const char* kFooter =
    "Example:\n"
    "  vmferryd --state-dir /var/lib/vmferry --listen 0.0.0.0:4411 \\\n"
    "           --volume name=vda,path=/srv/vda.img,size=20G,nbd=unix:/run/vda.sock,qmp=/run/vm.qmp\n"
    "  vmferry --control unix:/var/lib/vmferry/control.sock status\n";

void read_file(const std::string& path, DaemonConfig& config, std::vector<ConfigProblem>& problems) {
  std::ifstream file(path);
  if (!file) {
    problems.push_back({path, fmt::format("cannot read the configuration: {}", errno_text(errno))});
    return;
  }
  std::ostringstream text;
  text << file.rdbuf();
  apply_toml(text.str(), path, config, problems);
}

}  // namespace

ConfigOutcome load_config(const std::vector<std::string>& arguments, const PassedAddresses& passed) {
  ConfigOutcome outcome;
  DaemonConfig& config = outcome.config;
  CLI::App app("Serves the disks of virtual machines and moves running ones to a peer daemon.", "vmferryd");
  app.footer(kFooter);
  app.set_version_flag("--version", "vmferryd " VMFERRY_VERSION);
  std::vector<std::pair<std::string, std::string>> settings;
  const auto option = [&](const char* flag, const char* value, const char* text) {
    app.add_option_function<std::string>(
           std::string("--") + flag,
           [&settings, flag](const std::string& given) { settings.emplace_back(flag, given); }, text)
        ->type_name(value)
        ->take_last();
  };
  std::vector<std::string> volumes;
  option("state-dir", "DIR", "keeps roles, keys and dirty state; created with mode 0700");
  app.add_option("--config", config.config_file, "TOML file with the same names as these options")->type_name("FILE");
  app.add_flag("--check-config", config.check_only, "check the configuration, report every problem, and exit");
  option("control", "unix:PATH", "control socket (default: DIR/control.sock)");
  option("listen", "HOST:PORT", "where peers connect");
  option("metrics", "HOST:PORT", "serves Prometheus metrics");
  option("nbd-tls", "POLICY",
         "TLS of the NBD exports: require, allow or off (default: require with one of the next two, else off)");
  option("nbd-tls-certificates", "DIR", "ca-cert.pem, server-cert.pem, server-key.pem; clients need a certificate too");
  option("nbd-tls-psk", "FILE", "pre-shared keys: lines of USER:HEXKEY");
  option("nbd-connections", "N", "clients of each NBD export at once, 1 to 65535 (default: 1024)");
  option("nbd-handshake-timeout", "TIME", "until an NBD client has to be in business, 1s to 10m (default: 10s)");
  option("on-running", "PROGRAM",
         "is run here when a guest has arrived and runs: DNS, leases, routes (docs/operations.md)");
  option("log-level", "LEVEL", "debug, info (default), warn or error");
  app.add_option("--volume", volumes,
                 "name=NAME,path=FILE[,size=SIZE][,role=primary|secondary][,nbd=unix:PATH|tcp:HOST:PORT]"
                 "[,nbd-tls=require|allow|off][,tls-allow=CLIENT:...][,read-only=on|off][,description=TEXT][,vhost-"
                 "user-blk=PATH][,queues=N][,socket-owner="
                 "USER:GROUP][,socket-mode=MODE][,qmp=PATH]"
                 "[,aio=io_uring|libaio][,cache=writeback|none]; repeat for more")
      ->type_name("KEY=VALUE,...")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->delimiter('\0');
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());  // the order that CLI11 takes a vector in
  try {
    app.parse(std::move(reversed));
  } catch (const CLI::CallForHelp&) {
    outcome.help = app.help();
    return outcome;
  } catch (const CLI::CallForVersion&) {
    outcome.help = "vmferryd " VMFERRY_VERSION "\n";
    return outcome;
  } catch (const CLI::ParseError& error) {
    outcome.problems.push_back({"", error.what()});
    return outcome;
  }
  if (!config.config_file.empty()) read_file(config.config_file, config, outcome.problems);
  for (const auto& [key, value] : settings) {
    config_detail::apply_setting(key, value, "--" + key, config, outcome.problems);
  }
  for (const std::string& text : volumes) {
    config.volumes.push_back(parse_volume_option(text, "--volume " + text, outcome.problems));
  }
  for (VolumeConfig& volume : config.volumes) {
    if (const auto found = passed.find(volume.name); found != passed.end()) volume.passed = found->second;
  }
  config_detail::finish(config, outcome.problems);
  return outcome;
}

}  // namespace vmferry
