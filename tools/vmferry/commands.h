// SPDX-License-Identifier: Apache-2.0
//
// The commands, by subject. Each adds its CLI11 subcommands; the one that was given leaves its work in Context::run.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "tools/vmferry/client.h"

namespace vmferry::cli {

struct Context {
  std::string control;
  bool json = false;
  std::function<int()> run;
};

void add_volume_commands(CLI::App& app, Context& context);
void add_peer_commands(CLI::App& app, Context& context);
void add_replicate_commands(CLI::App& app, Context& context);
void add_migrate_commands(CLI::App& app, Context& context);  // migrate, estimate
void add_attach_commands(CLI::App& app, Context& context);   // attach, detach
void add_role_commands(CLI::App& app, Context& context);     // promote, demote, resolve, status, events

// Prints the error (as JSON with --json) and returns the exit status that it means.
int report(const Context& context, const Error& error);

// Calls and prints: `show` for people, JSON otherwise.
int call_and_print(const Context& context, const std::string& method, const Json& params,
                   const std::function<void(const Json&)>& show);

// A subcommand whose work is `run`, with an example under its help.
CLI::App* add_command(CLI::App& parent, Context& context, const std::string& name, const std::string& text,
                      const std::string& example, std::function<int()> run);

// Values of the options of one command; lives as long as its closure.
template <typename T>
std::shared_ptr<T> make_options() {
  return std::make_shared<T>();
}

}  // namespace vmferry::cli
