// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/group.h"

#include <algorithm>
#include <utility>

#include "engine/base/log.h"
#include "engine/daemon/group_replication.h"
#include "engine/runtime/steps.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kRetryDelay = 5 * kSecond;

}  // namespace

Group::Group(GroupRecord record, std::vector<ReplicaVolume> volumes, GroupParts parts, GroupOptions options,
             GroupEvents events)
    : record_(std::move(record)),
      volumes_(std::move(volumes)),
      parts_(std::move(parts)),
      options_(std::move(options)),
      events_(std::move(events)),
      state_(parts_.staging),
      devices_(parts_.executor, tracked_devices()),
      replication_(std::make_unique<GroupReplicationLink>(*this)),
      memory_(std::make_unique<GroupMemory>(parts_.executor, channel_, options_.memory)),
      accept_timer_(parts_.executor),
      retry_timer_(parts_.executor) {}

Group::~Group() = default;

std::vector<TrackedDevice*> Group::tracked_devices() const {
  std::vector<TrackedDevice*> devices;
  for (const ReplicaVolume& volume : volumes_) devices.push_back(volume.device);
  return devices;
}

void Group::open(Done done) {
  devices_.set_tracking_wanted(!record_.peer.empty());
  // Nothing is written before the coordinator has read the record: a secondary must not take a write by accident.
  devices_.park_writes();
  run_steps({[this](StepDone next) { state_.open(std::move(next)); },
             [this](StepDone next) {
               // Until the guest was started here, the files are a copy that the peer may yet take back.
               if (record_.ownership.role != Role::Secondary && !taking_over()) return next({});
               make_receiver();
               open_receiver(std::move(next));
             },
             [this](StepDone next) {
               open_ = true;
               if (receiver_ != nullptr) note_apart();  // until its source is heard
               // A crash between a first write and its note in the record: the activity log knows.
               const auto dirty = [](const TrackedDevice* device) { return device->dirty_bytes() > 0; };
               if (record_.ownership.role == Role::Primary &&
                   std::any_of(devices_.devices().begin(), devices_.devices().end(), dirty)) {
                 record_.ownership.wrote = true;
               }
               start_coordinator();
               if (wants_sender()) start_sender();
               coordinator_->resume();
               if (channel_.connected()) channel_connected();
               next({});
             }},
            std::move(done));
}

void Group::start_coordinator() {
  HandoverCoordinator::Parts parts{.executor = parts_.executor,
                                   .store = parts_.ownership,
                                   .channel = channel_,
                                   .devices = devices_,
                                   .replication = *replication_,
                                   .memory = *memory_,
                                   .qemu_at = [this](const std::string& path) { return qemu(path); },
                                   .default_qmp_path = parts_.qmp_path};
  CoordinatorEvents events;
  events.role_changed = [this](Role role) { role_changed(role); };
  events.ownership_changed = [this](const Ownership& ownership) {
    const bool given_up = taking_over() && ownership.role == Role::Secondary;
    const bool split = ownership.split_brain && !record_.ownership.split_brain;
    record_.ownership = ownership;
    // A split brain was decided at the other side: nothing else tells that there is somebody to send to again.
    if (ownership.role == Role::Primary && sender_ == nullptr && open_) {
      parts_.executor.post([this, alive = alive_.token()] {
        if (alive() && receiver_ == nullptr && wants_sender()) start_sender();
      });
    }
    if (given_up || split) {
      // No change of role is announced, but the peer knows us as primary and has to hear that we follow again; or it
      // may not know yet that both have written.
      parts_.executor.post([this, alive = alive_.token()] {
        if (!alive()) return;
        send_hello();
        feed_hello();
      });
    }
    if (events_.event) {
      events_.event("ownership_changed", {{"volumes", record_.members},
                                          {"role", std::string(to_string(ownership.role))},
                                          {"state", std::string(to_string(ownership.state))},
                                          {"term", ownership.term}});
    }
  };
  events.phase_changed = [this](MigratePhase phase) {
    if (events_.event) {
      events_.event("migration_phase", {{"volumes", record_.members}, {"phase", std::string(to_string(phase))}});
    }
  };
  events.alert = [this](const std::string& text) {
    if (events_.event) events_.event("alert", {{"volumes", record_.members}, {"text", text}});
  };
  CoordinatorOptions options = options_.coordinator;
  options.group = record_.members.front();
  coordinator_ =
      std::make_unique<HandoverCoordinator>(std::move(parts), record_.ownership, std::move(options), std::move(events));
}

