// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/staging.h"

#include <cerrno>
#include <set>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr uint32_t kMagic = 0x54534656;  // "VFST"
constexpr uint16_t kFormat = 1;
constexpr size_t kHeaderSize = 96;
constexpr size_t kChainOffset = kHeaderSize - 12;
constexpr uint64_t kReserveStep = 16U << 20;

enum class RecordType : uint8_t { Begin = 1, Frame = 2, Commit = 3 };
enum RecordFlag : uint8_t { kUnresolved = 1, kFuzzyFrame = 2 };

struct RecordHeader {
  RecordType type = RecordType::Begin;
  uint64_t epoch = 0;
  Id128 session{};
  StagedFrame frame{};
  uint32_t payload_size = 0;
  Hash128 payload_hash{};
  uint64_t previous = 0;  // chain value of the record before; 0 for begin

  uint32_t record_size() const {
    return static_cast<uint32_t>(round_up(kHeaderSize + payload_size, StagingArea::kAlignment));
  }
};

Bytes make_record(RecordHeader header, const std::function<void(Bytes&)>& append_payload, size_t payload_size_hint) {
  Bytes image;
  image.reserve(round_up(kHeaderSize + payload_size_hint, StagingArea::kAlignment));
  image.resize(kHeaderSize);
  append_payload(image);
  const ByteSpan payload = ByteSpan(image).subspan(kHeaderSize);
  header.payload_size = static_cast<uint32_t>(payload.size());
  header.payload_hash = xxh3_128(payload);

  Bytes head;
  const int flags = (header.frame.unresolved ? kUnresolved : 0) | (header.frame.fuzzy ? kFuzzyFrame : 0);
  ByteWriter writer(head);
  writer.le32(kMagic).le16(kFormat).u8(static_cast<uint8_t>(header.type)).u8(static_cast<uint8_t>(flags));
  writer.le64(header.epoch).raw(header.session.bytes).le64(header.frame.frame).le64(header.frame.heals);
  writer.le32(header.payload_size).le32(0).raw(header.payload_hash);
  VF_ASSERT(head.size() <= kChainOffset);
  std::copy(head.begin(), head.end(), image.begin());
  image.resize(header.record_size());
  return image;
}

// Completes the header when the place of the record is known. Without the chain, a record of an earlier attempt at the
// same epoch could follow a newer one after a truncation, and nobody would see that ranges between them are missing.
uint64_t link_record(Bytes& image, uint64_t previous) {
  Bytes tail;
  ByteWriter writer(tail);
  writer.le64(previous);
  std::copy(tail.begin(), tail.end(), image.begin() + kChainOffset);
  tail.clear();
  writer.le32(crc32c(ByteSpan(image).first(kHeaderSize - 4)));
  std::copy(tail.begin(), tail.end(), image.begin() + kHeaderSize - 4);
  return xxh3_64(ByteSpan(image).first(kHeaderSize));
}

// nullopt: no intact header.
std::optional<RecordHeader> parse_header(ByteSpan block) {
  if (block.size() < kHeaderSize) return std::nullopt;
  const ByteSpan head = block.first(kHeaderSize);
  ByteReader reader(head);
  RecordHeader header;
  const uint32_t magic = reader.le32();
  const uint16_t format = reader.le16();
  const uint8_t type = reader.u8();
  const uint8_t flags = reader.u8();
  header.epoch = reader.le64();
  reader.copy_to(header.session.bytes);
  header.frame.frame = reader.le64();
  header.frame.heals = reader.le64();
  header.payload_size = reader.le32();
  const uint32_t zero = reader.le32();
  reader.copy_to(header.payload_hash);
  header.previous = ByteReader(head.subspan(kChainOffset)).le64();
  const uint32_t crc = ByteReader(head.last(4)).le32();
  if (magic != kMagic || format != kFormat || type < 1 || type > 3 || flags > 3 || zero != 0) return std::nullopt;
  if (crc != crc32c(head.first(kHeaderSize - 4)) || header.payload_size > kFrameBodyMax) return std::nullopt;
  header.type = static_cast<RecordType>(type);
  header.frame.unresolved = (flags & kUnresolved) != 0;
  header.frame.fuzzy = (flags & kFuzzyFrame) != 0;
  return header;
}

bool payload_intact(const RecordHeader& header, ByteSpan image) {
  return image.size() >= kHeaderSize + header.payload_size &&
         xxh3_128(image.subspan(kHeaderSize, header.payload_size)) == header.payload_hash;
}

}  // namespace

// State of one scan; shared by its callbacks.
struct StagingArea::Scan {
  std::function<void(Result<std::optional<Found>>)> done;
  uint64_t epoch_applied = 0;
  uint64_t at = 0;
  uint64_t chain = 0;
  bool have_begin = false;
  Found found;
  uint64_t frame_next = 0;
  std::set<uint64_t> unresolved;
  Bytes block;
};

