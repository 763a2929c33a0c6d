// SPDX-License-Identifier: Apache-2.0
//
// A small durable payload that is replaced as a whole: either the old or the new one is there after a crash.
//
// Flow: ownership, staging headers, the superblock of the tracking metadata. Two slots are written in turn, so a torn
// write destroys only the slot that was about to be replaced. Layout: docs/on-disk.md section 1.
// Threads: the device's home executor. Callbacks come from the device's completions, never inline.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>

#include "blockdev/block_device.h"
#include "engine/base/bytes.h"

namespace vmferry {

// Where a record lives and what may be in it.
struct DurableRecordPlace {
  uint64_t offset = 0;        // bytes on the device, a multiple of 512
  uint32_t slot_size = 4096;  // bytes of each of the two slots, a multiple of 512; payload_size_max() fit into it
  uint32_t kind = 0;          // four characters that name the kind of record; another kind is Corrupt
  uint16_t version = 1;       // of the payload; a record with a higher one is refused with Mismatch
};

// "OWNR" -> 0x524e574f: the characters in file order.
constexpr uint32_t record_kind(const char (&text)[5]) {
  return static_cast<uint32_t>(static_cast<uint8_t>(text[0])) |
         static_cast<uint32_t>(static_cast<uint8_t>(text[1])) << 8 |
         static_cast<uint32_t>(static_cast<uint8_t>(text[2])) << 16 |
         static_cast<uint32_t>(static_cast<uint8_t>(text[3])) << 24;
}

class DurableRecord {
 public:
  using LoadDone = std::function<void(Result<std::optional<Bytes>>)>;
  using SaveDone = std::function<void(Status)>;

  // The device must outlive the record and every callback. Nothing is read or written before load().
  DurableRecord(BlockDevice& device, DurableRecordPlace place);
  DurableRecord(const DurableRecord&) = delete;
  DurableRecord& operator=(const DurableRecord&) = delete;

  static constexpr uint32_t kHeaderSize = 64;
  static constexpr uint64_t footprint(uint32_t slot_size) { return 2 * static_cast<uint64_t>(slot_size); }
  uint32_t payload_size_max() const { return place_.slot_size - kHeaderSize; }

  // The newest intact payload. nullopt: nothing was ever saved; both slots are all zeroes, or one is and the other was
  // torn by the first save. Corrupt: both slots hold something and neither is intact. Mismatch: an intact slot was
  // written by a newer format. Io: not readable. Exactly once before the first save(); after Corrupt the owner may
  // still save() a fresh payload, after Mismatch or Io every save() fails with the same error. What is returned is
  // durable, also when the daemon before died while it saved it; so is all else on the device.
  void load(LoadDone done);

  // Makes `payload` durable; saves complete in order. Several may be queued, each is written. Destroying the record
  // while saves are under way is allowed when the callbacks no longer matter; the device completes them by itself.
  void save(Bytes payload, SaveDone done);

 private:
  struct Save {
    Bytes image;
    SaveDone done;
  };
  struct Loaded;
  void refuse_load(Loaded& loaded, std::string_view what, Errno error);
  void finish_load(Loaded& loaded);
  void write_next();

  BlockDevice& device_;
  const DurableRecordPlace place_;
  uint64_t sequence_ = 0;   // of the newest intact slot
  uint32_t slot_next_ = 0;  // slot to be overwritten by the next save
  bool loaded_ = false;
  std::optional<Error> refusal_;  // every save fails with this
  std::deque<Save> saves_;        // front is being written
  std::shared_ptr<int> anchor_ = std::make_shared<int>(0);
};

}  // namespace vmferry
