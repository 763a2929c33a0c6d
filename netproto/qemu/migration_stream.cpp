// SPDX-License-Identifier: Apache-2.0
#include "netproto/qemu/migration_stream.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace vmferry {

namespace {

constexpr uint32_t kMagic = 0x5145564d;  // "QEVM"
constexpr uint32_t kVersion = 3;
constexpr uint32_t kRamVersion = 4;

enum SectionType : uint8_t {
  kEof = 0x00,
  kStart = 0x01,
  kPart = 0x02,
  kEnd = 0x03,
  kFull = 0x04,
  kSubsection = 0x05,
  kConfiguration = 0x07,
  kCommand = 0x08,
  kFooter = 0x7e,
};

// Flags in the low bits of a record's address (migration/ram.c). The others belong to capabilities that are off.
constexpr uint64_t kZero = 0x02;
constexpr uint64_t kMemSize = 0x04;
constexpr uint64_t kPage = 0x08;
constexpr uint64_t kEos = 0x10;
constexpr uint64_t kContinue = 0x20;
constexpr uint64_t kMultifdFlush = 0x200;

constexpr size_t kMachineNameSizeMax = 256;
constexpr size_t kBlocksMax = 4096;
constexpr uint32_t kCapabilitiesMax = 64;
constexpr uint64_t kRamSizeMax = 1ULL << 50;

// Start of the `ram` section behind its type and id: name length, name, instance 0, version 4.
constexpr std::array<uint8_t, 12> kRamName = {3, 'r', 'a', 'm', 0, 0, 0, 0, 0, 0, 0, 4};
constexpr size_t kRamStartSize = 1 + 4 + kRamName.size();

}  // namespace

void MigrationStreamParser::feed(ByteSpan bytes) {
  figures_.total_bytes += bytes.size();
  while (!bytes.empty()) {
    if (phase_ == Phase::Opaque) return;
    if (phase_ == Phase::Tail) {
      figures_.tail_bytes += bytes.size();
      return;
    }
    if (phase_ == Phase::Skipping) {
      const size_t at_once = std::min<size_t>(bytes.size(), 4096);
      skip_devices(bytes.first(at_once));
      bytes = bytes.subspan(at_once);
      continue;
    }
    if (skip_ > 0) {
      const auto passed = static_cast<size_t>(std::min<uint64_t>(skip_, bytes.size()));
      skip_ -= passed;
      bytes = bytes.subspan(passed);
      continue;
    }
    const size_t wanted = std::min(need_ - held_.size(), bytes.size());
    if (held_.empty() && wanted == need_) {  // the usual case: no copy
      handle(bytes.first(wanted));
      bytes = bytes.subspan(wanted);
      continue;
    }
    held_.insert(held_.end(), bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(wanted));
    bytes = bytes.subspan(wanted);
    if (held_.size() < need_) return;
    Bytes field;
    field.swap(held_);
    handle(field);
  }
}

void MigrationStreamParser::expect(Field field, size_t size) {
  field_ = field;
  need_ = size;
}

void MigrationStreamParser::give_up(std::string reason) {
  phase_ = Phase::Opaque;
  reason_ = std::move(reason);
  held_ = {};
}