StagingArea::StagingArea(Executor& executor, BlockDevice& device, uint64_t base)
    : executor_(executor), device_(device), base_(base), position_(base), reserved_(base), high_water_(base) {}

void StagingArea::scan(uint64_t epoch_applied, std::function<void(Result<std::optional<Found>>)> done) {
  auto scan = std::make_shared<Scan>();
  scan->done = std::move(done);
  scan->epoch_applied = epoch_applied;
  scan->at = base_;
  records_.clear();
  scan_next(std::move(scan));
}

// Reads the record at scan->at: first its header's block, then the rest. Any doubt ends the walk.
void StagingArea::scan_next(std::shared_ptr<Scan> scan) {
  if (scan->at + kAlignment > device_.size()) return finish_scan(scan);
  scan->block.resize(kAlignment);
  read_block(device_, scan->at, scan->block.data(), kAlignment, [this, alive = alive_.token(), scan](Errno error) {
    if (!alive()) return;
    if (error != 0) {
      return scan->done(fail(ErrorKind::Io, "read staging at {}: {}", scan->at, errno_text(error)));
    }
    const auto header = parse_header(scan->block);
    if (!header || scan->at + header->record_size() > device_.size()) return finish_scan(scan);
    const uint32_t size = header->record_size();
    auto examine = [this, scan, header = *header, size] {
      if (header.previous != scan->chain || !payload_intact(header, scan->block)) return finish_scan(scan);
      scan->chain = xxh3_64(ByteSpan(scan->block).first(kHeaderSize));
      const ByteSpan payload = ByteSpan(scan->block).subspan(kHeaderSize, header.payload_size);
      if (header.type == RecordType::Begin) {
        const auto begin = decode_epoch_begin(payload);
        if (scan->have_begin || !begin || begin->epoch <= scan->epoch_applied) return finish_scan(scan);
        scan->have_begin = true;
        begin_chain_ = scan->chain;
        scan->found.begin = *begin;
        scan->frame_next = begin->first_frame;
        scan->at += size;
        return scan_next(scan);
      }
      if (!scan->have_begin || header.epoch != scan->found.begin.epoch || header.session != scan->found.begin.session) {
        return finish_scan(scan);
      }
      if (header.type == RecordType::Commit) {
        ByteReader reader(payload);
        const uint64_t record_count = reader.le64();
        const uint8_t consistent = reader.u8();
        scan->found.committed = reader.done() && record_count == records_.size() && scan->unresolved.empty();
        scan->found.consistent = consistent == 1;
        return finish_scan(scan);
      }
      if (header.frame.frame != scan->frame_next || !decode_frame_body(payload)) return finish_scan(scan);
      ++scan->frame_next;
      if (header.frame.unresolved) scan->unresolved.insert(header.frame.frame);
      if (header.frame.heals != 0) scan->unresolved.erase(header.frame.heals);
      scan->found.fuzzy = scan->found.fuzzy || header.frame.fuzzy;
      records_.push_back({header.frame, scan->at, size, scan->chain});
      scan->at += size;
      scan_next(scan);
    };
    if (size == kAlignment) return examine();
    scan->block.resize(size);
    read_block(device_, scan->at + kAlignment, scan->block.data() + kAlignment, size - kAlignment,
               [alive, scan, examine = std::move(examine)](Errno rest_error) {
                 if (!alive()) return;
                 if (rest_error != 0) {
                   return scan->done(fail(ErrorKind::Io, "read staging at {}: {}", scan->at, errno_text(rest_error)));
                 }
                 examine();
               });
  });
}

void StagingArea::finish_scan(const std::shared_ptr<Scan>& scan) {
  if (!scan->have_begin) {
    records_.clear();
    return scan->done(std::optional<Found>{});
  }
  begin_ = scan->found.begin;
  position_ = records_.empty() ? base_ + kAlignment : records_.back().offset + records_.back().size;
  high_water_ = reserved_ = position_;
  // A frame whose references were never healed has to come again, and with it everything behind it.
  if (!scan->unresolved.empty()) truncate_after(*scan->unresolved.begin() - 1);
  scan->found.contiguous = records_.empty() ? begin_.first_frame - 1 : records_.back().frame.frame;
  scan->done(std::optional<Found>{scan->found});
}

void StagingArea::write_at(uint64_t offset, Bytes image, Done done) {
  auto data = std::make_shared<Bytes>(std::move(image));
  write_block(device_, offset, data->data(), data->size(), false, [alive = alive_.token(), data, done](Errno error) {
    if (alive()) done(error);
  });
}

void StagingArea::begin(const EpochBegin& begin, Done done) {
  begin_ = begin;
  records_.clear();
  Bytes image = make_record(
      {.type = RecordType::Begin, .epoch = begin.epoch, .session = begin.session},
      [&begin](Bytes& out) { ByteWriter(out).raw(encode(begin)); }, 256);
  if (capacity() < image.size()) {
    position_ = base_;
    return executor_.post([done] { done(ENOSPC); });
  }
  begin_chain_ = link_record(image, 0);
  position_ = base_ + image.size();
  high_water_ = std::max(high_water_, position_);
  write_at(base_, std::move(image), std::move(done));
}

