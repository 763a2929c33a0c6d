// SPDX-License-Identifier: Apache-2.0
#include "blockdev/durable_record.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "engine/base/assert.h"
#include "engine/base/hash.h"

namespace vmferry {

namespace {

// Slot layout, docs/on-disk.md section 1. All integers little-endian.
constexpr uint32_t kMagic = 0x44524d56;  // "VMRD"
constexpr uint16_t kFormat = 1;          // of the slot header
constexpr size_t kCrcAt = 60;            // of bytes [0, 60) and the payload

struct Slot {
  uint16_t format = 0;
  uint32_t kind = 0;
  uint16_t version = 0;
  uint64_t sequence = 0;
  Bytes payload;
};

Bytes encode_slot(const DurableRecordPlace& place, uint64_t sequence, ByteSpan payload) {
  Bytes out;
  out.reserve(place.slot_size);
  ByteWriter writer(out);
  writer.le32(kMagic).le16(kFormat).le16(place.version).le32(place.kind).le32(static_cast<uint32_t>(payload.size()));
  writer.le64(sequence);
  out.resize(kCrcAt);
  const uint32_t crc = crc32c(payload, crc32c(out));
  ByteWriter(out).le32(crc).raw(payload);
  out.resize(place.slot_size);
  return out;
}

// nullopt: not intact. The checksum comes first, so the header of a torn slot is never believed.
std::optional<Slot> decode_slot(ByteSpan raw) {
  ByteReader reader(raw);
  Slot slot;
  const uint32_t magic = reader.le32();
  slot.format = reader.le16();
  slot.version = reader.le16();
  slot.kind = reader.le32();
  const uint32_t size = reader.le32();
  slot.sequence = reader.le64();
  if (!reader.ok() || magic != kMagic || raw.size() < DurableRecord::kHeaderSize ||
      size > raw.size() - DurableRecord::kHeaderSize || slot.sequence == 0) {
    return std::nullopt;
  }
  const ByteSpan payload = raw.subspan(DurableRecord::kHeaderSize, size);
  ByteReader crc(raw.subspan(kCrcAt));
  if (crc.le32() != crc32c(payload, crc32c(raw.first(kCrcAt)))) return std::nullopt;
  slot.payload.assign(payload.begin(), payload.end());
  return slot;
}

bool all_zero(ByteSpan raw) {
  return std::all_of(raw.begin(), raw.end(), [](uint8_t byte) { return byte == 0; });
}

}  // namespace

struct DurableRecord::Loaded {
  Bytes raw;
  LoadDone done;
};

DurableRecord::DurableRecord(BlockDevice& device, DurableRecordPlace place) : device_(device), place_(place) {
  VF_ASSERT(place_.slot_size > kHeaderSize && place_.slot_size % 512 == 0 && place_.offset % 512 == 0);
  VF_ASSERT(fits_in(place_.offset, footprint(place_.slot_size), device_.size()));
}

void DurableRecord::load(LoadDone done) {
  auto loaded = std::make_shared<Loaded>();
  loaded->raw.resize(footprint(place_.slot_size));
  loaded->done = std::move(done);
  read_block(device_, place_.offset, loaded->raw.data(), loaded->raw.size(),
             [this, loaded, alive = std::weak_ptr<int>(anchor_)](Errno error) {
               if (alive.expired()) return;
               if (error != 0) return refuse_load(*loaded, "read record", error);
               // A daemon that died while it saved may have left the record in the host's cache only. Whoever loads it
               // acts on it, so it is made durable first; a power cut would bring back the one before.
               flush_block(device_, [this, loaded, alive](Errno flushed) {
                 if (alive.expired()) return;
                 if (flushed != 0) return refuse_load(*loaded, "flush record", flushed);
                 finish_load(*loaded);
               });
             });
}

void DurableRecord::refuse_load(Loaded& loaded, std::string_view what, Errno error) {
  refusal_ = fail(ErrorKind::Io, "{}: {}", what, errno_text(error)).value();
  loaded.done(tl::unexpected<Error>(*refusal_));
}

void DurableRecord::finish_load(Loaded& loaded) {
  loaded_ = true;
  std::array<std::optional<Slot>, 2> slots;
  std::array<bool, 2> blank{};
  for (size_t i = 0; i < 2; ++i) {
    const ByteSpan raw = ByteSpan(loaded.raw).subspan(i * place_.slot_size, place_.slot_size);
    slots[i] = decode_slot(raw);
    blank[i] = all_zero(raw);
    if (!slots[i]) continue;
    if (slots[i]->kind != place_.kind) {
      slots[i].reset();
    } else if (slots[i]->format > kFormat || slots[i]->version > place_.version) {
      refusal_ = fail(ErrorKind::Mismatch, "record has format {} version {}, this program knows up to {} and {}",
                      slots[i]->format, slots[i]->version, kFormat, place_.version)
                     .value();
      return loaded.done(tl::unexpected<Error>(*refusal_));
    }
  }
  if (!slots[0] && !slots[1]) {
    // The first save of all reports success when both slots are written, so a blank slot beside a torn one means that
    // no save was ever reported.
    if (blank[0] || blank[1]) return loaded.done(std::nullopt);
    return loaded.done(fail(ErrorKind::Corrupt, "neither slot of the record is intact"));
  }
  const size_t newest = !slots[1] || (slots[0] && slots[0]->sequence > slots[1]->sequence) ? 0 : 1;
  sequence_ = slots[newest]->sequence;
  slot_next_ = static_cast<uint32_t>(1 - newest);
  loaded.done(std::optional<Bytes>(std::move(slots[newest]->payload)));
}

void DurableRecord::save(Bytes payload, SaveDone done) {
  VF_ASSERT(loaded_ || refusal_);
  VF_ASSERT(payload.size() <= payload_size_max());
  saves_.push_back({std::move(payload), std::move(done)});
  if (saves_.size() == 1) write_next();
}

void DurableRecord::write_next() {
  // A refused record still answers from a completion, never inline: the read is only there for that.
  auto image = std::make_shared<Bytes>();
  auto finish = [this, image, alive = std::weak_ptr<int>(anchor_)](Errno error) {
    if (alive.expired()) return;
    Save save = std::move(saves_.front());
    Status status;
    if (refusal_) {
      status = tl::unexpected<Error>(*refusal_);
    } else if (error != 0) {
      // The slot may hold anything now. The next save takes the same slot, so the other, older one stays intact.
      status = fail(ErrorKind::Io, "write record: {}", errno_text(error));
    } else {
      slot_next_ = 1 - slot_next_;
      if (sequence_ == 1) {  // the very first: into the other slot as well
        saves_.front() = std::move(save);
        return write_next();
      }
    }
    save.done(std::move(status));
    if (alive.expired()) return;
    saves_.pop_front();
    if (!saves_.empty()) write_next();
  };
  if (refusal_) {
    image->resize(512);
    return read_block(device_, place_.offset, image->data(), image->size(), finish);
  }
  *image = encode_slot(place_, ++sequence_, saves_.front().image);
  const uint64_t at = place_.offset + static_cast<uint64_t>(slot_next_) * place_.slot_size;
  write_block(device_, at, image->data(), image->size(), true, finish);
}

}  // namespace vmferry
