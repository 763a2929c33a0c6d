// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/verify/ack_log.h"

#include <istream>
#include <sstream>

namespace vmferry::guest {

namespace {

constexpr std::uint64_t kSlotCountMax = 1ULL << 28;  // 1 TiB of records: bounds the verifier's memory
constexpr std::uint64_t kSeqMax = 1ULL << 32;

class Reader {
 public:
  explicit Reader(AckLog& log) : log_(log) {}

  bool line(const std::string& text) {
    std::istringstream in(text);
    std::string kind;
    std::uint64_t source = 0;
    if (!(in >> kind)) return false;
    if (std::string_view("0123456789").find(kind.front()) != std::string_view::npos && !(in >> source >> kind)) {
      return false;
    }
    if (kind.size() != 1) return false;
    switch (kind.front()) {
      case 'S':
        return start(in);
      case 'X':
        return extent(in);
      case 'A':
      case 'W':
        return range(in, kind == "A", source);
      case 'E':
        log_.errors.push_back(text);
        return true;
      case 'M':
        return memory(in);
      case 'D':
        return stopped(in);
      case 'R':
      case 'Q':
        return true;
      default:
        return false;
    }
  }

 private:
  bool start(std::istream& in) {
    unsigned disk = 0;
    Run run;
    SlotPattern& pattern = run.pattern;
    in >> disk >> run.id >> pattern.slot_count >> run.offset >> pattern.hot_slot_count >> pattern.random_percent >>
        pattern.hot_percent >> run.fsync_every >> pattern.seed;
    if (!in || pattern.slot_count == 0 || pattern.slot_count > kSlotCountMax) return false;
    log_.runs[disk].push_back(run);
    return true;
  }

  Run* current(std::istream& in) {
    unsigned disk = 0;
    in >> disk;
    const auto found = in ? log_.runs.find(disk) : log_.runs.end();
    return found == log_.runs.end() ? nullptr : &found->second.back();
  }

  bool extent(std::istream& in) {
    Run* run = current(in);
    Extent extent;
    in >> extent.logical >> extent.physical >> extent.length;
    if (run == nullptr || !in) return false;
    run->extents.push_back(extent);
    return true;
  }

  bool range(std::istream& in, bool durable, std::uint64_t source) {
    Run* run = current(in);
    std::uint64_t first = 0;
    std::uint64_t count = 0;
    in >> first >> count;
    if (run == nullptr || !in || first > kSeqMax || count > kSeqMax) return false;
    (durable ? run->durable : run->written).push_back({.first = first, .end = first + count, .source = source});
    return true;
  }

  bool stopped(std::istream& in) {
    Run* run = current(in);
    return run != nullptr && (in >> run->stopped_at) && run->stopped_at <= kSeqMax;
  }

  bool memory(std::istream& in) {
    std::uint64_t touched = 0;
    std::uint64_t pages = 0;
    std::uint64_t bad = 0;
    if (!(in >> touched >> pages >> bad)) return false;
    log_.memory_pages_bad = std::max(log_.memory_pages_bad, bad);
    return true;
  }

  AckLog& log_;
};

}  // namespace

bool read_ack_log(std::istream& in, AckLog& log, std::string& error) {
  Reader reader(log);
  std::string text;
  for (std::uint64_t number = 1; std::getline(in, text); ++number) {
    if (in.eof()) break;
    if (!reader.line(text)) {
      error = "line " + std::to_string(number) + " is no line of a guest's log: " + text.substr(0, 100);
      return false;
    }
  }
  return true;
}

}  // namespace vmferry::guest
