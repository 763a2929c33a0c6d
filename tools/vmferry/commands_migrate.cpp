// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "engine/base/text.h"
#include "tools/vmferry/commands.h"
#include "tools/vmferry/output.h"

namespace vmferry::cli {

namespace {

struct MigrateOptions {
  std::vector<std::string> volumes;
  std::string peer;
  std::string qmp;
  std::string downtime_limit = "300ms";
  std::string bandwidth;
  std::string timeout = "30m";
  bool dry_run = false;
  bool background = false;
  bool detach = false;
  bool quit_source = false;
  bool overwrite_peer = false;
};

int print_result(const Context& context, const Result<Json>& result) {
  if (!result) return report(context, result.error());
  // Where the guest is was not looked at before a refusal; there may not even be such a volume.
  const bool begun = result->value("begun", true);
  if (context.json)
    print_json(*result);
  else if (begun)
    print_migration_result(*result);
  if (cell(*result, "result") == "done") return kDone;
  if (context.json || !begun) std::fprintf(stderr, "vmferry: %s\n", cell(*result, "error").c_str());
  return kFailed;
}

int migrate(const Context& context, const MigrateOptions& options) {
  Client client(context.control);
  ProgressLine progress(context.json);
  const Json params{{"volumes", options.volumes},
                    {"peer", options.peer},
                    {"qmp", options.qmp},
                    {"downtime_limit", options.downtime_limit},
                    {"bandwidth", options.bandwidth},
                    {"timeout", options.timeout},
                    {"dry_run", options.dry_run},
                    {"background", options.background},
                    {"detach", options.detach},
                    {"quit_source", options.quit_source},
                    {"overwrite_peer", options.overwrite_peer}};
  const auto result =
      client.call("migrate.start", params, [&](const Json& value) { progress.show(migration_line(value)); });
  progress.finish();
  if (!result) {
    // A migration always ends with its one object. When it was refused before it began nobody looked where the guest is
    // (there may not even be such a volume), and nothing is claimed; when the daemon is gone, nobody knows.
    if (context.json && result.error().kind != ErrorKind::InvalidArgument) {
      Json object{
          {"result", "failed"}, {"error", result.error().text}, {"kind", std::string(to_string(result.error().kind))}};
      if (result.error().kind == ErrorKind::Unavailable) object.update({{"owner", "unknown"}, {"guest", "unknown"}});
      print_json(object);
      std::fprintf(stderr, "vmferry: %s\n", result.error().text.c_str());
      return kFailed;
    }
    return report(context, result.error());
  }
  const std::string outcome = cell(*result, "result");
  if (outcome == "possible" || outcome == "started") {
    if (context.json) {
      print_json(*result);
    } else if (options.background) {
      std::printf("migration of %s has begun; see: vmferry migrate watch\n", options.volumes.front().c_str());
    } else {
      for (const Json& line : result->value("warnings", Json::array())) {
        std::printf("warning: %s\n", line.get<std::string>().c_str());
      }
      std::printf("possible: smallest pause %s ms, about %s s in all\n", cell(*result, "pause_ms_min").c_str(),
                  cell(*result, "estimate_s").c_str());
    }
    return kDone;
  }
  return print_result(context, result);
}

}  // namespace

void add_migrate_commands(CLI::App& app, Context& context) {
  const auto options = make_options<MigrateOptions>();
  CLI::App* command = add_command(app, context, "migrate", "Moves a running guest with its disks to a peer",
                                  "vmferry migrate vda --peer hostb --qmp /run/vm.qmp", [options, &context] {
                                    if (options->volumes.empty() || options->peer.empty()) {
                                      return report(context, Error{ErrorKind::InvalidArgument,
                                                                   "migrate needs VOLUME... and --peer NAME; see "
                                                                   "vmferry migrate --help"});
                                    }
                                    return migrate(context, *options);
                                  });
  command->add_option("VOLUME", options->volumes, "all volumes of the guest");
  command->add_option("--peer", options->peer, "where the guest goes");
  command->add_option("--qmp", options->qmp, "QMP socket of the guest (default: qmp= of the volume)")
      ->type_name("PATH");
  command->add_option("--downtime-limit", options->downtime_limit, "longest pause to aim at (300ms)")
      ->type_name("TIME");
  command->add_option("--bandwidth", options->bandwidth, "cap for the link, as 80Mbit")->type_name("RATE");
  command->add_option("--timeout", options->timeout, "roll back after this long (30m)")->type_name("TIME");
  command->add_flag("--dry-run", options->dry_run, "only check whether it can work, and how long it takes");
  command->add_flag("--background", options->background, "return at once");
  command->add_flag("--detach", options->detach, "the old source does not follow as secondary");
  command->add_flag("--quit-source", options->quit_source, "end the source QEMU when the guest runs at the peer");
  command->add_flag("--overwrite-peer", options->overwrite_peer, "replace data at the peer that is no earlier copy");

  const auto names = make_options<std::vector<std::string>>();
  CLI::App* status =
      add_command(*command, context, "status", "Shows the running or the last migration",
                  "vmferry migrate status --json", [names, &context] {
                    return call_and_print(context, "migrate.status", {{"volumes", *names}}, [](const Json& result) {
                      for (const Json& item : result.value("migrations", Json::array())) {
                        std::printf("%s: %s\n", cell(item, "volumes").c_str(), migration_line(item).c_str());
                      }
                    });
                  });
  status->add_option("VOLUME", *names, "volumes (default: all)");

  CLI::App* cancel = add_command(*command, context, "cancel", "Gives the migration up; the guest stays here",
                                 "vmferry migrate cancel vda", [names, &context] {
                                   return call_and_print(context, "migrate.cancel", {{"volumes", *names}},
                                                         [](const Json&) { std::puts("cancelled"); });
                                 });
  cancel->add_option("VOLUME", *names, "volumes (default: the only migration)");

  CLI::App* watch = add_command(
      *command, context, "watch", "Follows the migration to its end", "vmferry migrate watch", [names, &context] {
        Client client(context.control);
        ProgressLine progress(context.json);
        const auto result = client.call("migrate.watch", {{"volumes", *names}},
                                        [&](const Json& value) { progress.show(migration_line(value)); });
        progress.finish();
        return print_result(context, result);
      });
  watch->add_option("VOLUME", *names, "volumes (default: the only migration)");

  const auto estimate = make_options<MigrateOptions>();
  CLI::App* estimating = add_command(
      app, context, "estimate", "Predicts time and bytes of a migration", "vmferry estimate vda --peer hostb",
      [estimate, &context] {
        return call_and_print(
            context, "estimate", {{"volumes", estimate->volumes}, {"peer", estimate->peer}}, [](const Json& result) {
              std::printf("about %s s; %s of disk; round trip %s ms\n", cell(result, "estimate_s").c_str(),
                          format_size(number(result, "disk_bytes")).c_str(), cell(result, "rtt_ms").c_str());
            });
      });
  estimating->add_option("VOLUME", estimate->volumes, "all volumes of the guest")->required();
  estimating->add_option("--peer", estimate->peer, "where the guest would go")->required();
}

}  // namespace vmferry::cli
