// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/epoch_apply.h"

#include <utility>

namespace vmferry {

namespace {

// One zero request covers at most this much, so that a store without holes is not asked for hours of work at once.
constexpr uint64_t kZeroStep = 256U << 20;

// Counts completions; the last one reports the first error.
struct Joint {
  size_t pending = 1;  // one for the submitter
  Errno error = 0;
  std::function<void(Errno)> done;

  void complete(Errno result) {
    if (error == 0) error = result;
    if (--pending == 0) std::exchange(done, nullptr)(error);
  }
};

}  // namespace

Status check_runs(const std::vector<FrameRun>& runs, const std::vector<ReplicaVolume>& volumes) {
  for (const auto& run : runs) {
    const bool reference = run.kind == RunKind::Reference;
    if (run.volume >= volumes.size() || (reference && run.source_volume >= volumes.size())) {
      return fail(ErrorKind::Corrupt, "data frame for volume {} of {}", std::max(run.volume, run.source_volume),
                  volumes.size());
    }
    const uint64_t size = volumes[run.volume].device->size();
    if (!fits_in(run.range.offset, run.range.length, size)) {
      return fail(ErrorKind::Corrupt, "data frame for {} bytes at {} of volume '{}', which has {}", run.range.length,
                  run.range.offset, volumes[run.volume].name, size);
    }
    if (reference && !fits_in(run.source_offset, run.range.length, volumes[run.source_volume].device->size())) {
      return fail(ErrorKind::Corrupt, "data frame refers to {} bytes at {} of volume '{}'", run.range.length,
                  run.source_offset, volumes[run.source_volume].name);
    }
  }
  return {};
}

void write_runs(Executor& executor, const std::vector<ReplicaVolume>& volumes, const FrameBody& body,
                std::function<void(Errno)> done) {
  auto joint = std::make_shared<Joint>();
  joint->done = std::move(done);
  const auto complete = [joint](Errno error) { joint->complete(error); };
  size_t literal_at = 0;
  for (const auto& run : body.runs) {
    BlockDevice& store = volumes[run.volume].device->store();
    if (run.kind == RunKind::Literal) {
      ++joint->pending;
      write_block(store, run.range.offset, body.literals.data() + literal_at, run.range.length, false, complete);
      literal_at += run.range.length;
      continue;
    }
    if (run.kind == RunKind::Reference) continue;
    for (uint64_t at = run.range.offset; at < run.range.end(); at += kZeroStep) {
      ++joint->pending;
      zero_block(store, {at, std::min(kZeroStep, run.range.end() - at)}, true, complete);
    }
  }
  executor.post([joint] { joint->complete(0); });
}

void flush_stores(Executor& executor, const std::vector<ReplicaVolume>& volumes, std::function<void(Errno)> done) {
  auto joint = std::make_shared<Joint>();
  joint->done = std::move(done);
  for (const auto& volume : volumes) {
    ++joint->pending;
    flush_block(volume.device->store(), [joint](Errno error) { joint->complete(error); });
  }
  executor.post([joint] { joint->complete(0); });
}

void EpochApply::run(Executor& executor, StagingArea& staging, const std::vector<ReplicaVolume>& volumes,
                     Alive::Token alive, Done done) {
  std::shared_ptr<EpochApply> apply(new EpochApply(executor, staging, volumes, std::move(alive), std::move(done)));
  apply->pump();
}

void EpochApply::pump() {
  while (status_ && in_flight_ < kInFlightMax && next_ < staging_.records().size()) {
    ++in_flight_;
    const StagedRecord record = staging_.records()[next_++];
    staging_.read(record, [self = shared_from_this(), record](Result<std::shared_ptr<StagingArea::Content>> content) {
      if (!content) return self->finish_one(tl::unexpected<Error>(content.error()));
      const auto& runs = (*content)->body.runs;
      if (const Status checked = check_runs(runs, self->volumes_); !checked) return self->finish_one(checked);
      write_runs(self->executor_, self->volumes_, (*content)->body, [self, content = *content, record](Errno error) {
        self->finish_one(error == 0 ? Status{}
                                    : fail(ErrorKind::Io, "apply frame {}: {}", record.frame.frame, errno_text(error)));
      });
    });
  }
  if (in_flight_ > 0) return;
  if (!status_) return std::exchange(done_, nullptr)(status_);
  flush_stores(executor_, volumes_, [self = shared_from_this()](Errno error) {
    if (!self->alive_()) return;
    std::exchange(self->done_,
                  nullptr)(error == 0 ? Status{} : fail(ErrorKind::Io, "flush the volumes: {}", errno_text(error)));
  });
}

void EpochApply::finish_one(Status status) {
  if (!alive_()) return;
  --in_flight_;
  if (status_ && !status) status_ = std::move(status);
  pump();
}

}  // namespace vmferry
