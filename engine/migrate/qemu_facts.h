// SPDX-License-Identifier: Apache-2.0
//
// What preflight has to know about a QEMU: version, machine, CPU, state, and where its disks are.
// Pure: from QMP replies, which are not trusted. Threads: values.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/migrate/qemu.h"
#include "netproto/rpc/json_lines.h"

namespace vmferry {

// One disk of a QEMU. Where it is served from: an NBD unix socket, an NBD host and port, a vhost-user-blk socket, or a
// file.
struct QemuDisk {
  std::string node;    // block node
  std::string device;  // path of the guest's device: equal at both ends for the same disk
  std::string driver;  // of the node: "nbd", "raw", "qcow2"
  std::string file;    // QEMU's file name of it
  bool writable = false;
  bool removable = false;
  uint64_t size = 0;       // bytes
  std::string nbd_socket;  // path, "" if not by unix socket
  std::string nbd_host;    // "" if not by TCP
  uint16_t nbd_port = 0;
  std::string nbd_export;
  std::string vhost_socket;  // path, "" if not vhost-user-blk
  bool is_nbd() const { return !nbd_socket.empty() || !nbd_host.empty(); }
};

struct QemuFacts {
  int version_major = 0;
  int version_minor = 0;
  int version_micro = 0;
  std::string machine;    // "pc-q35-7.2-machine"
  std::string cpu_model;  // "qemu64-x86_64-cpu"; "host-x86_64-cpu" is not comparable between hosts
  uint64_t cpu_count = 0;
  uint64_t memory_size = 0;  // bytes
  QemuState state;
  bool kvm = true;
  // QEMU does not tell a node's reconnect-delay; whether its command line has one says it nearly always.
  std::optional<bool> reconnect_delay;
  bool ever_migrated = false;  // query-migrate knows a migration: a destination must be fresh
  std::vector<std::string> blocked_reasons;
  std::vector<QemuDisk> disks;
};

Json to_json(const QemuFacts& facts);

// From the reply of query-block, at most 256 disks.
std::vector<QemuDisk> parse_disks(const Json& query_block);
// Devices on vhost-user-blk have no block node: they are found among QEMU's objects, by their chardev.
// From the reply of qom-list, their names; at most 256.
std::vector<std::string> parse_vhost_devices(const Json& qom_list);
// From the reply of query-chardev: label and path of every unix socket that QEMU connects to.
std::map<std::string, std::string> parse_chardev_sockets(const Json& query_chardev);
// Fills the nbd_ fields from QEMU's file name: nbd+unix:///EXPORT?socket=PATH, nbd://HOST:PORT/EXPORT or json:{...}.
void parse_disk_file(QemuDisk& disk);

}  // namespace vmferry
