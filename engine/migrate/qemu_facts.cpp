// SPDX-License-Identifier: Apache-2.0
#include "engine/migrate/qemu_facts.h"

#include "engine/base/hash.h"
#include "engine/runtime/endpoint.h"
#include "netproto/qemu/qmp.h"

namespace vmferry {

namespace {

constexpr size_t kDisksMax = 256;

std::string percent_decode(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const Bytes byte = text[i] == '%' && i + 2 < text.size() ? from_hex(text.substr(i + 1, 2)) : Bytes{};
    if (byte.size() == 1) {
      out.push_back(static_cast<char>(byte[0]));
      i += 2;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

void parse_json_file(QemuDisk& disk, std::string_view text) {
  const auto parsed = parse_json(text);
  if (!parsed) return;
  // A format node names its protocol node under "file"; some levels of filters may come between.
  const Json* node = &*parsed;
  for (int depth = 0; depth < 8; ++depth) {
    if (qmp::text_of(*node, "driver") == "nbd") break;
    const Json& below = qmp::object_of(*node, "file");
    if (below.empty()) return;
    node = &below;
  }
  const Json& server = qmp::object_of(*node, "server");
  disk.nbd_export = qmp::text_of(*node, "export");
  if (qmp::text_of(server, "type") == "unix") {
    disk.nbd_socket = qmp::text_of(server, "path");
  } else if (auto endpoint = Endpoint::parse(qmp::text_of(server, "host") + ":" + qmp::text_of(server, "port"))) {
    disk.nbd_host = endpoint->host;
    disk.nbd_port = endpoint->port;
  } else {
    // json:{} spells server fields flat: "server.type".
    disk.nbd_socket = qmp::text_of(*node, "server.path");
  }
}

}  // namespace

void parse_disk_file(QemuDisk& disk) {
  std::string_view rest = disk.file;
  if (rest.starts_with("json:")) return parse_json_file(disk, rest.substr(5));
  if (rest.starts_with("nbd+unix://")) {
    rest.remove_prefix(11);
    const size_t query = rest.find("?socket=");
    if (query == std::string_view::npos) return;
    std::string_view name = rest.substr(0, query);
    if (name.starts_with('/')) name.remove_prefix(1);
    disk.nbd_export = percent_decode(name);
    disk.nbd_socket = percent_decode(rest.substr(query + 8));
    return;
  }
  if (!rest.starts_with("nbd://")) return;
  rest.remove_prefix(6);
  const size_t slash = rest.find('/');
  std::string address(rest.substr(0, slash));
  if (address.rfind(':') == std::string::npos || address.ends_with(']')) address += ":10809";
  const auto endpoint = Endpoint::parse(address);
  if (!endpoint || endpoint->is_unix) return;
  disk.nbd_host = endpoint->host;
  disk.nbd_port = endpoint->port;
  if (slash != std::string_view::npos) disk.nbd_export = percent_decode(rest.substr(slash + 1));
}

std::vector<QemuDisk> parse_disks(const Json& query_block) {
  std::vector<QemuDisk> disks;
  if (!query_block.is_array()) return disks;
  for (const Json& entry : query_block) {
    const Json& inserted = qmp::object_of(entry, "inserted");
    if (inserted.empty()) continue;  // an empty drive
    if (disks.size() == kDisksMax) break;
    QemuDisk disk;
    disk.node = qmp::text_of(inserted, "node-name");
    disk.device = qmp::text_of(entry, "qdev");
    if (disk.device.empty()) disk.device = qmp::text_of(entry, "device");
    disk.driver = qmp::text_of(inserted, "drv");
    disk.file = qmp::text_of(inserted, "file");
    disk.writable = !qmp::flag_of(inserted, "ro");
    disk.removable = qmp::flag_of(entry, "removable");
    disk.size = qmp::number_of(qmp::object_of(inserted, "image"), "virtual-size");
    parse_disk_file(disk);
    disks.push_back(std::move(disk));
  }
  return disks;
}

std::vector<std::string> parse_vhost_devices(const Json& qom_list) {
  std::vector<std::string> names;
  if (!qom_list.is_array()) return names;
  for (const Json& entry : qom_list) {
    const std::string name = qmp::text_of(entry, "name");
    if (name.empty() || !qmp::text_of(entry, "type").starts_with("child<vhost-user-blk")) continue;
    if (names.size() == kDisksMax) break;
    names.push_back(name);
  }
  return names;
}

std::map<std::string, std::string> parse_chardev_sockets(const Json& query_chardev) {
  std::map<std::string, std::string> sockets;
  if (!query_chardev.is_array()) return sockets;
  for (const Json& entry : query_chardev) {
    const std::string text = qmp::text_of(entry, "filename");
    std::string_view file = text;
    if (file.starts_with("disconnected:")) file.remove_prefix(13);
    if (!file.starts_with("unix:") || sockets.size() == kDisksMax) continue;
    file.remove_prefix(5);
    sockets[qmp::text_of(entry, "label")] = file.substr(0, file.rfind(",server"));
  }
  return sockets;
}

Json to_json(const QemuFacts& facts) {
  Json disks = Json::array();
  for (const QemuDisk& disk : facts.disks) {
    disks.push_back({{"node", disk.node},
                     {"device", disk.device},
                     {"driver", disk.driver},
                     {"file", disk.file},
                     {"writable", disk.writable},
                     {"removable", disk.removable},
                     {"size", disk.size},
                     {"nbd_socket", disk.nbd_socket},
                     {"nbd_host", disk.nbd_host},
                     {"nbd_port", disk.nbd_port},
                     {"nbd_export", disk.nbd_export},
                     {"vhost_socket", disk.vhost_socket}});
  }
  return {{"version", fmt::format("{}.{}.{}", facts.version_major, facts.version_minor, facts.version_micro)},
          {"machine", facts.machine},
          {"cpu_model", facts.cpu_model},
          {"cpu_count", facts.cpu_count},
          {"memory_size", facts.memory_size},
          {"ever_migrated", facts.ever_migrated},
          {"blocked_reasons", facts.blocked_reasons},
          {"disks", std::move(disks)}};
}

}  // namespace vmferry