void Group::close(Done done) {
  open_ = false;
  accept_timer_.cancel();
  retry_timer_.cancel();
  finish_accept(fail(ErrorKind::Unavailable, "the daemon is shutting down"));
  sender_.reset();
  channel_.set(nullptr);
  close_receiver([name = record_.members.front(), done = std::move(done)](const Status& status) {
    // It is staged, and the next start goes on with it.
    if (!status) log::error("volume={} {}", name, status.error().text);
    done({});
  });
}

Qemu* Group::connected_qemu(const std::string& path) const {
  const auto it = qemus_.find(path.empty() ? parts_.qmp_path : path);
  return it != qemus_.end() && it->second != nullptr && it->second->connected() ? it->second.get() : nullptr;
}

Qemu* Group::qemu(const std::string& path) {
  const std::string& wanted = path.empty() ? parts_.qmp_path : path;
  if (wanted.empty()) return nullptr;
  std::unique_ptr<Qemu>& slot = qemus_[wanted];
  if (slot == nullptr) slot = parts_.make_qemu(wanted);
  return slot.get();
}

// --- Sender and receiver

// Primary for a handover whose guest is not known to run yet.
bool Group::taking_over() const {
  return record_.ownership.state == HandoverState::Primary || record_.ownership.state == HandoverState::Started;
}

bool Group::wants_sender() const {
  const Ownership& ownership = coordinator_ != nullptr ? coordinator_->ownership() : record_.ownership;
  return ownership.role == Role::Primary && !taking_over() && !ownership.split_brain && record_.replication.active &&
         !record_.peer.empty() && ownership.state != HandoverState::Superseded;
}

void Group::start_sender() {
  // Not while it closes: it would be fed the hello of long ago, find the copy behind, and begin a full copy.
  if (sender_ != nullptr || !open_) return;
  SenderOptions options = options_.sender;
  options.overwrite_peer = record_.replication.overwrite_peer;
  // Half of the promise: sealing, sending and applying take the other half.
  options.interval = std::max<Nanoseconds>(record_.replication.rpo / 2, 100 * kMillisecond);
  sender_ = std::make_unique<Sender>(parts_.executor, channel_, state_, volumes_, std::move(options));
  sender_started_ = false;
  hello_given_ = false;
  if (record_.replication.paused) sender_->pause();
  sender_->start([this, sender = sender_.get()](const Status& status) {
    if (sender_.get() != sender) return;
    if (!status) {
      log::error("volume={} replication cannot start: {}", record_.members.front(), status.error().text);
      retry_timer_.start(kRetryDelay, [this, sender] {
        if (sender_.get() != sender || !wants_sender()) return;
        sender_.reset();
        start_sender();
      });
      return finish_accept(status);
    }
    sender_started_ = true;
    send_hello();
    feed_hello();
  });
}

void Group::make_receiver() {
  ReceiverEvents events;
  events.epoch_applied = [this](uint64_t epoch, CopyQuality) {
    log::debug("volume={} epoch={} applied", record_.members.front(), epoch);
    if (coordinator_ == nullptr || ownership().state != HandoverState::Superseded) return;
    rejoining_ = !ownership().split_brain;
    coordinator_->rejoined();
  };
  events.protocol_error = [this](const Error& error) { refuse_peer(error); };
  events.final_epoch_applied = [this](const Id128& attempt, uint64_t epoch) {
    if (final_listener_) final_listener_(attempt, epoch);
  };
  receiver_ = std::make_unique<Receiver>(parts_.executor, channel_, state_, parts_.staging, volumes_, options_.receiver,
                                         std::move(events));
  receiver_open_ = false;
}

// As a former primary: every write of ours was acknowledged by the copy, so our files are its image at that epoch.
bool Group::peer_has_everything() const {
  const ReplicaRecord& record = state_.record();
  if (record.quality != CopyQuality::Source || record.lineage.is_none() || record.epoch == 0) return false;
  const auto clean = [](const TrackedDevice* device) { return device->tracking() && device->dirty_bytes() == 0; };
  return std::all_of(devices_.devices().begin(), devices_.devices().end(), clean);
}

void Group::open_receiver(Done done) {
  if (peer_has_everything()) {
    return receiver_->adopt_as_copy(state_.record().epoch,
                                    [this, receiver = receiver_.get(), done = std::move(done)](const Status& status) {
                                      if (receiver_.get() != receiver) return;
                                      if (!status) return done(status);
                                      open_receiver(done);
                                    });
  }
  receiver_->open([this, receiver = receiver_.get(), done = std::move(done)](const Status& status) {
    if (receiver_.get() != receiver) return;
    receiver_open_ = status.has_value();
    done(status);
  });
}

