// SPDX-License-Identifier: Apache-2.0
//
// What a guest may find in each sector of its disk: the oracle for "no acknowledged write is lost" (I1, I3).
//
// A sector holds a version number. Of each sector the model keeps the last version known to be durable and every
// version written since. While the host lives, only the last acknowledged one may be read; after a power cut any of
// the kept ones, and what is found then becomes the truth.
// Threads: the world's.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "engine/base/assert.h"
#include "engine/base/bytes.h"

namespace vmferry::sim {

class DiskModel {
 public:
  static constexpr size_t kSector = 512;
  static constexpr uint64_t kNotAcknowledged = ~uint64_t{0};
  static constexpr uint64_t kRepeated = 7;  // versions 1 to this are also what equal blocks are written with

  explicit DiskModel(uint64_t size) : sectors_(size / kSector) {}

  uint64_t sector_count() const { return sectors_.size(); }

  static void fill(uint64_t version, uint8_t* out) {
    if (version == 0) {
      std::memset(out, 0, kSector);
      return;
    }
    for (size_t i = 0; i < kSector / 8; ++i) {
      const uint64_t word = i < 8 || i + 1 == kSector / 8 ? version * 0x9e3779b97f4a7c15U + i : version;
      std::memcpy(out + 8 * i, &word, 8);
    }
  }
  // Whether the bytes are exactly those of `version`.
  static bool holds(const uint8_t* bytes, uint64_t version) {
    uint8_t expected[kSector];
    fill(version, expected);
    return std::memcmp(bytes, expected, kSector) == 0;
  }

  uint64_t next_version() { return ++version_; }
  // Versions of a truth that was given up stay in copies until they are overwritten: none may be used again.
  void skip_versions_of(const DiskModel& other) { version_ = std::max(version_, other.version_); }

  void write_submitted(uint64_t first, const std::vector<uint64_t>& versions) {
    for (size_t i = 0; i < versions.size(); ++i) {
      sectors_[first + i].history.push_back({versions[i], kNotAcknowledged});
      dirty_.insert(first + i);
    }
  }
  void write_acknowledged(uint64_t first, const std::vector<uint64_t>& versions) {
    ++sequence_;
    for (size_t i = 0; i < versions.size(); ++i) {
      Sector& sector = sectors_[first + i];
      sector.acknowledged = versions[i];
      sector.uncertain = false;
      for (Entry& entry : sector.history) {
        if (entry.version == versions[i] && entry.sequence == kNotAcknowledged) entry.sequence = sequence_;
      }
    }
  }
  // Refused without having been carried out.
  void write_refused(uint64_t first, const std::vector<uint64_t>& versions) {
    for (size_t i = 0; i < versions.size(); ++i) {
      std::erase_if(sectors_[first + i].history, [&](const Entry& entry) {
        return entry.version == versions[i] && entry.sequence == kNotAcknowledged;
      });
    }
  }
  uint64_t flush_submitted() const { return sequence_; }
  void flush_acknowledged(uint64_t sequence) {
    for (auto at = dirty_.begin(); at != dirty_.end();) {
      Sector& sector = sectors_[*at];
      if (sector.uncertain) {  // nobody knows which version it was that became durable
        ++at;
        continue;
      }
      size_t covered = 0;
      for (size_t i = 0; i < sector.history.size(); ++i) {
        if (sector.history[i].sequence <= sequence) covered = i + 1;
      }
      if (covered > 0) {
        sector.durable = sector.history[covered - 1].version;
        sector.history.erase(sector.history.begin(), sector.history.begin() + static_cast<std::ptrdiff_t>(covered));
      }
      at = sector.history.empty() ? dirty_.erase(at) : std::next(at);
    }
  }
  // The last epoch of a handover is durable at the new owner: everything acknowledged is.
  void handed_over() {
    for (const uint64_t index : dirty_) {
      Sector& sector = sectors_[index];
      if (sector.uncertain) continue;
      sector.durable = sector.acknowledged;
      std::erase_if(sector.history, [](const Entry& entry) { return entry.sequence != kNotAcknowledged; });
    }
    std::erase_if(dirty_, [this](uint64_t index) { return sectors_[index].history.empty(); });
  }
  // The host that held the disk lost power.
  void power_lost() {
    for (const uint64_t index : dirty_) sectors_[index].uncertain = true;
  }

