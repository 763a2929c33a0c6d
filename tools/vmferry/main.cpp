// SPDX-License-Identifier: Apache-2.0
//
// vmferry: the command line of vmferryd (design section 9). Parses, calls one JSON-RPC method, prints.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <iostream>

#include "tools/vmferry/commands.h"

int main(int argc, char** argv) {
  using namespace vmferry::cli;
  CLI::App app("Moves running virtual machines between hosts and keeps copies of their disks.", "vmferry");
  app.set_version_flag("--version", "vmferry " VMFERRY_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Example:\n"
      "  vmferry peer invite --address 192.0.2.7:4411          # on host B, prints a token\n"
      "  vmferry peer join TOKEN --name hostb                  # on host A\n"
      "  vmferry migrate vda --peer hostb --qmp /run/vm.qmp    # on host A: the guest moves to B\n"
      "Every command has --help with an example. Exit status: 0 done, 1 failed, 2 wrong usage.");
  Context context;
  const char* const from_environment = std::getenv("VMFERRY_CONTROL");
  context.control = from_environment != nullptr ? from_environment : "unix:/var/lib/vmferry/control.sock";
  app.add_option("--control", context.control,
                 "control socket of vmferryd (default: $VMFERRY_CONTROL or " + context.control + ")")
      ->type_name("unix:PATH");
  app.add_flag("--json", context.json, "print JSON");
  app.fallthrough();  // --json and --control may stand after the command, too
  add_volume_commands(app, context);
  add_peer_commands(app, context);
  add_replicate_commands(app, context);
  add_migrate_commands(app, context);
  add_role_commands(app, context);
  add_attach_commands(app, context);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error, std::cout, std::cerr);
    return code == 0 ? kDone : kUsage;
  }
  return context.run ? context.run() : kUsage;
}
