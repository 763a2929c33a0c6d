// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/sender_verify.h"

#include "engine/replicate/sender_impl.h"

namespace vmferry {

namespace {

constexpr uint64_t kRangeSize = 32U << 20;
constexpr uint32_t kPieceSize = 1U << 20;
constexpr uint32_t kAttemptsMax = 8;
constexpr size_t kDifferencesMax = 10'000;
// How long a peer may be in trouble, or say nothing, before the verification is given up: it holds up nothing, but
// somebody waits for it.
constexpr Nanoseconds kTroubleMax = 30 * kSecond;
constexpr Nanoseconds kSilenceMax = 120 * kSecond;

}  // namespace

void VerifyRun::next_range() {
  if (!again.empty()) {
    item = again.back();
    again.pop_back();
  } else {
    while (volume_next < env.volumes.size() && offset_next >= env.volumes[volume_next].device->size()) {
      ++volume_next;
      offset_next = 0;
    }
    if (volume_next == env.volumes.size()) return finish(std::move(differences));
    const uint64_t size = env.volumes[volume_next].device->size();
    item = {volume_next, {offset_next, std::min(kRangeSize, size - offset_next)}, 0};
    offset_next = item.range.end();
  }
  ask_again();
}

// The copy's digests are of its last applied epoch; with nothing written since, that is what our blocks hold now.
void VerifyRun::ask_again() {
  step = Step::Copy;
  since = env.executor.now();
  env.wait_in_sync([self = shared_from_this()](Status status) {
    if (self->over) return;
    if (!status) return self->finish(tl::unexpected<Error>(status.error()));
    TrackedDevice& device = *self->env.volumes[self->item.volume].device;
    self->mutations = device.mutation_counter();
    self->quiet = device.mutations_in_flight() == 0 && device.dirty_bytes() == 0;
    self->ours.clear();
    self->theirs.clear();
    self->ours_done = self->theirs_done = false;
    self->step = Step::Digests;
    self->since = self->env.executor.now();
    self->request = {
        .id = ++self->id_last, .volume = self->item.volume, .range = self->item.range, .piece_size = kPieceSize};
    self->env.ask(self->request);
    self->hash_ours(self->item.range.offset);
  });
}

void VerifyRun::hash_ours(uint64_t at) {
  if (over) return;
  if (at >= item.range.end()) {
    ours_done = true;
    return compare();
  }
  buffer.resize(std::min<uint64_t>(kPieceSize, item.range.end() - at));
  read_block(env.volumes[item.volume].device->store(), at, buffer.data(), buffer.size(),
             [self = shared_from_this(), at](Errno error) {
               if (!self->env.alive() || self->over) return;
               if (error != 0) return self->finish(fail(ErrorKind::Io, "read at {}: {}", at, errno_text(error)));
               self->env.executor.offload([self] { self->ours.push_back(sha256(self->buffer)); },
                                          [self, at] {
                                            if (self->env.alive()) self->hash_ours(at + self->buffer.size());
                                          });
             });
}

void VerifyRun::on_reply(const VerifyReply& reply) {
  if (over || reply.id != request.id || theirs_done) return;
  if (!reply.error.empty()) {
    return finish(tl::unexpected<Error>(Error{reply.error_kind, "at the peer: " + reply.error}));
  }
  if (reply.digests.size() != div_up(item.range.length, kPieceSize)) {
    return finish(fail(ErrorKind::Corrupt, "the peer answered {} digests", reply.digests.size()));
  }
  theirs = reply.digests;
  theirs_done = true;
  compare();
}

void VerifyRun::compare() {
  if (!ours_done || !theirs_done) return;
  TrackedDevice& device = *env.volumes[item.volume].device;
  const bool at_rest = quiet && device.mutation_counter() == mutations;
  for (size_t i = 0; i < ours.size(); ++i) {
    if (ours[i] == theirs[i]) continue;
    const uint64_t offset = item.range.offset + i * uint64_t{kPieceSize};
    const ByteRange piece{offset, std::min<uint64_t>(kPieceSize, item.range.end() - offset)};
    if (!at_rest && item.attempts < kAttemptsMax) {
      again.push_back({item.volume, piece, item.attempts + 1});
      continue;
    }
    if (!at_rest) {
      return finish(fail(ErrorKind::Busy, "{} bytes at {} of volume '{}' are written too often to be compared",
                         piece.length, piece.offset, env.volumes[item.volume].name));
    }
    if (differences.size() < kDifferencesMax) differences.push_back({item.volume, piece});
  }
  if (item.attempts == 0) compared += item.range.length;
  next_range();
}

void VerifyRun::fail_with_reason(const Error& error) {
  if (!over) finish(tl::unexpected<Error>(error));
}

void VerifyRun::finish(Result<std::vector<VerifyDifference>> result) {
  over = true;
  // The owner lets go of this object in the callback.
  const auto keep = shared_from_this();
  const auto finished = std::move(env.finished);
  finished(std::move(result));
}

uint64_t Sender::Impl::verified_bytes() const {
  return verify_ ? verify_->compared_bytes() : 0;
}

Status Sender::Impl::verify_can_go_on() const {
  if (!connected_) return fail(ErrorKind::Unavailable, "the peer is not connected");
  if (paused_ && !all_acknowledged()) {
    return fail(ErrorKind::Unavailable,
                "replication is paused and the copy lacks {} bytes, so that both sides differ; `vmferry replicate "
                "resume` first",
                remaining_bytes());
  }
  return {};
}

// Nothing else ends a wait for a copy that does not get on.
void Sender::Impl::look_after_verify() {
  if (!verify_) return;
  const Nanoseconds waited = executor_.now() - verify_->step_since();
  if (verify_->waits_for_copy()) {
    const Status possible = verify_can_go_on();
    if (!possible) return verify_->fail_with_reason(possible.error());
    if (degraded_ && waited > kTroubleMax) {
      verify_->fail_with_reason({ErrorKind::Unavailable, fmt::format("the copy does not get on: {}", refusal_)});
    }
  } else if (verify_->waits_for_digests() && waited > kSilenceMax) {
    verify_->fail_with_reason({ErrorKind::Timeout, "the peer does not answer"});
  }
}

void Sender::cancel_verify(const Error& why) {
  if (impl_->verify_) impl_->verify_->fail_with_reason(why);
}

void Sender::verify(std::function<void(Result<std::vector<VerifyDifference>>)> done) {
  Status possible = impl_->verify_can_go_on();
  if (impl_->verify_) possible = fail(ErrorKind::Busy, "a verification is under way");
  if (!possible) {
    return impl_->executor_.post([alive = impl_->alive_.token(), done = std::move(done), possible] {
      if (alive()) done(tl::unexpected<Error>(possible.error()));
    });
  }
  Impl& impl = *impl_;
  impl.verify_ = std::make_shared<VerifyRun>(
      VerifyRun::Environment{.executor = impl.executor_,
                             .volumes = impl.volumes_,
                             .alive = impl.alive_.token(),
                             .wait_in_sync =
                                 [&impl](Done ready) {
                                   impl.waiters_.push_back({0, std::move(ready)}), impl.pump_soon();
                                 },
                             .ask =
                                 [&impl](const VerifyRequest& request) {
                                   impl.send(TrafficClass::Control, MessageType::VerifyRequest, request);
                                 },
                             .finished =
                                 [&impl, done = std::move(done)](Result<std::vector<VerifyDifference>> result) {
                                   impl.verify_.reset();
                                   done(std::move(result));
                                 }});
  impl.verify_->start();
}

}  // namespace vmferry
