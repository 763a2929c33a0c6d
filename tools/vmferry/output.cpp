// SPDX-License-Identifier: Apache-2.0
#include "tools/vmferry/output.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "engine/base/text.h"

namespace vmferry::cli {

void print_table(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const std::string& name : header) widths.push_back(name.size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  const auto print = [&](const std::vector<std::string>& row) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += i + 1 < row.size() ? fmt::format("{:<{}}  ", row[i], widths[i]) : row[i];
    }
    std::puts(line.c_str());
  };
  print(header);
  for (const auto& row : rows) print(row);
}

void print_json(const Json& value) {
  std::fputs(to_json_line(value).c_str(), stdout);
}

void ProgressLine::show(const std::string& text) {
  if (silent_ || text == last_) return;
  const long now = static_cast<long>(
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
  if (isatty(STDERR_FILENO) != 0) {
    std::fprintf(stderr, "\r\033[K%s", text.c_str());
    open_ = true;
  } else {
    if (last_ms_ != 0 && now - last_ms_ < 2000) return;
    std::fprintf(stderr, "%s\n", text.c_str());
  }
  last_ms_ = now;
  last_ = text;
  std::fflush(stderr);
}

void ProgressLine::finish() {
  if (open_) std::fputc('\n', stderr);
  open_ = false;
}

std::string cell(const Json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return "-";
  if (it->is_string()) return it->get<std::string>().empty() ? "-" : it->get<std::string>();
  if (it->is_boolean()) return it->get<bool>() ? "yes" : "no";
  if (it->is_array()) {
    std::string text;
    for (const Json& item : *it) {
      text += (text.empty() ? "" : ",") + (item.is_string() ? item.get<std::string>() : item.dump());
    }
    return text.empty() ? "-" : text;
  }
  return it->dump();
}

uint64_t number(const Json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number()) return 0;
  const double value = it->get<double>();
  return value < 0 ? 0 : static_cast<uint64_t>(value);
}

void print_volumes(const Json& volumes) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& volume : volumes) {
    const bool sized = volume.contains("size") && volume["size"].is_number();
    rows.push_back({cell(volume, "name"), cell(volume, "state"), sized ? format_size(number(volume, "size")) : "-",
                    cell(volume, "role"), cell(volume, "term"), cell(volume, "path"), cell(volume, "exports")});
  }
  print_table({"NAME", "STATE", "SIZE", "ROLE", "TERM", "PATH", "EXPORTS"}, rows);
  for (const Json& volume : volumes) {
    if (volume.contains("attachment") && volume["attachment"].is_object()) {
      const Json& attachment = volume["attachment"];
      const std::string error = attachment["error"].is_string() ? ": " + cell(attachment, "error") : "";
      std::printf("volume '%s' is attached as %s, %s%s\n", cell(volume, "name").c_str(),
                  cell(attachment, "device").c_str(), cell(attachment, "state").c_str(), error.c_str());
    }
    if (volume.contains("error")) {
      std::printf("volume '%s' has failed: %s\n", cell(volume, "name").c_str(), cell(volume, "error").c_str());
    }
  }
}

void print_peers(const Json& peers) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& peer : peers) {
    rows.push_back({cell(peer, "name"), cell(peer, "connected"), cell(peer, "address"), cell(peer, "grants"),
                    cell(peer, "last_error")});
  }
  print_table({"NAME", "CONNECTED", "ADDRESS", "GRANTS", "LAST ERROR"}, rows);
}

void print_replication(const Json& status) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& volume : status.value("volumes", Json::array())) {
    rows.push_back({cell(volume, "name"), cell(volume, "peer"), cell(volume, "mode"), cell(volume, "state"),
                    cell(volume, "epoch"), cell(volume, "rpo_s"), format_size(number(volume, "remaining_bytes")),
                    format_size(number(volume, "wire_bytes")), format_size(number(volume, "raw_bytes")),
                    cell(volume, "reason")});
  }
  print_table({"VOLUME", "PEER", "MODE", "STATE", "EPOCH", "RPO S", "REMAINING", "WIRE", "RAW", "REASON"}, rows);
}

void print_status(const Json& status) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& volume : status.value("volumes", Json::array())) {
    rows.push_back({cell(volume, "name"), cell(volume, "state"), cell(volume, "role"), cell(volume, "owner"),
                    cell(volume, "term"), cell(volume, "handover_state"), cell(volume, "phase"),
                    cell(volume, "may_run"), cell(volume, "reason")});
  }
  print_table({"VOLUME", "STATE", "ROLE", "OWNER", "TERM", "HANDOVER", "PHASE", "MAY RUN", "REASON"}, rows);
}

void print_event(const Json& event) {
  std::string line = cell(event, "time") + " " + cell(event, "event");
  for (const auto& [key, value] : event.items()) {
    if (key == "time" || key == "event" || key == "seq") continue;
    line += fmt::format(" {}={}", key, value.is_string() ? value.get<std::string>() : value.dump());
  }
  std::puts(line.c_str());
  std::fflush(stdout);
}

std::string migration_line(const Json& progress) {
  std::string line = cell(progress, "phase");
  if (const uint64_t remaining = number(progress, "remaining_bytes"); remaining > 0) {
    line += fmt::format(", {} of disk to send", format_size(remaining));
  }
  if (const uint64_t remaining = number(progress, "memory_remaining_bytes"); remaining > 0) {
    line += fmt::format(", {} of memory to send", format_size(remaining));
  }
  if (const uint64_t rate = number(progress, "send_rate"); rate > 0) line += ", " + format_rate(rate);
  if (const uint64_t eta = number(progress, "eta_s"); eta > 0) line += fmt::format(", about {} s left", eta);
  return line;
}

void print_migration_result(const Json& result) {
  std::printf("%s: the guest is %s, the owner is %s\n", cell(result, "result").c_str(), cell(result, "guest").c_str(),
              cell(result, "owner").c_str());
  const Json wire = result.value("wire_bytes", Json::object());
  const Json raw = result.value("raw_bytes", Json::object());
  std::printf("total %.1f s, downtime %llu ms, %llu rounds\n", result.value("total_s", 0.0),
              static_cast<unsigned long long>(number(result, "downtime_ms")),
              static_cast<unsigned long long>(number(result, "rounds")));
  std::printf("on the wire: disk %s of %s, memory %s of %s\n", format_size(number(wire, "disk")).c_str(),
              format_size(number(raw, "disk")).c_str(), format_size(number(wire, "memory")).c_str(),
              format_size(number(raw, "memory")).c_str());
  if (result.contains("error") && result["error"].is_string()) {
    std::printf("error: %s\n", result["error"].get<std::string>().c_str());
  }
}

}  // namespace vmferry::cli
