// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/oracle.h"

#include "engine/migrate/handover.h"
#include "netproto/repl/epoch_messages.h"
#include "tests/sim/host.h"

namespace vmferry::sim {

namespace {

uint64_t content_of(const Host& host) {
  uint64_t digest = 0;
  for (size_t volume = 0; volume < host.volume_count(); ++volume) {
    digest += host.store(volume).digest() * (2 * volume + 3);
  }
  return digest;
}

}  // namespace

void Oracle::check_step() {
  for (const Host* host : hosts_) note_content(*host);
  if (violated() || forked()) return;
  const QemuProcess* running = nullptr;
  for (Host* host : hosts_) {
    const auto process = host->qemu();
    if (process == nullptr || !process->guest_runs()) continue;
    if (running != nullptr) return violation("I5: two guests run");
    running = process.get();
  }
  if (hosts_[0]->accepts_writes() && hosts_[1]->accepts_writes()) violation("I5: both sides accept writes");
}

void Oracle::guest_started(QemuProcess& process, Host& host, bool by_command) {
  const Ownership& durable = host.durable_ownership();
  if (by_command && durable.role != Role::Primary) {
    violation(fmt::format("I5: the guest was started on {} whose durable state is {}", host.name(),
                          to_string(durable.state)));
  }
  Branch& now = branch(host);
  if (by_command && process.memory() != now.newest_memory) {
    violation(fmt::format("the guest on {} runs with memory of step {}, the newest is {}", host.name(),
                          process.memory(), now.newest_memory));
  }
  if (now.last_host != nullptr && now.last_host != &host && by_command) {
    for (DiskModel& disk : now.disks) disk.handed_over();
  }
  now.last_host = &host;
}

Oracle::Branch& Oracle::branch(const Host& host) {
  return *branch_of_[host.index()];
}

void Oracle::became_primary(Host& host, bool by_promotion, bool forced) {
  holder_ = &host;
  promoted_content_ = content_of(host);
  promoted_not_before_ = copies_[host.index()].acknowledged_before_at;
  if (!by_promotion || forked()) return;
  if (!forced) {
    // The other side confirmed its fence: everything that it acknowledged is durable here.
    for (DiskModel& disk : branch(host).disks) disk.handed_over();
    return;
  }
  Branch& fork = branches_.emplace_back(branch(host));
  branch_of_[host.index()] = &fork;
  fork.last_host = nullptr;
  copies_ = {};
  for (size_t volume = 0; volume < fork.disks.size(); ++volume) {
    const std::string wrong = fork.disks[volume].adopt(host.store(volume).content());
    if (!wrong.empty()) violation(fmt::format("I6: {} was promoted with vd{}: {}", host.name(), volume, wrong));
  }
}

void Oracle::join(const Host& winner) {
  Branch& kept = branch(winner);
  for (const Branch& other : branches_) {
    for (size_t volume = 0; volume < kept.disks.size(); ++volume) {
      kept.disks[volume].skip_versions_of(other.disks[volume]);
    }
  }
  branch_of_.fill(&kept);
  holder_ = &winner;
  copies_ = {};
}

void Oracle::write_failed(Host& host, Errno error, bool guest_running) {
  ++refused_writes;
  if (error != EPERM) return violation(fmt::format("a write on {} failed with {}", host.name(), errno_text(error)));
  if (forked() || promoting) return;  // the operator's word, not the handover's
  if (guest_running) return violation(fmt::format("I5: a write of the running guest on {} was refused", host.name()));
  // Only RUNNING says that the guest will never need it here.
  const Ownership& peer = hosts_[1 - host.index()]->durable_ownership();
  const bool runs_there =
      peer.role == Role::Primary && peer.state != HandoverState::Primary && peer.state != HandoverState::Started;
  if (!runs_there) {
    violation(fmt::format("a parked write on {} was failed while the peer is in state {}", host.name(),
                          to_string(peer.state)));
  }
}

Hash128 Oracle::image_of(Host& host) const {
  Hash128 sum{};
  for (size_t volume = 0; volume < host.volume_count(); ++volume) {
    const Hash128 hash = xxh3_128(host.store(volume).content());
    for (size_t i = 0; i < sum.size(); ++i) sum[i] = static_cast<uint8_t>(sum[i] * 31 + hash[i]);
  }
  return sum;
}

void Oracle::daemon_started(Host& host) {
  copies_[host.index()].first_hello = true;
}

void Oracle::message_sent(size_t side, MessageType type, ByteSpan payload) {
  Host& host = *hosts_[side];
  Host& other = *hosts_[1 - side];
  switch (type) {
    case MessageType::Go: {
      ++messages["Go"];
      const auto qemu = host.qemu();
      if (qemu != nullptr && qemu->alive() && qemu->run_state() != RunState::PostMigrate) {
        violation(fmt::format("GO was sent before the QEMU on {} was in postmigrate", host.name()));
      }
      return;
    }
    case MessageType::Prepare:
      ++messages["Prepare"];
      return;
    case MessageType::Prepared:
      ++messages["Prepared"];
      return;
    case MessageType::Aborted:
      ++messages["Aborted"];
      return;
    case MessageType::Primary:
      ++messages["Primary"];
      if (host.durable_ownership().role != Role::Primary) violation("PRIMARY was said before it was durable");
      return;
    case MessageType::Running:
      ++messages["Running"];
      return;
    case MessageType::EpochAck: {
      const auto ack = decode_epoch_ack(payload);
      if (!ack) return violation("an EpochAck does not decode");
      copy_acknowledged(host, *ack);
      if (ack->epoch == final_epoch_) check_final_epoch(host, other);
      return;
    }
    case MessageType::EpochBegin: {
      const auto begin = decode_epoch_begin(payload);
      if (!begin) return violation("an EpochBegin does not decode");
      if (!begin->final_attempt.is_none()) {
        final_epoch_ = begin->epoch;
        final_attempt_ = begin->final_attempt;
      }
      return;
    }
    case MessageType::GroupHello: {
      const auto hello = decode_group_hello(payload);
      if (!hello) return violation("a GroupHello does not decode");
      if (static_cast<Role>(hello->role) == Role::Secondary) copy_said_hello(host, *hello);
      return;
    }
    default:
      return;
  }
}

// The last epoch of a handover equals the source, which is fenced while it is under way.
void Oracle::check_final_epoch(Host& copy, Host& source) {
  const Ownership& durable = source.durable_ownership();
  if (durable.attempt != final_attempt_ || !parks_writes(durable) || !source.parks_writes()) return;
  ++final_epochs;
  for (size_t volume = 0; volume < copy.volume_count(); ++volume) {
    if (copy.store(volume).content() == source.store(volume).content()) continue;
    violation(
        fmt::format("I6: the last epoch {} of a handover does not equal the source on vd{}", final_epoch_, volume));
  }
}

void Oracle::note_content(const Host& host) {
  Past& past = pasts_[host.index()];
  const uint64_t content = content_of(host);
  if (content == past.now && !past.last_held.empty()) return;
  const Nanoseconds now = host.world().now();
  past.last_held[past.now] = now;
  past.last_held[content] = now;
  past.now = content;
}

bool Oracle::source_held(const Host& copy, uint64_t content, Nanoseconds since) const {
  const Past& past = pasts_[1 - copy.index()];
  if (past.now == content) return true;
  const auto held = past.last_held.find(content);
  return held != past.last_held.end() && held->second >= since;
}

// A copy that is called consistent holds what its source's volumes held together at some moment: if a write is in it,
// so is everything acknowledged before that write was submitted. An epoch is sealed after the one before it was
// acknowledged, so the moment is no earlier than that.
void Oracle::check_moment(const Host& copy, const std::string& said, uint64_t content, Nanoseconds since) {
  ++moments;
  if (source_held(copy, content, since)) return;
  violation(fmt::format("I6: {} {}, but its source never held that", copy.name(), said));
}

void Oracle::promoted_as_consistent(const Host& host) {
  check_moment(host, "was promoted as consistent", promoted_content_, promoted_not_before_);
}

void Oracle::copy_acknowledged(Host& host, const EpochAck& ack) {
  Copy& copy = copies_[host.index()];
  if (copy.images.contains(ack.epoch)) return;  // said again after a cut
  copy.images.emplace(ack.epoch, image_of(host));
  if (ack.quality == CopyQuality::Consistent) {
    check_moment(host, fmt::format("calls epoch {} consistent", ack.epoch), content_of(host), copy.acknowledged_at);
  }
  if (ack.epoch < copy.acknowledged) return;
  copy.acknowledged = ack.epoch;
  copy.acknowledged_before_at = std::exchange(copy.acknowledged_at, host.world().now());
}

// A copy that comes back says how far it is: it must be as far as it acknowledged, and its files must be the image of
// that epoch, whole.
void Oracle::copy_said_hello(Host& host, const GroupHello& hello) {
  Copy& copy = copies_[host.index()];
  if (hello.lineage != copy.lineage) {
    copy = Copy{};
    copy.lineage = hello.lineage;
  } else if (copy.first_hello && hello.quality >= CopyQuality::Fuzzy) {
    if (hello.quality == CopyQuality::Consistent) {
      check_moment(host, fmt::format("came back and calls epoch {} consistent", hello.epoch), content_of(host),
                   copy.acknowledged_before_at);
    }
    if (hello.epoch < copy.acknowledged) {
      return violation(fmt::format("I6: {} acknowledged epoch {} and came back with epoch {}", host.name(),
                                   copy.acknowledged, hello.epoch));
    }
    const auto image = copy.images.find(hello.epoch);
    if (image != copy.images.end()) {
      ++checked_images;
      if (image_of(host) != image->second) {
        violation(
            fmt::format("I6: {} came back and its files are not the image of epoch {}", host.name(), hello.epoch));
      }
    }
  }
  copy.first_hello = false;
}

}  // namespace vmferry::sim