void MigrationStreamParser::handle(ByteSpan field) {
  ByteReader reader(field);
  switch (field_) {
    case Field::FileHeader:
      if (reader.be32() != kMagic) return give_up("no QEMU stream");
      if (reader.be32() != kVersion) return give_up("stream version is not 3");
      phase_ = Phase::Sections;
      return expect(Field::SectionType, 1);
    case Field::SectionType:
      return section_type(reader.u8());
    case Field::ConfigurationSize: {
      const uint32_t size = reader.be32();
      if (size == 0 || size > kMachineNameSizeMax) return give_up("length of the machine's name");
      return expect(Field::ConfigurationName, size);
    }
    case Field::ConfigurationName:
      figures_.machine = as_text(field);
      return expect(Field::SectionType, 1);
    case Field::SubsectionHead: {
      const uint8_t size = reader.u8();
      if (size == 0) return give_up("subsection without a name");
      return expect(Field::SubsectionName, size + size_t{4});
    }
    case Field::SubsectionName:
      return subsection_name(field);
    case Field::PageBits: {
      const uint32_t bits = reader.be32();
      if (bits < 10 || bits > 30) return give_up("page size");
      figures_.page_size = uint64_t{1} << bits;
      return expect(Field::SectionType, 1);
    }
    case Field::CapabilityCount:
      capabilities_left_ = reader.be32();
      if (capabilities_left_ > kCapabilitiesMax) return give_up("number of capabilities");
      return capabilities_left_ == 0 ? expect(Field::SectionType, 1) : expect(Field::CapabilitySize, 1);
    case Field::CapabilitySize: {
      const uint8_t size = reader.u8();
      if (size == 0) return give_up("capability without a name");
      return expect(Field::CapabilityName, size);
    }
    case Field::CapabilityName:
      return --capabilities_left_ == 0 ? expect(Field::SectionType, 1) : expect(Field::CapabilitySize, 1);
    case Field::Uuid:
      return expect(Field::SectionType, 1);
    case Field::SectionHead: {
      section_id_ = reader.be32();
      const uint8_t size = reader.u8();
      if (size == 0) return give_up("section without a name");
      return expect(Field::SectionName, size + size_t{8});
    }
    case Field::SectionName:
      return section_name(field);
    case Field::PartHead:
      section_id_ = reader.be32();
      if (!ram_started_ || section_id_ != ram_id_) return give_up("part of a section other than ram");
      return expect(Field::RecordHead, 8);
    case Field::RecordHead:
      return record_head(reader.be64());
    case Field::BlockNameSize: {
      const uint8_t size = reader.u8();
      if (size == 0) return give_up("RAM block without a name");
      return expect(Field::BlockName, size);
    }
    case Field::BlockName:
      if (!known_block(as_text(field))) return give_up("page of an unknown RAM block");
      return after_block_name();
    case Field::FillByte:
      ++figures_.pages_zero;
      return expect(Field::RecordHead, 8);
    case Field::SizeNameSize: {
      const uint8_t size = reader.u8();
      if (size == 0 || figures_.blocks.size() == kBlocksMax) return give_up("list of RAM blocks");
      return expect(Field::SizeName, size);
    }
    case Field::SizeName:
      figures_.blocks.push_back({std::string(as_text(field)), 0});
      return expect(Field::SizeLength, 8);
    case Field::SizeLength:
      return size_length(reader.be64());
    case Field::CommandHead:
      reader.be16();
      ++figures_.commands;
      skip_ = reader.be16();
      return expect(Field::SectionType, 1);
    case Field::Footer:
      return footer(reader);
  }
}

void MigrationStreamParser::section_type(uint8_t type) {
  section_type_ = type;
  switch (type) {
    case kConfiguration:
      return expect(Field::ConfigurationSize, 4);
    case kSubsection:  // only those of the configuration come here
      return expect(Field::SubsectionHead, 1);
    case kStart:
      return expect(Field::SectionHead, 5);
    case kPart:
    case kEnd:
      return expect(Field::PartHead, 4);
    case kCommand:
      return expect(Field::CommandHead, 4);
    case kFull:
      if (ram_started_) return give_up("device section before the end of ram");
      phase_ = Phase::Skipping;  // virtio-mem sends one before any page
      return;
    default:
      return give_up(fmt::format("section type {:#x}", type));
  }
}

void MigrationStreamParser::subsection_name(ByteSpan field) {
  const std::string_view name = as_text(field.first(field.size() - 4));
  if (name == "configuration/target-page-bits") return expect(Field::PageBits, 4);
  if (name == "configuration/capabilities") return expect(Field::CapabilityCount, 4);
  if (name == "configuration/uuid") return expect(Field::Uuid, 16);
  give_up("unknown subsection of the configuration");
}

