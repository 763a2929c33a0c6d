// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <filesystem>

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

// The one object that ends a migration (docs/operations.md): these members, always, and no others.
Json whole_result(const Json& said) {
  const Json none{{"disk", 0}, {"memory", 0}};
  Json whole{{"result", "failed"}, {"owner", "unknown"}, {"guest", "unknown"}, {"total_s", 0.0},  {"downtime_ms", 0.0},
             {"rounds", 0},        {"wire_bytes", none}, {"raw_bytes", none},  {"error", nullptr}};
  for (const auto& [key, value] : whole.items()) {
    if (const auto known = said.find(key); known != said.end()) value = *known;
  }
  return whole;
}

// What the command shows while it waits, and what it knows when the daemon dies meanwhile.
struct Followed {
  explicit Followed(bool silent) : line(silent) {}
  void show(const Json& progress) {
    last = progress;
    line.show(migration_line(progress));
  }
  ProgressLine line;
  Json last = Json::object();
};

// The daemon has not answered, or there is none: nobody here knows where the guest is, or there is no such guest.
int print_unanswered(const Context& context, const Error& error, const Json& last, const std::string& volume) {
  const bool silent = error.kind == ErrorKind::Unavailable;
  const std::string text =
      error.text + (silent ? fmt::format("; `vmferry status` on both sides tells which one may run the guest, and "
                                         "`vmferry resolve {}` decides should one of them be lost for good",
                                         volume)
                           : "; nothing was begun: `vmferry status` lists what is served here, and there is nothing "
                             "for `vmferry resolve` to decide");
  std::fprintf(stderr, "vmferry: %s\n", text.c_str());
  if (context.json) {
    Json whole = whole_result(last);
    whole["total_s"] = last.value("elapsed_s", 0.0);
    whole["error"] = text;
    print_json(whole);
  }
  return kFailed;
}

int print_result(const Context& context, const Json& result) {
  const bool begun = result.value("begun", true);  // a refusal is told in one line
  if (context.json)
    print_json(whole_result(result));
  else if (begun)
    print_migration_result(result);
  if (cell(result, "result") == "done") return kDone;
  if (context.json || !begun) std::fprintf(stderr, "vmferry: %s\n", cell(result, "error").c_str());
  return kFailed;
}

// As the caller's shell sees it; the daemon runs in another folder.
std::string absolute(const std::string& path) {
  std::error_code error;
  const auto whole = std::filesystem::absolute(path, error);
  return path.empty() || error ? path : whole.string();
}

int migrate(const Context& context, const MigrateOptions& options) {
  Client client(context.control);
  Followed followed(context.json);
  const Json params{{"volumes", options.volumes},
                    {"peer", options.peer},
                    {"qmp", absolute(options.qmp)},
                    {"downtime_limit", options.downtime_limit},
                    {"bandwidth", options.bandwidth},
                    {"timeout", options.timeout},
                    {"dry_run", options.dry_run},
                    {"background", options.background},
                    {"detach", options.detach},
                    {"quit_source", options.quit_source},
                    {"overwrite_peer", options.overwrite_peer}};
  const auto result = client.call("migrate.start", params, [&](const Json& value) { followed.show(value); });
  followed.line.finish();
  if (!result) {
    if (result.error().kind == ErrorKind::InvalidArgument) return report(context, result.error());
    return print_unanswered(context, result.error(), followed.last, options.volumes.front());
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
  return print_result(context, *result);
}

int watch_migration(const Context& context, const std::vector<std::string>& names) {
  Client client(context.control);
  Followed followed(context.json);
  const auto result =
      client.call("migrate.watch", {{"volumes", names}}, [&](const Json& value) { followed.show(value); });
  followed.line.finish();
  if (result) return print_result(context, *result);
  // No migration to watch is an answer; no answer may be the end of one.
  if (result.error().kind != ErrorKind::Unavailable) return report(context, result.error());
  return print_unanswered(context, result.error(), followed.last, names.empty() ? "VOLUME" : names.front());
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

  CLI::App* watch = add_command(*command, context, "watch", "Follows the migration to its end", "vmferry migrate watch",
                                [names, &context] { return watch_migration(context, *names); });
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
