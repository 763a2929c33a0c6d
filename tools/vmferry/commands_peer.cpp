// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <iostream>
#include <optional>

#include "tools/vmferry/commands.h"
#include "tools/vmferry/output.h"

namespace vmferry::cli {

namespace {

struct PeerOptions {
  std::string address;
  std::optional<std::string> grant;  // absent: all rights
  std::string token;
  std::string name;
  std::string as;
};

Result<std::string> read_token(const std::string& argument) {
  std::string token = argument;
  if (argument == "-" && !std::getline(std::cin, token)) {
    return fail(ErrorKind::InvalidArgument, "no token on standard input");
  }
  const size_t first = token.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return fail(ErrorKind::InvalidArgument, "the token is empty");
  return token.substr(first, token.find_last_not_of(" \t\r\n") - first + 1);
}

}  // namespace

void add_peer_commands(CLI::App& app, Context& context) {
  CLI::App* peer = app.add_subcommand("peer", "The other daemons that this one trusts");
  peer->require_subcommand(1);
  peer->footer(
      "Example:\n"
      "  vmferry peer invite --address 192.0.2.7:4411 > token   # on host B\n"
      "  vmferry peer join - --name hostb --as hosta < token    # on host A\n"
      "  vmferry peer ping hostb");
  peer->fallthrough();
  const auto options = make_options<PeerOptions>();

  CLI::App* invite = add_command(
      *peer, context, "invite", "Prints a token with which one other daemon may join, once, within 15 minutes",
      "vmferry peer invite --address 192.0.2.7:4411", [options, &context] {
        Json params{{"address", options->address}};
        if (options->grant) params["grant"] = *options->grant;  // an empty list is not the default
        return call_and_print(context, "peer.invite", params, [](const Json& result) {
          std::fprintf(stderr, "grants %s; valid once, for 15 minutes\n", cell(result, "grants").c_str());
          std::puts(cell(result, "token").c_str());
        });
      });
  invite->add_option("--address", options->address, "where the other daemon reaches this one")
      ->type_name("HOST:PORT")
      ->required();
  invite->add_option("--grant", options->grant, "rights: replicate-in,verify,migrate-in (default: all three)")
      ->type_name("LIST");

  CLI::App* join = add_command(
      *peer, context, "join", "Pins the keys of both daemons with a token", "vmferry peer join - --name hostb < token",
      [options, &context] {
        const auto token = read_token(options->token);
        if (!token) return report(context, token.error());
        return call_and_print(context, "peer.join", {{"token", *token}, {"name", options->name}, {"as", options->as}},
                              [](const Json& result) {
                                std::printf("joined peer '%s', which calls us '%s'; rights: %s\n",
                                            cell(result, "name").c_str(), cell(result, "as").c_str(),
                                            cell(result, "grants").c_str());
                              });
      });
  join->add_option("TOKEN", options->token, "what invite printed, or - to read it from standard input")->required();
  join->add_option("--name", options->name, "what we call the inviter")->required();
  join->add_option("--as", options->as, "what the inviter calls us (default: our host name)");

  add_command(*peer, context, "list", "Lists the peers", "vmferry peer list --json", [&context] {
    return call_and_print(context, "peer.list", Json::object(),
                          [](const Json& result) { print_peers(result["peers"]); });
  });

  CLI::App* ping = add_command(
      *peer, context, "ping", "Measures the round trip to a peer", "vmferry peer ping hostb", [options, &context] {
        return call_and_print(context, "peer.ping", {{"name", options->name}}, [&](const Json& result) {
          std::printf("%s answers in %s ms\n", options->name.c_str(), cell(result, "rtt_ms").c_str());
        });
      });
  ping->add_option("NAME", options->name, "the peer")->required();

  CLI::App* remove = add_command(
      *peer, context, "remove", "Forgets a peer and its key", "vmferry peer remove hostb", [options, &context] {
        return call_and_print(context, "peer.remove", {{"name", options->name}},
                              [&](const Json&) { std::printf("peer '%s' removed\n", options->name.c_str()); });
      });
  remove->add_option("NAME", options->name, "the peer")->required();
}

}  // namespace vmferry::cli
