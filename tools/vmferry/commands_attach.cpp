// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "tools/vmferry/commands.h"
#include "tools/vmferry/output.h"

namespace vmferry::cli {

namespace {

struct AttachOptions {
  std::string volume;
  std::string device;
  std::string connections = "1";
  std::string dead_timeout;
  std::string request_timeout;
  bool force = false;
};

}  // namespace

void add_attach_commands(CLI::App& app, Context& context) {
  const auto options = make_options<AttachOptions>();
  CLI::App* attach = add_command(app, context, "attach", "Makes a volume a block device of this host, until detach",
                                 "vmferry attach vda", [options, &context] {
                                   const Json params{{"volume", options->volume},
                                                     {"device", options->device},
                                                     {"connections", options->connections},
                                                     {"dead_timeout", options->dead_timeout},
                                                     {"request_timeout", options->request_timeout}};
                                   return call_and_print(context, "attach", params, [](const Json& result) {
                                     std::printf("%s\n", cell(result, "device").c_str());
                                   });
                                 });
  attach->add_option("VOLUME", options->volume, "the volume, primary here")->required();
  attach->add_option("--device", options->device, "/dev/nbdN (default: the first that is free)");
  attach->add_option("--connections", options->connections, "sockets between the kernel and the daemon, 1 to 16");
  attach->add_option("--dead-timeout", options->dead_timeout,
                     "how long I/O waits for a daemon that is gone before it fails (default: 5m)");
  attach->add_option("--request-timeout", options->request_timeout,
                     "after how long a request without an answer is sent again (default: 30s)");

  CLI::App* detach =
      add_command(app, context, "detach", "Ends what attach began", "vmferry detach vda", [options, &context] {
        const Json params{{"what", options->volume}, {"force", options->force}};
        return call_and_print(context, "detach", params,
                              [options](const Json&) { std::printf("'%s' is detached\n", options->volume.c_str()); });
      });
  detach->add_option("VOLUME|DEVICE", options->volume, "the volume, or the device that it is")->required();
  detach->add_flag("--force", options->force,
                   "although it is in use: its programs get I/O errors and lose what they have not synced");
}

}  // namespace vmferry::cli