Bytes StagingArea::prepare_frame(uint64_t epoch, const Id128& session, const StagedFrame& frame,
                                 const FrameBody& body) {
  return make_record(
      {.type = RecordType::Frame, .epoch = epoch, .session = session, .frame = frame},
      [&body](Bytes& out) { append_frame_body(body, out); }, body.literals.size() + body.runs.size() * 19 + 64);
}

void StagingArea::append(const StagedFrame& frame, Bytes image, Done done) {
  VF_ASSERT(image.size() % kAlignment == 0);
  if (!fits_in(position_, image.size(), device_.size())) return executor_.post([done] { done(ENOSPC); });
  const uint64_t chained = link_record(image, chain());
  records_.push_back({frame, position_, static_cast<uint32_t>(image.size()), chained});
  const uint64_t offset = position_;
  position_ += image.size();
  high_water_ = std::max(high_water_, position_);
  write_at(offset, std::move(image), std::move(done));
}

void StagingArea::commit(bool consistent, Done done) {
  Bytes image = make_record(
      {.type = RecordType::Commit, .epoch = begin_.epoch, .session = begin_.session},
      [this, consistent](Bytes& out) { ByteWriter(out).le64(records_.size()).u8(consistent); }, 16);
  if (!fits_in(position_, image.size(), device_.size())) return executor_.post([done] { done(ENOSPC); });
  link_record(image, chain());
  high_water_ = std::max(high_water_, position_ + image.size());
  // The commit record may reach the disk before the frames: scan() counts and hashes them all before it believes it.
  write_at(position_, std::move(image), [this, done = std::move(done)](Errno error) {
    if (error != 0) return done(error);
    flush(done);
  });
}

void StagingArea::flush(Done done) {
  flush_block(device_, [alive = alive_.token(), done = std::move(done)](Errno error) {
    if (alive()) done(error);
  });
}

void StagingArea::reserve(uint64_t bytes_ahead, Done done) {
  const uint64_t wanted = std::min(device_.size(), position_ + bytes_ahead);
  const uint64_t from = std::max(reserved_, round_up(position_, kAlignment));
  if (wanted <= from) return executor_.post([done] { done(0); });
  const uint64_t until = std::min(device_.size(), round_up(wanted, kReserveStep));
  reserved_ = until;
  high_water_ = std::max(high_water_, until);
  zero_block(device_, {from, until - from}, false,
             [this, alive = alive_.token(), from, done = std::move(done)](Errno error) {
               if (!alive()) return;
               if (error != 0) reserved_ = from;
               done(error);
             });
}

void StagingArea::truncate_after(uint64_t frame) {
  while (!records_.empty() && records_.back().frame.frame > frame) {
    position_ = records_.back().offset;
    records_.pop_back();
  }
}

void StagingArea::forget(uint64_t keep_bytes, Done done) {
  records_.clear();
  position_ = base_;
  const uint64_t keep_end = base_ + round_up(keep_bytes, kAlignment);
  if (high_water_ <= keep_end) return executor_.post([done] { done(0); });
  const ByteRange surplus{keep_end, high_water_ - keep_end};
  high_water_ = reserved_ = keep_end;
  zero_block(device_, surplus, true, [alive = alive_.token(), done = std::move(done)](Errno error) {
    if (alive()) done(error);
  });
}

void StagingArea::read(const StagedRecord& record, std::function<void(Result<std::shared_ptr<Content>>)> done) {
  auto content = std::make_shared<Content>();
  content->image.resize(record.size);
  read_block(device_, record.offset, content->image.data(), record.size,
             [this, alive = alive_.token(), record, content, epoch = begin_.epoch, session = begin_.session,
              done = std::move(done)](Errno error) {
               if (!alive()) return;
               if (error != 0) return done(fail(ErrorKind::Io, "read staged epoch {}: {}", epoch, errno_text(error)));
               auto intact = std::make_shared<bool>(false);
               executor_.offload(
                   [content, record, epoch, session, intact] {
                     const auto header = parse_header(content->image);
                     if (!header || header->epoch != epoch || header->session != session ||
                         header->frame.frame != record.frame.frame || !payload_intact(*header, content->image)) {
                       return;
                     }
                     auto body = decode_frame_body(ByteSpan(content->image).subspan(kHeaderSize, header->payload_size));
                     if (!body) return;
                     content->body = std::move(*body);
                     *intact = true;
                   },
                   [alive, content, record, epoch, intact, done] {
                     if (!alive()) return;
                     if (!*intact) {
                       return done(fail(ErrorKind::Corrupt, "staged epoch {}: frame {} at {} is damaged", epoch,
                                        record.frame.frame, record.offset));
                     }
                     done(content);
                   });
             });
}

}  // namespace vmferry