void Group::close_receiver(Done done) {
  if (receiver_ == nullptr) return parts_.executor.post([done = std::move(done)] { done({}); });
  receiver_open_ = false;
  receiver_->close([this, done = std::move(done)](const Status& status) {
    // Not inside the receiver's own callback.
    parts_.executor.post([this, alive = alive_.token(), status, done] {
      if (!alive()) return;
      receiver_.reset();
      done(status);
    });
  });
}

void Group::prepare_to_follow(uint64_t epoch, Done done) {
  if (sender_ != nullptr) replication_->keep_totals();
  sender_.reset();
  make_receiver();
  // Not known which: what is dirty stays so. It tells whether we are a copy all the same, and what the peer lacks if
  // this side is promoted again.
  if (epoch == 0) return parts_.executor.post([done = std::move(done)] { done({}); });
  receiver_->adopt_as_copy(epoch, std::move(done));
}

void Group::role_changed(Role role) {
  // --detach: nothing is sent until `replicate start` or a migration. Changes are marked nevertheless (that needs no
  // peer), so that only they travel then.
  if (coordinator_->ownership().detach) set_active(false);
  if (role == Role::Primary) {
    devices_.set_tracking_wanted(!record_.peer.empty());
    own_unfinished_copy();
    return close_receiver([this, alive = alive_.token()](const Status&) {
      if (!alive()) return;
      for (TrackedDevice* device : devices_.devices()) {
        device->serve_zeroes(false);
        device->hold_reads(false);
      }
      if (wants_sender()) return start_sender();
      send_hello();
    });
  }
  sender_.reset();
  // Epochs are flowing; a hello in their middle would take the credit away.
  if (std::exchange(rejoining_, false) && receiver_open_) return;
  if (receiver_ == nullptr) make_receiver();
  if (receiver_open_) {
    send_hello();
    return feed_hello();
  }
  open_copy();
}

// Again and again: what keeps it from opening is an error of a disk, and an epoch may be staged that has to go on.
void Group::open_copy() {
  if (receiver_ == nullptr) make_receiver();
  open_receiver([this](const Status& status) {
    if (status) {
      send_hello();
      return feed_hello();
    }
    log::error("volume={} the copy cannot be opened: {}", record_.members.front(), status.error().text);
    retry_timer_.start(kRetryDelay, [this] {
      if (!open_ || receiver_ == nullptr || receiver_open_) return;
      make_receiver();
      open_copy();
    });
  });
}

// An unfinished copy that a guest runs from all the same is no copy of anything any more. With a sender that is
// recorded when it starts; without one a later source would go on with its copy, over the guest's writes.
void Group::own_unfinished_copy() {
  if (wants_sender() || state_.record().quality != CopyQuality::Inconsistent) return;
  ReplicaRecord record;
  record.quality = CopyQuality::Source;
  record.epoch = state_.record().epoch;
  state_.save(record, [name = record_.members.front()](const Status& status) {
    if (!status) log::error("volume={} that it is no copy any more is not saved: {}", name, status.error().text);
  });
}

void Group::set_active(bool active) {
  if (record_.replication.active == active) return;
  record_.replication.active = active;
  if (events_.config_changed) events_.config_changed(record_);
}

bool Group::copy_is_consistent() const {
  // A primary's own data is an image of one moment; so is what was put here and never was anybody's copy.
  const CopyQuality quality = copy_quality();
  return quality == CopyQuality::Consistent || quality == CopyQuality::Source ||
         (quality == CopyQuality::None && record_.peer.empty());
}

CopyQuality Group::copy_quality() const {
  if (receiver_ == nullptr) return state_.record().quality;
  // The receiver knows of a file that is no longer the one of the record, or holds a part of an epoch.
  const ReceiverStatus status = receiver_->status();
  const bool inconsistent = status.quality == CopyQuality::Inconsistent || status.half_applied;
  return inconsistent ? CopyQuality::Inconsistent : state_.record().quality;
}

// --- Link

void Group::set_channel(std::unique_ptr<GroupChannel> channel, GroupRights rights) {
  rights_ = rights;
  if (channel_.connected()) channel_disconnected();
  channel_.set(std::move(channel));
}

Status Group::check_offer(const GroupHello& hello) const {
  return check_volumes(volumes_, hello.volumes);
}

void Group::channel_connected() {
  if (!open_) return;  // open() comes back to it
  hello_sent_ = false;
  peer_hello_.reset();
  hello_accepted_ = false;
  refusal_.reset();
  refused_by_us_ = false;
  // A sender that is not started yet has nothing true to say; its start sends the hello.
  if (sender_ == nullptr || sender_started_) send_hello();
  if (const Bytes stashed = std::exchange(stashed_hello_, {}); !stashed.empty()) handle_hello(stashed);
}

