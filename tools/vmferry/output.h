// SPDX-License-Identifier: Apache-2.0
//
// What the commands print: JSON for scripts, tables for people, progress on standard error.
#pragma once

#include <string>
#include <vector>

#include "netproto/rpc/json_lines.h"

namespace vmferry::cli {

// Left-aligned columns, as wide as their widest cell.
void print_table(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows);

void print_json(const Json& value);

// One line that is overwritten on a terminal; at most one line every two seconds elsewhere.
class ProgressLine {
 public:
  explicit ProgressLine(bool silent) : silent_(silent) {}
  ~ProgressLine() { finish(); }
  void show(const std::string& text);
  void finish();

 private:
  bool silent_;
  bool open_ = false;
  long last_ms_ = 0;
  std::string last_;
};

// A member as text for a table: "-" when absent or null.
std::string cell(const Json& object, const char* key);
uint64_t number(const Json& object, const char* key);

void print_volumes(const Json& volumes);
void print_peers(const Json& peers);
void print_replication(const Json& status);
void print_status(const Json& status);
void print_event(const Json& event);
std::string migration_line(const Json& progress);
void print_migration_result(const Json& result);

}  // namespace vmferry::cli
