// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <cstdio>

#include "tools/vmferry/commands.h"
#include "tools/vmferry/output.h"

namespace vmferry::cli {

namespace {

struct RoleOptions {
  std::vector<std::string> volumes;
  bool force = false;
  bool accept_inconsistent = false;
  bool run_here = false;
  bool run_at_peer = false;
  bool discard_local = false;
  bool discard_peer = false;
  bool watch = false;
  bool follow = false;
};

int watch_status(const Context& context) {
  Client client(context.control);
  while (true) {
    const auto result = client.call("status", Json::object());
    if (!result) return report(context, result.error());
    if (context.json) {
      print_json(*result);
    } else {
      std::fputs("\033[H\033[2J", stdout);
      print_status(*result);
    }
    std::fflush(stdout);
    sleep(1);
  }
}

int resolve(const Context& context, const RoleOptions& options) {
  const int chosen =
      int{options.run_here} + int{options.run_at_peer} + int{options.discard_local} + int{options.discard_peer};
  if (chosen != 1) {
    return report(context,
                  Error{ErrorKind::InvalidArgument,
                        "resolve needs exactly one of --run-here, --run-at-peer, --discard-local, --discard-peer"});
  }
  const char* how = options.run_here        ? "run-here"
                    : options.run_at_peer   ? "run-at-peer"
                    : options.discard_local ? "discard-local"
                                            : "discard-peer";
  return call_and_print(context, "resolve", {{"volumes", options.volumes}, {"how", how}, {"force", options.force}},
                        [](const Json& result) { print_status(result); });
}

}  // namespace

void add_role_commands(CLI::App& app, Context& context) {
  const auto options = make_options<RoleOptions>();

  CLI::App* promote = add_command(app, context, "promote", "Makes secondary volumes primary", "vmferry promote vda",
                                  [options, &context] {
                                    return call_and_print(context, "promote",
                                                          {{"volumes", options->volumes},
                                                           {"force", options->force},
                                                           {"accept_inconsistent", options->accept_inconsistent}},
                                                          [](const Json& result) { print_status(result); });
                                  });
  promote->add_option("VOLUME", options->volumes, "one volume stands for its group")->required();
  promote->add_flag("--force", options->force,
                    "without the peer's word; if the peer still runs, both sides will have written: split brain");
  promote->add_flag("--accept-inconsistent", options->accept_inconsistent,
                    "although the copy is no image of one moment; a file system on it may be damaged");

  CLI::App* demote =
      add_command(app, context, "demote", "Makes primary volumes secondary", "vmferry demote vda", [options, &context] {
        return call_and_print(context, "demote", {{"volumes", options->volumes}},
                              [](const Json& result) { print_status(result); });
      });
  demote->add_option("VOLUME", options->volumes, "one volume stands for its group")->required();

  CLI::App* resolving =
      add_command(app, context, "resolve", "Decides what the daemons may not decide alone",
                  "vmferry resolve vda --run-here --force", [options, &context] { return resolve(context, *options); });
  resolving->add_option("VOLUME", options->volumes, "one volume stands for its group")->required();
  resolving->add_flag("--run-here", options->run_here, "the guest may run here; the other side is told");
  resolving->add_flag("--run-at-peer", options->run_at_peer, "the guest may run at the peer; this side is fenced");
  resolving->add_flag("--discard-local", options->discard_local, "split brain: follow the peer, give up our writes");
  resolving->add_flag("--discard-peer", options->discard_peer,
                      "split brain: the peer follows us, its writes are given up");
  resolving->add_flag("--force", options->force, "needed by --run-here when the peer cannot be asked");

  CLI::App* status = add_command(app, context, "status", "Says for each volume which side may run it, and why",
                                 "vmferry status --json", [options, &context] {
                                   if (options->watch) return watch_status(context);
                                   return call_and_print(context, "status", Json::object(),
                                                         [](const Json& result) { print_status(result); });
                                 });
  status->add_flag("--watch", options->watch, "repeat every second");

  CLI::App* events =
      add_command(app, context, "events", "What happened", "vmferry events --follow", [options, &context] {
        Client client(context.control);
        const auto show = [&](const Json& event) {
          if (context.json) {
            print_json(event);
            std::fflush(stdout);
          } else {
            print_event(event);
          }
        };
        const auto result = client.call("events", {{"follow", options->follow}}, show);
        if (!result) return report(context, result.error());
        return static_cast<int>(kDone);
      });
  events->add_flag("--follow", options->follow, "go on with new ones");
}

}  // namespace vmferry::cli
