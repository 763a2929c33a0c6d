// SPDX-License-Identifier: Apache-2.0
//
// The 4 KiB records that the guest writes to its disk, and the order of the slots it writes them to.
//
// Shared by the writer in the guest (workload/disk_writer) and the verifier on the host (verify/): the order is a
// pure function of the parameters in the start line of the log, so the verifier knows which slot each sequence
// number belongs to without being told, and the log needs only ranges of acknowledged numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

namespace vmferry::guest {

inline constexpr std::size_t kRecordSize = 4096;
inline constexpr std::uint64_t kRecordMagic = 0x31434552'79724566;  // "fErry" "REC1"

// At the start of each record, little-endian; the rest is the body.
struct RecordHeader {
  std::uint64_t magic;
  std::uint64_t run;       // random, one per start of the writer: tells records of an earlier boot apart
  std::uint64_t seq;       // counts from 0 within a run
  std::uint64_t slot;      // position in the area, in records
  std::uint64_t time_ns;   // the guest's CLOCK_MONOTONIC when it was made
  std::uint64_t checksum;  // XXH3 of the whole record with this field zero
};
static_assert(sizeof(RecordHeader) == 48);
static_assert(std::has_unique_object_representations_v<RecordHeader>);

using RecordBuffer = std::span<std::byte, kRecordSize>;
using RecordView = std::span<const std::byte, kRecordSize>;

// Fills the whole record: header with checksum, then a body of 60 % text and 40 % noise, which is what files in a
// guest look like to a compressor.
void make_record(RecordBuffer out, std::uint64_t run, std::uint64_t seq, std::uint64_t slot, std::uint64_t time_ns);

enum class RecordState { Zero, Valid, Torn, Foreign };

// Zero: no record was ever here. Valid: checksum holds. Torn: a header of ours over another content.
// Foreign: anything else.
RecordState check_record(RecordView record, RecordHeader& header);

std::uint64_t splitmix64(std::uint64_t value);

// Text-like bytes (words from a short list), deterministic for `seed`.
void fill_text(std::span<std::byte> out, std::uint64_t seed);
void fill_noise(std::span<std::byte> out, std::uint64_t seed);

struct SlotPattern {
  std::uint64_t slot_count = 0;      // area / record size
  std::uint64_t hot_slot_count = 0;  // size of the hot part; it starts at a quarter of the area
  unsigned random_percent = 94;      // the others go one after another through the area
  unsigned hot_percent = 80;         // of the random ones
  std::uint64_t seed = 0;
};

// The slots of sequence numbers 0, 1, 2, ...
class SlotSequence {
 public:
  explicit SlotSequence(const SlotPattern& pattern) : pattern_(pattern) {}
  std::uint64_t next();

 private:
  SlotPattern pattern_;
  std::uint64_t seq_ = 0;
  std::uint64_t cursor_ = 0;  // next slot of the sequential part
};

}  // namespace vmferry::guest
