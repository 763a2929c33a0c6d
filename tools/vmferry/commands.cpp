// SPDX-License-Identifier: Apache-2.0
#include "tools/vmferry/commands.h"

#include <cstdio>

#include "tools/vmferry/output.h"

namespace vmferry::cli {

int report(const Context& context, const Error& error) {
  if (context.json) {
    print_json({{"error", error.text}, {"kind", std::string(to_string(error.kind))}});
  }
  std::fprintf(stderr, "vmferry: %s\n", error.text.c_str());
  return error.kind == ErrorKind::InvalidArgument ? kUsage : kFailed;
}

int call_and_print(const Context& context, const std::string& method, const Json& params,
                   const std::function<void(const Json&)>& show) {
  Client client(context.control);
  const auto result = client.call(method, params);
  if (!result) return report(context, result.error());
  if (context.json)
    print_json(*result);
  else
    show(*result);
  return kDone;
}

CLI::App* add_command(CLI::App& parent, Context& context, const std::string& name, const std::string& text,
                      const std::string& example, std::function<int()> run) {
  CLI::App* command = parent.add_subcommand(name, text);
  command->footer("Example:\n  " + example);
  command->fallthrough();
  command->final_callback([command, &context, run = std::move(run)] {
    // Only the innermost command runs: `migrate status` is parsed by `migrate`, too.
    if (command->get_subcommands().empty()) context.run = run;
  });
  return command;
}

namespace {

struct VolumeOptions {
  std::string name;
  std::string spec;
  std::string size;
};

}  // namespace

void add_volume_commands(CLI::App& app, Context& context) {
  CLI::App* volume = app.add_subcommand("volume", "The virtual disks that this daemon serves");
  volume->require_subcommand(1);
  volume->footer(
      "Example:\n"
      "  vmferry volume add name=vda,path=/srv/vda.img,size=20G,nbd=unix:/run/vda.nbd\n"
      "  vmferry volume list\n"
      "  vmferry volume resize vda 40G");
  volume->fallthrough();
  const auto options = make_options<VolumeOptions>();

  CLI::App* add = add_command(
      *volume, context, "add", "Serves another file or block device; it stays over restarts",
      "vmferry volume add name=vdb,path=/srv/vdb.img,size=20G,nbd=unix:/run/vdb.sock", [options, &context] {
        return call_and_print(context, "volume.add", {{"spec", options->spec}}, [](const Json& result) {
          std::printf("volume '%s' added: %s\n", cell(result, "name").c_str(), cell(result, "exports").c_str());
        });
      });
  add->add_option("SPEC", options->spec,
                  "name=NAME,path=FILE[,size=SIZE][,role=...][,nbd=...][,read-only=on|off][,description=...]"
                  "[,vhost-user-blk=...][,socket-owner=...][,socket-mode=...][,qmp=...]")
      ->required();

  add_command(*volume, context, "list", "Lists the volumes", "vmferry volume list", [&context] {
    return call_and_print(context, "volume.list", Json::object(),
                          [](const Json& result) { print_volumes(result["volumes"]); });
  });

  CLI::App* show =
      add_command(*volume, context, "show", "Shows one volume", "vmferry volume show vda --json", [options, &context] {
        return call_and_print(context, "volume.show", {{"name", options->name}}, [](const Json& result) {
          for (const auto& [key, value] : result.items()) {
            std::printf("%-18s %s\n", key.c_str(), cell(result, key.c_str()).c_str());
          }
        });
      });
  show->add_option("NAME", options->name, "the volume")->required();

  CLI::App* remove =
      add_command(*volume, context, "remove", "Stops serving a volume; its data stays", "vmferry volume remove vdb",
                  [options, &context] {
                    return call_and_print(context, "volume.remove", {{"name", options->name}}, [&](const Json& result) {
                      std::printf("volume '%s' removed; its data is still in %s\n", options->name.c_str(),
                                  cell(result, "path").c_str());
                    });
                  });
  remove->add_option("NAME", options->name, "the volume")->required();

  CLI::App* resize = add_command(
      *volume, context, "resize", "Grows a volume, at the peer first", "vmferry volume resize vda 40G",
      [options, &context] {
        return call_and_print(
            context, "volume.resize", {{"name", options->name}, {"size", options->size}}, [](const Json& result) {
              std::printf("volume '%s' has %s bytes now\n", cell(result, "name").c_str(), cell(result, "size").c_str());
            });
      });
  resize->add_option("NAME", options->name, "the volume")->required();
  resize->add_option("SIZE", options->size, "new size, larger than now (40G)")->required();
}

}  // namespace vmferry::cli
