// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/metrics.h"

#include "engine/control/metrics_server.h"
#include "engine/daemon/daemon.h"

namespace vmferry {

namespace {

double number(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : 0;
}

void add_volumes(Daemon& daemon, MetricsText& out) {
  const auto failed = [&](const std::string& name, double value) {
    out.gauge("vmferry_volume_failed", "1 where the volume could not be opened and is not served.", {{"volume", name}},
              value);
  };
  for (const auto& [name, volume] : daemon.volumes()) failed(name, 0);
  for (const auto& [name, volume] : daemon.failed_volumes()) failed(name, 1);
  for (const auto& [name, attachment] : daemon.state().record().attachments) {
    out.gauge("vmferry_volume_attachment_connected", "1 where a block device of this host has its daemon.",
              {{"volume", name}, {"device", attachment.device}},
              daemon.attachments().to_json(name)["state"] == "connected" ? 1 : 0);
  }
  for (const auto& [name, volume] : daemon.volumes()) {
    const NbdStats nbd = volume->nbd_stats();
    const VhostStats vhost = volume->vhost_stats();
    out.gauge("vmferry_volume_size_bytes", "Size of the volume.", {{"volume", name}},
              static_cast<double>(volume->device().size()));
    out.gauge("vmferry_volume_dirty_bytes", "Bytes that the peer may lack.", {{"volume", name}},
              static_cast<double>(volume->device().dirty_bytes()));
    out.gauge("vmferry_volume_connections", "Clients of the exports.", {{"volume", name}},
              static_cast<double>(volume->connections()));
    out.counter("vmferry_volume_read_bytes_total", "Read through the exports.", {{"volume", name}},
                static_cast<double>(nbd.read_bytes_total + vhost.read_bytes_total));
    out.counter("vmferry_volume_written_bytes_total", "Written through the exports.", {{"volume", name}},
                static_cast<double>(nbd.written_bytes_total + vhost.written_bytes_total));
    const Group* const group = daemon.group_of(name);
    if (group == nullptr) continue;
    out.gauge("vmferry_volume_primary", "1 where the volume is primary.", {{"volume", name}},
              group->ownership().role == Role::Primary ? 1 : 0);
    out.gauge("vmferry_volume_may_run", "1 where its guest may run.", {{"volume", name}},
              may_run(group->ownership()) ? 1 : 0);
    out.gauge("vmferry_volume_split_brain", "1 while the operator has to decide.", {{"volume", name}},
              group->ownership().split_brain ? 1 : 0);
  }
}

void add_migrations(Daemon& daemon, MetricsText& out) {
  for (Group* group : daemon.groups()) {
    const std::string phase(to_string(group->coordinator().phase()));
    for (const std::string& name : group->record().members) {
      out.gauge("vmferry_migration_phase", "1, with the phase as a label; of the running or the last migration.",
                {{"volume", name}, {"phase", phase}}, 1);
    }
  }
}

void add_replication(Daemon& daemon, MetricsText& out) {
  for (const Group* group : daemon.groups()) {
    for (const Json& entry : group->replication_status()) {
      const std::string name = entry["name"];
      const std::string direction = entry["direction"];
      out.gauge("vmferry_replication_state", "1, with the state as a label.",
                {{"volume", name}, {"peer", entry["peer"]}, {"direction", direction}, {"state", entry["state"]}}, 1);
      if (direction != "sending") continue;
      out.gauge("vmferry_replication_rpo_seconds", "Age of the oldest write that the copy lacks; of the group.",
                {{"volume", name}}, number(entry, "rpo_s"));
      out.gauge("vmferry_replication_remaining_bytes", "Still to be sent; of the group.", {{"volume", name}},
                number(entry, "remaining_bytes"));
      out.counter("vmferry_replication_wire_bytes_total", "Sent, after reduction; of the group.", {{"volume", name}},
                  number(entry, "wire_bytes"));
      out.counter("vmferry_replication_raw_bytes_total", "Sent, before reduction; of the group.", {{"volume", name}},
                  number(entry, "raw_bytes"));
    }
  }
}

void add_peers(Daemon& daemon, MetricsText& out) {
  for (const PeerStatus& peer : daemon.peers().list()) {
    const std::string& name = peer.record.name;
    out.gauge("vmferry_peer_connected", "1 while connected.", {{"peer", name}}, peer.connected ? 1 : 0);
    out.gauge("vmferry_peer_rtt_seconds", "Round trip.", {{"peer", name}}, static_cast<double>(peer.figures.rtt) / 1e9);
    out.counter("vmferry_peer_sent_bytes_total", "Sent to the peer.", {{"peer", name}},
                static_cast<double>(peer.figures.sent_bytes));
    out.counter("vmferry_peer_received_bytes_total", "Received from the peer.", {{"peer", name}},
                static_cast<double>(peer.figures.received_bytes));
  }
}

}  // namespace

std::string metrics_text(Daemon& daemon) {
  MetricsText out;
  out.gauge("vmferry_build_info", "1, with the version as a label.", {{"version", VMFERRY_VERSION}}, 1);
  add_volumes(daemon, out);
  add_replication(daemon, out);
  add_migrations(daemon, out);
  add_peers(daemon, out);
  return out.text();
}

}  // namespace vmferry
