// SPDX-License-Identifier: Apache-2.0
//
// Reads along QEMU's precopy stream (version 3; QEMU docs/devel/migration, migration/savevm.c, migration/ram.c) while
// it passes: pages by kind, rounds, where the tail begins. It never holds back or changes a byte.
//
// Device sections carry no length. Before the `ram` section begins they are skipped until its header is found; after
// its END everything is opaque. Any surprise makes the rest opaque too: figures then stop, the stream goes on.
// Memory: at most a few hundred bytes and the table of RAM blocks. Threads: one owner.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/base/bytes.h"

namespace vmferry {

struct RamBlock {
  std::string name;
  uint64_t length = 0;  // bytes
};

struct MigrationStreamFigures {
  uint64_t total_bytes = 0;
  uint64_t pages_data = 0;
  uint64_t pages_zero = 0;
  uint64_t ram_sections = 0;      // PART and END sections with footer
  uint64_t commands = 0;          // QEMU_VM_COMMAND
  uint64_t device_bytes_max = 0;  // bytes skipped before `ram` began
  uint64_t tail_bytes = 0;        // behind the END of `ram`: device state and description
  uint64_t page_size = 4096;
  std::string machine;
  std::vector<RamBlock> blocks;
};

class MigrationStreamParser {
 public:
  enum class Phase : uint8_t {
    Header,
    Sections,  // between and within sections that are understood
    Skipping,  // device sections before `ram`
    Tail,      // the `ram` section has ended
    Opaque,    // something unknown: see reason()
  };

  void feed(ByteSpan bytes);
  Phase phase() const { return phase_; }
  const std::string& reason() const { return reason_; }  // of Opaque
  const MigrationStreamFigures& figures() const { return figures_; }

 private:
  enum class Field : uint8_t {
    FileHeader,
    SectionType,
    ConfigurationSize,
    ConfigurationName,
    SubsectionHead,
    SubsectionName,
    PageBits,
    CapabilityCount,
    CapabilitySize,
    CapabilityName,
    Uuid,
    SectionHead,  // of START: id and length of the name
    SectionName,
    PartHead,  // of PART and END: id
    RecordHead,
    BlockNameSize,
    BlockName,
    FillByte,
    SizeNameSize,
    SizeName,
    SizeLength,
    CommandHead,
    Footer,
  };

  void handle(ByteSpan field);
  void section_type(uint8_t type);
  void subsection_name(ByteSpan field);
  void section_name(ByteSpan field);
  void record_head(uint64_t head);
  void after_block_name();
  void size_length(uint64_t length);
  void footer(ByteReader& reader);
  void expect(Field field, size_t size);
  void give_up(std::string reason);
  void skip_devices(ByteSpan bytes);
  bool known_block(std::string_view name) const;

  Phase phase_ = Phase::Header;
  std::string reason_;
  MigrationStreamFigures figures_;
  Field field_ = Field::FileHeader;
  size_t need_ = 8;    // size of the field
  uint64_t skip_ = 0;  // bytes of page or command data still to pass
  Bytes held_;         // an incomplete field, or the last bytes while skipping devices
  uint64_t skipped_ = 0;
  uint8_t section_type_ = 0;
  uint32_t section_id_ = 0;
  uint32_t ram_id_ = 0;
  bool ram_started_ = false;
  uint64_t head_flags_ = 0;
  uint64_t sizes_left_ = 0;  // bytes of RAM not yet in the list of blocks
  uint32_t capabilities_left_ = 0;
};

}  // namespace vmferry
