// SPDX-License-Identifier: Apache-2.0
//
// JSON values one per line, as the control socket carries them: bytes in, parsed values out.
//
// Limits against hostile input: line size and nesting depth. A line over a limit or that is no JSON ends the
// conversation, since the boundary of the next message can no longer be trusted.
// Threads: one owner.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/base/bytes.h"
#include "engine/base/result.h"

namespace vmferry {

using Json = nlohmann::json;

struct JsonLimits {
  size_t line_size_max = 1U << 20;
  size_t depth_max = 32;
};

// Parses one JSON text within the limits. Never throws.
Result<Json> parse_json(std::string_view text, const JsonLimits& limits = {});

// One line of text ending in '\n'. Strings that are not UTF-8 are written with replacement characters.
std::string to_json_line(const Json& value);

class JsonLineReader {
 public:
  explicit JsonLineReader(JsonLimits limits = {}) : limits_(limits) {}

  // Appends the values completed by `bytes` to `out`. After an error every later call fails too.
  Status feed(ByteSpan bytes, std::vector<Json>& out);

 private:
  JsonLimits limits_;
  std::string line_;
  bool failed_ = false;
};

}  // namespace vmferry
