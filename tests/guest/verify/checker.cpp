// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/verify/checker.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

namespace vmferry::guest {

namespace {

constexpr std::size_t kExamplesMax = 10;
// How far beyond the last acknowledged number a record may be: a writer without fsync logs each 64th, one that waits
// for fsync writes at most its batch; the rest is for log lines that died with the guest.
constexpr std::uint64_t kUnreportedMax = 1'000'000;

enum class SlotState : std::uint8_t { Empty, Record, Corrupt };

struct Slot {
  SlotState state = SlotState::Empty;
  std::uint32_t run = 0;  // index
  std::uint64_t seq = 0;
};

class Checker {
 public:
  Checker(int fd, const std::vector<Run>& runs, bool include_written, CheckResult& result)
      : fd_(fd), runs_(runs), include_written_(include_written), result_(result) {}

  bool read_slots(std::string& error);
  void check_runs();

 private:
  std::optional<std::uint64_t> physical(std::uint64_t slot) const;
  Slot judge(RecordView record, std::uint64_t slot);
  void check_run(std::uint32_t index);
  // Records that the writer never put where they are count as corrupt. Returns one past the newest number.
  std::uint64_t demote_strangers(std::uint32_t index, std::uint64_t reported_end);
  void count_forked(const Run& run);
  std::vector<SeqRange> acknowledged(const Run& run) const;
  void example(const std::string& text) {
    if (result_.examples.size() < kExamplesMax) result_.examples.push_back(text);
  }
  bool holds(std::uint64_t slot, std::uint32_t run, std::uint64_t seq) const {
    const Slot& there = slots_[slot];
    return there.state == SlotState::Record && std::pair(there.run, there.seq) >= std::pair(run, seq);
  }

