// SPDX-License-Identifier: Apache-2.0
//
// What the load in the guest does, from words `vf.NAME=VALUE` of the kernel command line (or of argv on a host).
// The defaults are the load of the comparison in docs/migration.md. Sizes and rates take K, M, G (powers of 1024).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vmferry::guest {

enum class DiskMode { None, Raw, File };

struct Options {
  DiskMode mode = DiskMode::Raw;                  // vf.mode=none|raw|file
  std::vector<std::string> disks = {"/dev/vda"};  // vf.disk=/dev/vda,/dev/vdb: one writer each
  std::uint64_t offset = 0;                       // vf.offset: start of the area on the disk (raw)
  std::uint64_t area_bytes = 448ULL << 20;        // vf.area; limited to the disk (raw)
  std::uint64_t hot_bytes = 32ULL << 20;          // vf.hot
  std::uint64_t disk_rate = 2ULL << 20;           // vf.disk_rate, bytes per second; 0: as fast as it goes
  unsigned random_percent = 94;                   // vf.random
  unsigned hot_percent = 80;                      // vf.hot_percent, of the random ones
  unsigned fsync_every = 64;                      // vf.fsync, records; 0: never
  bool direct = true;                             // vf.direct=0|1, O_DIRECT; file mode: off by default
  std::string file_name = "vf-records.dat";       // vf.file, in the root of the ext4 filesystem (file)
  std::string mount_type = "ext4";                // vf.fs
  std::uint64_t memory_bytes = 160ULL << 20;      // vf.mem; 0: no memory load
  std::uint64_t memory_rate = 4ULL << 20;         // vf.mem_rate, bytes of touched pages per second
  std::uint64_t warm_bytes = 0;                   // vf.warm: files (or disk blocks) to read first
  unsigned heartbeat_ms = 5;                      // vf.heartbeat; 0: none
  unsigned seconds = 0;                           // vf.seconds: stop by itself; 0: when told
  std::uint64_t seed = 0;                         // vf.seed; 0: random
  std::string log_path;                           // vf.log: a file instead of the virtio-serial port
  std::string heartbeat_path;                     // vf.heartbeat_log, the same
};

// False with a message for an unknown name or a bad value: a misspelt rate must not silently measure another load.
bool parse_options(const std::vector<std::string>& words, Options& options, std::string& error);

}  // namespace vmferry::guest