  // What the disk holds is the truth from here on: the owner of a copy that was promoted without its source's word
  // starts from there. Returns what is wrong with it, or "".
  std::string adopt(const Bytes& content) {
    for (size_t i = 0; i < sectors_.size(); ++i) {
      const uint8_t* bytes = content.data() + i * kSector;
      uint64_t version = 0;
      std::memcpy(&version, bytes + 8 * 8, 8);
      if (version > std::max(version_, kRepeated) || !holds(bytes, version))
        return fmt::format("sector {} holds what was never written", i);
      sectors_[i] = {.durable = version, .acknowledged = version, .uncertain = false, .history = {}};
    }
    dirty_.clear();
    return "";
  }

  // Checks what was read; "" when it is allowed. What is found in an uncertain sector is the truth from here on, when
  // `settle` says that nothing is in flight to it.
  std::string check(uint64_t first, const uint8_t* data, size_t count, bool settle) {
    for (size_t i = 0; i < count; ++i) {
      Sector& sector = sectors_[first + i];
      const uint8_t* bytes = data + i * kSector;
      if (!sector.uncertain && pending(sector) == 0) {
        if (!holds(bytes, sector.acknowledged)) {
          return fmt::format("sector {} should hold version {}, {}", first + i, sector.acknowledged,
                             describe(bytes, sector));
        }
        continue;
      }
      std::optional<uint64_t> found;
      if (holds(bytes, sector.durable)) found = sector.durable;
      if (holds(bytes, sector.acknowledged)) found = sector.acknowledged;
      for (const Entry& entry : sector.history) {
        if (!found && holds(bytes, entry.version)) found = entry.version;
      }
      if (!found) {
        return fmt::format(
            "sector {} holds none of the versions that may have survived (durable {}, acknowledged {}), {}", first + i,
            sector.durable, sector.acknowledged, describe(bytes, sector));
      }
      if (settle) settle_on(first + i, *found);
    }
    return "";
  }

 private:
  struct Entry {
    uint64_t version;
    uint64_t sequence;  // of the acknowledgement
  };
  struct Sector {
    uint64_t durable = 0;
    uint64_t acknowledged = 0;
    bool uncertain = false;
    std::vector<Entry> history;
  };
  // Without a power cut only the page cache is known: what was acknowledged since the last flush and overwritten by
  // `found` may still be what a later power cut brings back.
  void settle_on(uint64_t index, uint64_t found) {
    Sector& sector = sectors_[index];
    std::vector<Entry> history;
    if (!sector.uncertain) {
      history = std::move(sector.history);
      std::erase_if(history,
                    [&](const Entry& entry) { return entry.sequence == kNotAcknowledged || entry.version == found; });
      history.push_back({found, sequence_});
    }
    sector = {.durable = sector.uncertain ? found : sector.durable,
              .acknowledged = found,
              .uncertain = false,
              .history = std::move(history)};
    if (sector.history.empty()) dirty_.erase(index);
  }
  static size_t pending(const Sector& sector) {
    size_t count = 0;
    for (const Entry& entry : sector.history) count += entry.sequence == kNotAcknowledged ? 1U : 0U;
    return count;
  }
  std::string describe(const uint8_t* bytes, const Sector& sector) const {
    for (uint64_t version = 0; version <= std::max(version_, kRepeated); ++version) {
      if (holds(bytes, version)) return fmt::format("holds version {} (durable is {})", version, sector.durable);
    }
    return "holds what was never written";
  }

  std::vector<Sector> sectors_;
  std::set<uint64_t> dirty_;  // sectors with a history
  uint64_t version_ = 0;
  uint64_t sequence_ = 0;
};

}  // namespace vmferry::sim
