// SPDX-License-Identifier: Apache-2.0
//
// Golden files of the replication protocol's messages: tests/golden/repl. They are also the fuzzers' first corpus.
// With VMFERRY_WRITE_GOLDEN set in the environment a missing file is written; an existing one never is.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "engine/base/bytes.h"

namespace vmferry {

inline Bytes golden_repl(const std::string& name, ByteSpan made) {
  const auto path = std::filesystem::path(__FILE__).parent_path() / "../../golden/repl" / name;
  if (!std::filesystem::exists(path) && std::getenv("VMFERRY_WRITE_GOLDEN") != nullptr) {
    std::ofstream(path, std::ios::binary) << as_text(made);
  }
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

}  // namespace vmferry