void Group::stash_hello(Bytes payload) {
  if (hello_sent_) return handle_hello(payload);
  stashed_hello_ = std::move(payload);
}

void Group::channel_disconnected() {
  note_apart();
  peer_hello_.reset();
  hello_accepted_ = false;
  hello_sent_ = false;
  if (!open_) return;
  if (sender_ != nullptr) sender_->on_disconnected();
  if (receiver_open_) receiver_->on_disconnected();
  memory_->on_disconnected();
  coordinator_->on_disconnected();
}

void Group::send_hello() {
  if (!channel_.connected()) return;
  GroupHello hello;
  for (const ReplicaVolume& volume : volumes_) hello.volumes.push_back({volume.name, volume.device->size()});
  hello.quality = state_.record().quality;
  hello.lineage = state_.record().lineage;
  hello.epoch = state_.record().epoch;
  if (sender_ != nullptr) sender_->fill_hello(hello);
  if (receiver_open_) receiver_->fill_hello(hello);
  const PeerOwnership ours = coordinator_->hello();
  hello.role = static_cast<uint8_t>(ours.role);
  hello.handover_state = static_cast<uint8_t>(ours.state);
  hello.term = ours.term;
  hello.attempt = ours.attempt;
  hello.wrote = ours.wrote;
  hello.forced = ours.forced;
  hello.split_brain = coordinator_->ownership().split_brain;
  refusal_.reset();  // both sides judge anew
  refused_by_us_ = false;
  channel_.send(TrafficClass::Control, MessageType::GroupHello, encode(hello));
  const bool first = !hello_sent_;
  hello_sent_ = true;
  if (first && peer_hello_) feed_hello();
}

PeerOwnership Group::peer_ownership() const {
  return {.role = static_cast<Role>(peer_hello_->role),
          .state = static_cast<HandoverState>(peer_hello_->handover_state),
          .term = peer_hello_->term,
          .attempt = peer_hello_->attempt,
          .wrote = peer_hello_->wrote,
          .forced = peer_hello_->forced,
          .split_brain = peer_hello_->split_brain};
}

void Group::handle_hello(ByteSpan payload) {
  auto hello = decode_group_hello(payload);
  if (!hello) return refuse_peer(hello.error());
  if (hello->role > static_cast<uint8_t>(Role::Secondary) ||
      hello->handover_state > static_cast<uint8_t>(HandoverState::Superseded)) {
    return refuse_peer(Error{ErrorKind::Corrupt, "hello with an unknown role or state"});
  }
  if (const Status same = check_volumes(volumes_, hello->volumes); !same) return refuse_peer(same.error());
  peer_hello_ = std::move(*hello);
  hello_accepted_ = false;
  hello_given_ = false;
  refusal_.reset();
  feed_hello();
  // The other side drops what we send since we refused it: a hello tells it that this is over.
  if (refused_by_us_ && !refusal_) send_hello();
}

void Group::feed_hello() {
  if (!hello_sent_ || !peer_hello_) return;
  if (!hello_accepted_) {
    if (const Status accepted = coordinator_->on_hello(peer_ownership()); !accepted) {
      return refuse_peer(accepted.error());
    }
    hello_accepted_ = true;
    memory_->on_connected();
  }
  const auto peer_role = static_cast<Role>(peer_hello_->role);
  const Role role = coordinator_->ownership().role;
  if (role == peer_role) return;  // between two changes of role; the next hello tells
  if (role == Role::Primary && peer_hello_->split_brain) {
    // Nothing flows before the operator has decided; then the peer says hello again.
    return finish_accept(fail(ErrorKind::Fenced, "split brain: decide with `vmferry resolve` on both sides first"));
  }
  if (sender_ != nullptr && sender_started_ && role == Role::Primary) {
    if (!hello_given_) {
      // Once per hello: it says how far the copy was then, and the sender knows better since.
      sender_->on_disconnected();
      if (const Status taken = sender_->on_peer_hello(*peer_hello_); !taken) return refuse_peer(taken.error());
      hello_given_ = true;
    }
    finish_accept({});
  }
  if (receiver_open_ && role == Role::Secondary) {
    if (!rights_.replicate_in) {
      return refuse_peer(
          Error{ErrorKind::Denied, fmt::format("peer '{}' has no right replicate-in here", record_.peer)});
    }
    if (const Status taken = receiver_->on_peer_hello(*peer_hello_); !taken) return refuse_peer(taken.error());
    apart_since_.reset();
    rejoin_if_copy();
  }
}

