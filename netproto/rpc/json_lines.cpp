// SPDX-License-Identifier: Apache-2.0
#include "netproto/rpc/json_lines.h"

namespace vmferry {

namespace {

// Depth of brackets outside strings. Checked before parsing, so that no parser has to be trusted with deep nesting.
bool nesting_within(std::string_view text, size_t depth_max) {
  size_t depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '[' || c == '{') {
      if (++depth > depth_max) return false;
    }
    if ((c == ']' || c == '}') && depth > 0) --depth;
  }
  return true;
}

}  // namespace

Result<Json> parse_json(std::string_view text, const JsonLimits& limits) {
  if (text.size() > limits.line_size_max) {
    return fail(ErrorKind::LimitExceeded, "JSON of {} bytes is over the limit of {}", text.size(),
                limits.line_size_max);
  }
  if (!nesting_within(text, limits.depth_max)) {
    return fail(ErrorKind::LimitExceeded, "JSON is nested deeper than {} levels", limits.depth_max);
  }
  Json value = Json::parse(text, nullptr, false);
  if (value.is_discarded()) return fail(ErrorKind::Corrupt, "not valid JSON");
  return value;
}

std::string to_json_line(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

Status JsonLineReader::feed(ByteSpan bytes, std::vector<Json>& out) {
  if (failed_) return fail(ErrorKind::Corrupt, "the conversation has ended after an earlier error");
  std::string_view text = as_text(bytes);
  while (!text.empty()) {
    const size_t newline = text.find('\n');
    const std::string_view piece = text.substr(0, newline);
    if (line_.size() + piece.size() > limits_.line_size_max) {
      failed_ = true;
      return fail(ErrorKind::LimitExceeded, "a line is over {} bytes", limits_.line_size_max);
    }
    line_.append(piece);
    if (newline == std::string_view::npos) break;
    text.remove_prefix(newline + 1);
    if (line_.find_first_not_of(" \t\r") != std::string::npos) {
      auto value = parse_json(line_, limits_);
      if (!value) {
        failed_ = true;
        return tl::unexpected(value.error());
      }
      out.push_back(std::move(*value));
    }
    line_.clear();
  }
  return {};
}

}  // namespace vmferry
