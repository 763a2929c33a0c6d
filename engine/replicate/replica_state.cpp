// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/replica_state.h"

#include <utility>

namespace vmferry {

namespace {

constexpr DurableRecordPlace kPlace{.offset = 0, .slot_size = 4096, .kind = record_kind("REPL"), .version = 1};

}  // namespace

Bytes encode(const ReplicaRecord& record) {
  Bytes out;
  ByteWriter(out)
      .u8(static_cast<uint8_t>(record.quality))
      .raw(record.lineage.bytes)
      .le64(record.epoch)
      .le64(record.quality_epoch)
      .raw(record.final_attempt.bytes)
      .raw(record.session.bytes);
  return out;
}

Result<ReplicaRecord> decode_replica_record(ByteSpan payload) {
  ByteReader reader(payload);
  ReplicaRecord record;
  const uint8_t quality = reader.u8();
  reader.copy_to(record.lineage.bytes);
  record.epoch = reader.le64();
  record.quality_epoch = reader.le64();
  reader.copy_to(record.final_attempt.bytes);
  reader.copy_to(record.session.bytes);
  if (!reader.done() || quality > static_cast<uint8_t>(CopyQuality::Consistent)) {
    return fail(ErrorKind::Corrupt, "replica record of {} bytes is malformed", payload.size());
  }
  record.quality = static_cast<CopyQuality>(quality);
  return record;
}

ReplicaState::ReplicaState(BlockDevice& staging) : durable_(staging, kPlace) {}

void ReplicaState::open(Done done) {
  durable_.load([this, done = std::move(done)](Result<std::optional<Bytes>> loaded) {
    if (!loaded) return done(fail_with(loaded.error(), "replica record"));
    if (*loaded) {
      auto record = decode_replica_record(**loaded);
      if (!record) return done(tl::unexpected<Error>(record.error()));
      record_ = *record;
    }
    done({});
  });
}

void ReplicaState::save(const ReplicaRecord& record, Done done) {
  const ReplicaRecord before = std::exchange(record_, record);
  durable_.save(encode(record), [this, before, record, done = std::move(done)](Status status) {
    if (!status && record_ == record) record_ = before;
    done(std::move(status));
  });
}

Status check_volumes(const std::vector<ReplicaVolume>& ours, const std::vector<GroupHello::Volume>& theirs) {
  if (ours.size() != theirs.size()) {
    return fail(ErrorKind::Mismatch, "the group has {} volumes here and {} at the peer", ours.size(), theirs.size());
  }
  for (size_t i = 0; i < ours.size(); ++i) {
    if (ours[i].name != theirs[i].name) {
      return fail(ErrorKind::Mismatch, "volume {} of the group is '{}' here and '{}' at the peer", i + 1, ours[i].name,
                  theirs[i].name);
    }
    if (ours[i].device->size() != theirs[i].size) {
      return fail(ErrorKind::Mismatch, "volume '{}' has {} bytes here and {} at the peer", ours[i].name,
                  ours[i].device->size(), theirs[i].size);
    }
  }
  return {};
}

}  // namespace vmferry
