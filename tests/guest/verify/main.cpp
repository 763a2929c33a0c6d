// SPDX-License-Identifier: Apache-2.0
//
// guest-verify IMAGE --acks FILE [--disk N] [--include-written]
//
// Prints one JSON object; exit status 0: every acknowledged record is in the raw image and nothing is corrupt,
// 1: something is wrong, 2: could not be checked (usage, log or image unreadable, nothing acknowledged).

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "tests/guest/verify/checker.h"

namespace {

int fail(const std::string& text) {
  std::fprintf(stderr, "guest-verify: %s\n", text.c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  std::string image;
  std::string acks;
  unsigned disk = 0;
  bool include_written = false;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--include-written") {
      include_written = true;
    } else if (argument == "--acks" && i + 1 < argc) {
      acks = argv[++i];
    } else if (argument == "--disk" && i + 1 < argc) {
      disk = static_cast<unsigned>(std::strtoul(argv[++i], nullptr, 10));
    } else if (image.empty() && !argument.starts_with("-")) {
      image = argument;
    } else {
      return fail("unexpected '" + std::string(argument) + "'");
    }
  }
  if (image.empty() || acks.empty())
    return fail("usage: guest-verify IMAGE --acks FILE [--disk N] [--include-written]");

  std::ifstream file(acks);
  if (!file) return fail("cannot read " + acks);
  vmferry::guest::AckLog log;
  std::string error;
  if (!read_ack_log(file, log, error)) return fail(acks + ": " + error);
  const auto runs = log.runs.find(disk);
  if (runs == log.runs.end()) return fail(acks + ": no writer has started on disk " + std::to_string(disk));
  vmferry::guest::CheckResult result;
  if (!check_image(image, runs->second, include_written, result, error)) return fail(error);

  const nlohmann::ordered_json json = {
      {"acknowledged", result.acknowledged}, {"found", result.found},      {"lost", result.lost},
      {"corrupt", result.corrupt},           {"torn", result.torn},        {"misplaced", result.misplaced},
      {"reordered", result.reordered},       {"forked", result.forked},    {"last_seq", result.last_seq},
      {"runs", runs->second.size()},         {"guest_errors", log.errors}, {"memory_pages_bad", log.memory_pages_bad},
      {"examples", result.examples},
  };
  std::printf("%s\n", json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  if (result.acknowledged == 0) return fail("nothing was acknowledged: nothing is proved");
  return result.clean() && log.errors.empty() && log.memory_pages_bad == 0 ? 0 : 1;
}