// A superseded primary that holds a copy of what the owner has follows from here on, also when the owner has nothing to
// send for a long time.
void Group::rejoin_if_copy() {
  if (ownership().state != HandoverState::Superseded || ownership().split_brain) return;
  GroupHello ours;
  receiver_->fill_hello(ours);
  const bool copy = ours.quality == CopyQuality::Fuzzy || ours.quality == CopyQuality::Consistent;
  if (!copy || ours.diverged || ours.lineage.is_none() || ours.lineage != peer_hello_->lineage ||
      ours.epoch < peer_hello_->epoch) {
    return;
  }
  rejoining_ = true;
  coordinator_->rejoined();
}

void Group::note_apart() {
  if (!apart_since_) apart_since_ = parts_.executor.now();
}

void Group::note_refusal(const Error& error) {
  note_apart();
  if (events_.event && (!refusal_ || refusal_->text != error.text)) {
    events_.event("peer_refused", {{"volumes", record_.members}, {"peer", record_.peer}, {"reason", error.text}});
  }
  refusal_ = error;
}

void Group::refuse_peer(const Error& error) {
  log::warn("volume={} peer={} refused: {}", record_.members.front(), record_.peer, error.text);
  note_refusal(error);
  refused_by_us_ = true;
  channel_.send(TrafficClass::Control, MessageType::GroupReject,
                encode(GroupReject{.kind = error.kind, .reason = error.text.substr(0, kRejectReasonMax)}));
  if (sender_ != nullptr) sender_->on_disconnected();
  if (receiver_open_) receiver_->on_disconnected();
  finish_accept(tl::unexpected(error));
}

void Group::handle_reject(ByteSpan payload) {
  const auto reject = decode_group_reject(payload);
  const Error error =
      reject ? Error{reject->kind, fmt::format("peer '{}' refuses: {}", record_.peer, reject->reason)} : reject.error();
  log::warn("volume={} {}", record_.members.front(), error.text);
  note_refusal(error);
  if (sender_ != nullptr) {
    sender_->cancel_verify(error);  // it may be what was refused, and is not told that a connection was lost
    sender_->on_disconnected();
  }
  if (receiver_open_) receiver_->on_disconnected();
  finish_accept(tl::unexpected(error));
}

void Group::channel_message(MessageType type, ByteSpan payload) {
  if (!open_) return;
  if (type == MessageType::GroupHello) return handle_hello(payload);
  if (type == MessageType::GroupReject) return handle_reject(payload);
  // Handover messages are about safety and go through even while replication is refused.
  const bool handover = type >= MessageType::Prepare;
  if (refusal_ && !handover) return;
  if (const Status taken = route(type, payload); !taken) refuse_peer(taken.error());
}

Status Group::route(MessageType type, ByteSpan payload) {
  switch (type) {
    case MessageType::SourceState:
      return receiver_open_ ? receiver_->on_message(type, payload) : Status{};
    case MessageType::EpochBegin:
      if (receiver_open_) set_active(true);  // after a --detach the primary has begun again
      [[fallthrough]];
    case MessageType::EpochData:
    case MessageType::EpochEnd:
      return receiver_open_ ? receiver_->on_message(type, payload) : Status{};
    case MessageType::VerifyRequest:
      if (!rights_.verify) return fail(ErrorKind::Denied, "peer '{}' has no right verify here", record_.peer);
      return receiver_open_ ? receiver_->on_message(type, payload) : Status{};
    case MessageType::EpochSegmentAck:
    case MessageType::EpochAck:
    case MessageType::EpochResend:
    case MessageType::Credit:
    case MessageType::VerifyReply:
      return sender_ != nullptr ? sender_->on_message(type, payload) : Status{};
    case MessageType::EpochAbandon:
      if (receiver_open_) return receiver_->on_message(type, payload);
      return sender_ != nullptr ? sender_->on_message(type, payload) : Status{};
    case MessageType::MemoryData:
    case MessageType::MemoryEnd:
    case MessageType::MemoryAck:
      memory_->on_message(type, payload);
      return {};
    case MessageType::Prepare:
      if (!rights_.migrate_in) return fail(ErrorKind::Denied, "peer '{}' has no right migrate-in here", record_.peer);
      return coordinator_->on_message(type, payload);
    default:
      return coordinator_->on_message(type, payload);
  }
}

void Group::channel_writable(TrafficClass traffic) {
  if (!open_) return;
  if (traffic == TrafficClass::Memory) return memory_->on_writable();
  if (sender_ != nullptr) sender_->on_writable(traffic);
}

}  // namespace vmferry