  int fd_;
  const std::vector<Run>& runs_;
  bool include_written_;
  CheckResult& result_;
  std::vector<Slot> slots_;
};

std::optional<std::uint64_t> Checker::physical(std::uint64_t slot) const {
  const Run& run = runs_.back();
  const std::uint64_t position = slot * kRecordSize;
  if (run.extents.empty()) return run.offset + position;
  const auto extent = std::ranges::find_if(run.extents, [&](const Extent& e) {
    return position >= e.logical && position + kRecordSize <= e.logical + e.length;
  });
  if (extent == run.extents.end()) return std::nullopt;
  return extent->physical + (position - extent->logical);
}

Slot Checker::judge(RecordView record, std::uint64_t slot) {
  RecordHeader header{};
  const RecordState state = check_record(record, header);
  if (state == RecordState::Zero) return {};
  const auto run = std::ranges::find(runs_, header.run, &Run::id);
  if (state == RecordState::Valid && run != runs_.end() && header.slot == slot) {
    return {.state = SlotState::Record, .run = static_cast<std::uint32_t>(run - runs_.begin()), .seq = header.seq};
  }
  ++result_.corrupt;
  result_.torn += state == RecordState::Torn ? 1 : 0;
  result_.misplaced += state == RecordState::Valid ? 1 : 0;
  example("slot " + std::to_string(slot) +
          (state == RecordState::Torn ? ": checksum wrong, header says record " + std::to_string(header.seq)
           : state == RecordState::Foreign
               ? std::string(": neither a record nor zero")
               : ": record " + std::to_string(header.seq) + " of slot " + std::to_string(header.slot)));
  return {.state = SlotState::Corrupt};
}

bool Checker::read_slots(std::string& error) {
  alignas(kRecordSize) std::array<std::byte, kRecordSize> record{};
  slots_.resize(runs_.back().pattern.slot_count);
  for (std::uint64_t slot = 0; slot < slots_.size(); ++slot) {
    const auto position = physical(slot);
    if (!position) {
      error = "slot " + std::to_string(slot) + " is in none of the logged extents";
      return false;
    }
    const ssize_t size = ::pread(fd_, record.data(), record.size(), static_cast<off_t>(*position));
    if (size != static_cast<ssize_t>(record.size())) {
      error = "read at " + std::to_string(*position) + ": " + (size < 0 ? std::strerror(errno) : "end of image");
      return false;
    }
    slots_[slot] = judge(record, slot);
  }
  return true;
}

std::vector<SeqRange> Checker::acknowledged(const Run& run) const {
  std::vector<SeqRange> ranges = run.durable;
  if (include_written_) ranges.insert(ranges.end(), run.written.begin(), run.written.end());
  if (run.stopped_at != 0) ranges.push_back({.first = 0, .end = run.stopped_at, .source = 0});
  std::ranges::sort(ranges, {}, &SeqRange::first);
  return ranges;
}

void Checker::count_forked(const Run& run) {
  std::vector<SeqRange> all = run.durable;
  all.insert(all.end(), run.written.begin(), run.written.end());
  std::ranges::sort(all, {}, &SeqRange::first);
  for (std::size_t i = 1; i < all.size(); ++i) {
    if (all[i].first >= all[i - 1].end) continue;
    result_.forked += std::min(all[i].end, all[i - 1].end) - all[i].first;
    example("record " + std::to_string(all[i].first) + " reported by QEMU " + std::to_string(all[i - 1].source) +
            " and by " + std::to_string(all[i].source));
  }
}

std::uint64_t Checker::demote_strangers(std::uint32_t index, std::uint64_t reported_end) {
  std::uint64_t end = reported_end;
  for (const Slot& slot : slots_) {
    const bool ours = slot.state == SlotState::Record && slot.run == index;
    if (ours && slot.seq < reported_end + kUnreportedMax) end = std::max(end, slot.seq + 1);
  }
  std::vector<bool> proved(slots_.size());
  SlotSequence sequence(runs_[index].pattern);
  for (std::uint64_t seq = 0; seq < end; ++seq) {
    const std::uint64_t slot = sequence.next() % slots_.size();
    if (slots_[slot].run == index && slots_[slot].seq == seq) proved[slot] = true;
  }
  for (std::uint64_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (slot.state != SlotState::Record || slot.run != index || proved[i]) continue;
    slot.state = SlotState::Corrupt;
    ++result_.corrupt;
    ++result_.misplaced;
    example("slot " + std::to_string(i) + ": record " + std::to_string(slot.seq) + " was never written there");
  }
  return end;
}

void Checker::check_run(std::uint32_t index) {
  const Run& run = runs_[index];
  count_forked(run);
  const std::vector<SeqRange> ranges = acknowledged(run);
  std::uint64_t end = 0;
  for (const SeqRange& range : ranges) end = std::max(end, range.end);
  end = demote_strangers(index, end);
  result_.last_seq = end == 0 ? 0 : end - 1;
  // Whatever is older than the batch of the newest record was made durable before that record was written.
  const std::uint64_t barrier = run.fsync_every == 0 ? 0 : result_.last_seq / run.fsync_every * run.fsync_every;
  SlotSequence sequence(run.pattern);
  auto range = ranges.begin();
  for (std::uint64_t seq = 0; seq < end; ++seq) {
    const std::uint64_t slot = sequence.next() % slots_.size();
    while (range != ranges.end() && range->end <= seq) ++range;
    const bool was_acknowledged = range != ranges.end() && range->first <= seq;
    const bool there = holds(slot, index, seq);
    if (was_acknowledged) {
      ++result_.acknowledged;
      if (there) {
        ++result_.found;
      } else if (slots_[slot].state != SlotState::Corrupt) {
        ++result_.lost;
        example("record " + std::to_string(seq) + " of slot " + std::to_string(slot) + " was acknowledged and is lost");
      }
    } else if (!there && seq < barrier && slots_[slot].state != SlotState::Corrupt) {
      ++result_.reordered;
      example("record " + std::to_string(seq) + " is missing although record " + std::to_string(result_.last_seq) +
              " was written after its fsync");
    }
  }
}

void Checker::check_runs() {
  for (std::uint32_t index = 0; index < runs_.size(); ++index) check_run(index);
}

}  // namespace

bool check_image(const std::string& path, const std::vector<Run>& runs, bool include_written, CheckResult& result,
                 std::string& error) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    error = path + ": " + std::strerror(errno);
    return false;
  }
  Checker checker(fd, runs, include_written, result);
  const bool read = checker.read_slots(error);
  ::close(fd);
  if (read) checker.check_runs();
  return read;
}

}  // namespace vmferry::guest