void MigrationStreamParser::section_name(ByteSpan field) {
  ByteReader reader(field);
  const ByteSpan name = reader.take(field.size() - 8);
  reader.be32();  // instance
  const uint32_t version = reader.be32();
  if (as_text(name) != "ram") {
    if (ram_started_) return give_up("another section with parts");
    phase_ = Phase::Skipping;
    return;
  }
  if (version != kRamVersion || ram_started_) return give_up("ram section of another version");
  ram_started_ = true;
  ram_id_ = section_id_;
  expect(Field::RecordHead, 8);
}

void MigrationStreamParser::record_head(uint64_t head) {
  const uint64_t flags = head & (figures_.page_size - 1);
  const uint64_t address = head - flags;
  head_flags_ = flags;
  if (flags == kEos) return expect(Field::Footer, 5);
  if (flags == kMultifdFlush) return expect(Field::RecordHead, 8);
  if (flags == kMemSize && section_type_ == kStart) {
    if (address == 0 || address > kRamSizeMax || !figures_.blocks.empty()) return give_up("size of RAM");
    sizes_left_ = address;
    return expect(Field::SizeNameSize, 1);
  }
  const uint64_t kind = flags & ~kContinue;
  if ((kind != kPage && kind != kZero) || address > kRamSizeMax)
    return give_up(fmt::format("page record with flags {:#x}", flags));
  if ((flags & kContinue) == 0) return expect(Field::BlockNameSize, 1);
  after_block_name();
}

void MigrationStreamParser::after_block_name() {
  if ((head_flags_ & kZero) != 0) return expect(Field::FillByte, 1);
  ++figures_.pages_data;
  skip_ = figures_.page_size;
  expect(Field::RecordHead, 8);
}

void MigrationStreamParser::size_length(uint64_t length) {
  // A sum that does not come out means an extension that adds fields to the list (x-ignore-shared, huge pages).
  if (length > sizes_left_) return give_up("sizes of RAM blocks");
  figures_.blocks.back().length = length;
  sizes_left_ -= length;
  sizes_left_ == 0 ? expect(Field::RecordHead, 8) : expect(Field::SizeNameSize, 1);
}

void MigrationStreamParser::footer(ByteReader& reader) {
  if (reader.u8() != kFooter || reader.be32() != section_id_) return give_up("section without its footer");
  if (section_type_ != kStart) ++figures_.ram_sections;
  expect(Field::SectionType, 1);
  if (section_type_ == kEnd) {
    phase_ = Phase::Tail;
    held_ = {};
  }
}

bool MigrationStreamParser::known_block(std::string_view name) const {
  return std::any_of(figures_.blocks.begin(), figures_.blocks.end(),
                     [&](const RamBlock& block) { return block.name == name; });
}

// Looks for the whole start of the `ram` section. What merely looks like it fails to parse and makes the rest opaque,
// which costs figures, never bytes.
void MigrationStreamParser::skip_devices(ByteSpan bytes) {
  held_.insert(held_.end(), bytes.begin(), bytes.end());
  auto found = held_.begin();
  for (;; ++found) {
    found = std::search(found, held_.end(), kRamName.begin(), kRamName.end());
    if (found == held_.end() || (found - held_.begin() >= 5 && *(found - 5) == kStart)) break;
  }
  if (found != held_.end()) {
    const auto start = static_cast<size_t>(found - held_.begin());
    figures_.device_bytes_max = skipped_ + start - 5;
    ByteReader reader(ByteSpan(held_).subspan(start - 4));
    ram_started_ = true;
    ram_id_ = section_id_ = reader.be32();
    section_type_ = kStart;
    phase_ = Phase::Sections;
    expect(Field::RecordHead, 8);
    const Bytes rest(found + kRamName.size(), held_.end());
    held_.clear();
    figures_.total_bytes -= rest.size();
    return feed(rest);
  }
  if (held_.size() >= kRamStartSize) {
    const size_t excess = held_.size() - (kRamStartSize - 1);
    skipped_ += excess;
    held_.erase(held_.begin(), held_.begin() + static_cast<ptrdiff_t>(excess));
  }
}

}  // namespace vmferry
