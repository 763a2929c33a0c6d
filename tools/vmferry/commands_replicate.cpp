// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "engine/base/text.h"
#include "tools/vmferry/commands.h"
#include "tools/vmferry/output.h"

namespace vmferry::cli {

namespace {

struct ReplicateOptions {
  std::vector<std::string> volumes;
  std::string peer;
  std::string mode;
  std::string rpo;
  std::string bandwidth;
  std::string state = "in-sync";
  std::string timeout = "10m";
  bool overwrite_peer = false;
};

int wait(const Context& context, const ReplicateOptions& options) {
  Client client(context.control);
  ProgressLine progress(context.json);
  const auto result = client.call(
      "replicate.wait", {{"volumes", options.volumes}, {"state", options.state}, {"timeout", options.timeout}},
      [&](const Json& value) {
        progress.show(fmt::format("{}, {} to send, {}", cell(value, "state"),
                                  format_size(number(value, "remaining_bytes")),
                                  format_rate(number(value, "send_rate"))));
      });
  progress.finish();
  if (!result) return report(context, result.error());
  if (context.json)
    print_json(*result);
  else
    std::printf("%s\n", cell(*result, "state").c_str());
  return kDone;
}

int verify(const Context& context, const ReplicateOptions& options) {
  Client client(context.control);
  ProgressLine progress(context.json);
  const auto result = client.call("replicate.verify", {{"volumes", options.volumes}}, [&](const Json& value) {
    progress.show(fmt::format("{} of {} compared", format_size(number(value, "done_bytes")),
                              format_size(number(value, "total_bytes"))));
  });
  progress.finish();
  if (!result) return report(context, result.error());
  const Json differences = result->value("differences", Json::array());
  if (context.json) {
    print_json(*result);
  } else {
    for (const Json& item : differences) {
      std::printf("%s differs at %s, %s bytes\n", cell(item, "volume").c_str(), cell(item, "offset").c_str(),
                  cell(item, "length").c_str());
    }
    if (differences.empty())
      std::printf("equal: %s compared\n", format_size(number(*result, "compared_bytes")).c_str());
  }
  return differences.empty() ? kDone : kFailed;
}

}  // namespace

void add_replicate_commands(CLI::App& app, Context& context) {
  CLI::App* replicate = app.add_subcommand("replicate", "Keeps a copy of volumes at a peer");
  replicate->require_subcommand(1);
  replicate->footer(
      "Example:\n"
      "  vmferry replicate start vda --peer hostb --rpo 30s --bandwidth 50Mbit\n"
      "  vmferry replicate wait vda --timeout 10m\n"
      "  vmferry replicate verify vda");
  replicate->fallthrough();
  const auto options = make_options<ReplicateOptions>();
  const auto volumes = [options](CLI::App* command, bool required = true) {
    CLI::Option* option = command->add_option("VOLUME", options->volumes, "volumes; named together they are one group");
    if (required) option->required();
  };
  const auto settings = [options](CLI::App* command) {
    command->add_option("--mode", options->mode, "what the guest waits for: batch (epochs every RPO)")
        ->type_name("MODE");
    command->add_option("--rpo", options->rpo, "how old the copy may become, as 30s")->type_name("TIME");
    command->add_option("--bandwidth", options->bandwidth, "cap for the link to this peer, as 50Mbit; 0 lifts it")
        ->type_name("RATE");
  };

  CLI::App* start = add_command(*replicate, context, "start", "Begins with a full copy, then follows",
                                "vmferry replicate start vda --peer hostb --rpo 30s", [options, &context] {
                                  return call_and_print(context, "replicate.start",
                                                        {{"volumes", options->volumes},
                                                         {"peer", options->peer},
                                                         {"mode", options->mode},
                                                         {"rpo", options->rpo},
                                                         {"bandwidth", options->bandwidth},
                                                         {"overwrite_peer", options->overwrite_peer}},
                                                        [](const Json& result) { print_replication(result); });
                                });
  volumes(start);
  start->add_option("--peer", options->peer, "the peer that gets the copy")->required();
  settings(start);
  start->add_flag("--overwrite-peer", options->overwrite_peer, "replace data at the peer that is no earlier copy");

  CLI::App* set = add_command(*replicate, context, "set", "Changes RPO, mode or bandwidth",
                              "vmferry replicate set vda --bandwidth 20Mbit", [options, &context] {
                                return call_and_print(context, "replicate.set",
                                                      {{"volumes", options->volumes},
                                                       {"mode", options->mode},
                                                       {"rpo", options->rpo},
                                                       {"bandwidth", options->bandwidth}},
                                                      [](const Json& result) { print_replication(result); });
                              });
  volumes(set);
  settings(set);

  CLI::App* status = add_command(*replicate, context, "status", "Shows state, progress and RPO",
                                 "vmferry replicate status --json", [options, &context] {
                                   return call_and_print(context, "replicate.status", {{"volumes", options->volumes}},
                                                         [](const Json& result) { print_replication(result); });
                                 });
  volumes(status, false);

  CLI::App* waiting = add_command(*replicate, context, "wait",
                                  "Waits until everything written before is durable and applied at the peer",
                                  "vmferry replicate wait vda --state in-sync --timeout 10m",
                                  [options, &context] { return wait(context, *options); });
  volumes(waiting);
  waiting->add_option("--state", options->state, "the state to wait for")->type_name("STATE");
  waiting->add_option("--timeout", options->timeout, "give up after this long")->type_name("TIME");

  for (const auto& [name, text] : std::initializer_list<std::pair<const char*, const char*>>{
           {"pause", "Stops sending; changes are remembered"},
           {"resume", "Sends again"},
           {"stop", "Ends replication; the peer keeps its copy"}}) {
    CLI::App* command = add_command(*replicate, context, name, text, fmt::format("vmferry replicate {} vda", name),
                                    [options, &context, method = fmt::format("replicate.{}", name)] {
                                      return call_and_print(context, method, {{"volumes", options->volumes}},
                                                            [](const Json& result) { print_replication(result); });
                                    });
    volumes(command);
  }

  CLI::App* verifying =
      add_command(*replicate, context, "verify", "Compares both copies; exit status 1 on a difference",
                  "vmferry replicate verify vda", [options, &context] { return verify(context, *options); });
  volumes(verifying);
}

}  // namespace vmferry::cli
