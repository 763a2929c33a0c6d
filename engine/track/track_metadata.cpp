// SPDX-License-Identifier: Apache-2.0
#include "engine/track/track_metadata.h"

#include <algorithm>

#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

using namespace track;

namespace {

constexpr DurableRecordPlace kSuperblockPlace{.offset = kSuperblockOffset,
                                              .slot_size = kSuperblockSlotSize,
                                              .kind = record_kind("TRKS"),
                                              .version = kSuperblockVersion};

Status io_status(Errno error, std::string_view what) {
  if (error == 0) return {};
  return fail(ErrorKind::Io, "{}: {}", what, errno_text(error));
}

}  // namespace

TrackMetadata::TrackMetadata(Executor& executor, BlockDevice& store, BlockDevice& metadata, EpochTracker& epochs,
                             const TrackOptions& options)
    : executor_(executor),
      metadata_(metadata),
      epochs_(epochs),
      options_(options),
      record_(metadata, kSuperblockPlace),
      bitmap_(executor, store, metadata, epochs),
      log_(executor, metadata, bitmap_, options.region_size, options.idle_interval),
      save_timer_(executor) {
  superblock_.block_size = options.block_size;
  superblock_.region_size = options.region_size;
  superblock_.slot_count = std::clamp(options.active_regions_max, kSlotCountMin, kSlotCountMax);
}

void TrackMetadata::open(uint64_t store_size, Done done) {
  record_.load([this, store_size, done = std::move(done)](Result<std::optional<Bytes>> loaded) mutable {
    if (!loaded) {
      if (loaded.error().kind != ErrorKind::Corrupt) return done(fail_with(loaded.error(), "tracking metadata"));
      return begin_whole_dirty(store_size, "the tracking superblock is damaged", std::move(done));
    }
    if (!*loaded) {
      if (options_.metadata_size_found) {
        return begin_whole_dirty(store_size, "the tracking metadata was lost", std::move(done));
      }
      outcome_ = OpenOutcome::New;
      return done({});
    }
    const auto superblock = decode_superblock(**loaded);
    if (!superblock) return begin_whole_dirty(store_size, superblock.error().text, std::move(done));
    superblock_ = *superblock;
    outcome_ = OpenOutcome::Clean;
    if (!superblock_.active) return done({});
    if (is_cut_off()) {
      // Zeroes in place of its last pages would say that nothing is dirty there.
      return begin_whole_dirty(store_size, "the tracking metadata was cut off", std::move(done));
    }
    restore(store_size, std::move(done));
  });
}

bool TrackMetadata::is_cut_off() const {
  const uint64_t needed = TrackedDevice::metadata_size(superblock_.tracked_size, superblock_.block_size);
  return options_.metadata_size_found && *options_.metadata_size_found < needed;
}

// Decides whether the saved state belongs to this store, then loads it.
void TrackMetadata::restore(uint64_t store_size, Done done) {
  const StoreStamp now = stamp();
  if (superblock_.block_size != options_.block_size || superblock_.region_size != options_.region_size) {
    return begin_whole_dirty(store_size, "the block or region size of tracking was changed", std::move(done));
  }
  if (store_size != superblock_.tracked_size && store_size != superblock_.tracked_size_previous) {
    return begin_whole_dirty(store_size, "the store has another size", std::move(done));
  }
  if (now.identity != superblock_.stamp.identity) {
    return begin_whole_dirty(store_size, "the store is another one", std::move(done));
  }
  if (superblock_.clean && now != superblock_.stamp) {
    return begin_whole_dirty(store_size, "the store was changed while the volume was not open", std::move(done));
  }
  if (superblock_.tracked_size > epochs_.open_map().device_size()) epochs_.grow(superblock_.tracked_size);
  bitmap_.load(superblock_.bitmap_generation, superblock_.tracked_size, superblock_.baseline,
               [this, done = std::move(done)](Errno error) mutable {
                 if (error != 0) return done(io_status(error, "read saved bitmap"));
                 if (!superblock_.clean) return recover_active_regions(std::move(done));
                 // Unclean from here on, durably, before the first write can come.
                 Superblock next = superblock_;
                 next.clean = false;
                 ++next.log_generation;
                 next.slot_count = std::clamp(options_.active_regions_max, kSlotCountMin, kSlotCountMax);
                 save_superblock(next, [this, done = std::move(done)](Status status) {
                   if (!status) return done(status);
                   log_.start_generation(superblock_.log_generation, superblock_.slot_count, superblock_.tracked_size);
                   done({});
                 });
               });
}

void TrackMetadata::recover_active_regions(Done done) {
  auto ring = std::make_shared<Bytes>(kTransactionSize * kTransactionCount);
  read_block(
      metadata_, kLogOffset, ring->data(), ring->size(),
      [this, ring, alive = alive_.token(), done = std::move(done)](Errno error) mutable {
        if (!alive()) return;
        if (error != 0) return done(io_status(error, "read activity log"));
        const auto recovered = recover_log(*ring, superblock_.log_generation, superblock_.slot_count);
        if (!recovered) return begin_whole_dirty(superblock_.tracked_size, recovered.error().text, std::move(done));
        outcome_ = OpenOutcome::Recovered;
        log_.resume_generation(superblock_.log_generation, *recovered, superblock_.tracked_size);
        for (const uint64_t region : log_.active_regions()) {
          const uint64_t offset = region * options_.region_size;
          const ByteRange range{offset, std::min<uint64_t>(options_.region_size, superblock_.tracked_size - offset)};
          epochs_.mark(range);
          bitmap_.note_marked(range);
        }
        log::info("volume={} tracking=recovered active_regions={} dirty_bytes={}", options_.name,
                  log_.active_regions().size(), epochs_.open_bytes());
        done({});
      });
}

void TrackMetadata::begin_whole_dirty(uint64_t store_size, std::string_view reason, Done done) {
  log::warn("volume={} tracking=wholly-dirty reason=\"{}\"", options_.name, reason);
  outcome_ = OpenOutcome::WholeDirty;
  activate(store_size, Baseline::Dirty, std::move(done));
}

void TrackMetadata::stop_timers() noexcept {
  save_timer_.cancel();
  log_.stop();
}

void TrackMetadata::when_idle(std::function<void()> action) {
  if (bitmap_.idle() && log_.idle()) return action();
  // A flush takes as long as what is under way there, so that this is no busy loop.
  flush_block(metadata_, [this, alive = alive_.token(), action = std::move(action)](Errno) mutable {
    if (alive()) when_idle(std::move(action));
  });
}

void TrackMetadata::activate(uint64_t store_size, Baseline baseline, Done done) {
  stop_timers();
  when_idle([this, store_size, baseline, done = std::move(done)]() mutable {
    Superblock next = superblock_;
    next.active = true;
    next.clean = false;
    next.baseline = baseline;
    next.block_size = options_.block_size;
    next.region_size = options_.region_size;
    next.slot_count = std::clamp(options_.active_regions_max, kSlotCountMin, kSlotCountMax);
    next.tracked_size = store_size;
    next.tracked_size_previous = store_size;
    // A damaged superblock tells no generation: then one is taken that no earlier page or transaction can have.
    const uint64_t fresh = outcome_ == OpenOutcome::WholeDirty ? static_cast<uint64_t>(executor_.wall_now()) : 0;
    next.bitmap_generation = std::max(superblock_.bitmap_generation + 1, fresh);
    next.log_generation = std::max(superblock_.log_generation + 1, fresh);
    next.stamp = stamp();
    save_superblock(next, [this, done = std::move(done)](Status status) mutable {
      if (!status) return done(status);
      // Pages may have been saved meanwhile; they are of the earlier generation and void.
      when_idle([this, done = std::move(done)] {
        start_generations();
        done({});
      });
    });
  });
}

void TrackMetadata::start_generations() {
  const uint64_t size = superblock_.tracked_size;
  stop_timers();
  if (epochs_.open_map().device_size() < size) epochs_.grow(size);
  epochs_.reset();
  bitmap_.start_generation(superblock_.bitmap_generation, size);
  log_.start_generation(superblock_.log_generation, superblock_.slot_count, size);
  if (superblock_.baseline == Baseline::Dirty && size != 0) epochs_.mark({0, size});
}

void TrackMetadata::deactivate(Done done) {
  stop_timers();
  when_idle([this, done = std::move(done)]() mutable {
    Superblock next = superblock_;
    next.active = false;
    next.clean = false;
    save_superblock(next, [this, done = std::move(done)](Status status) {
      if (status) epochs_.reset();
      done(status);
    });
  });
}

void TrackMetadata::grow(uint64_t new_size, Done done) {
  VF_ASSERT(new_size >= superblock_.tracked_size);
  when_idle([this, new_size, done = std::move(done)]() mutable {
    if (!fits_in(kBitmapOffset, SavedBitmap::page_count(new_size, options_.block_size) * kPageSize, metadata_.size())) {
      return done(fail(ErrorKind::LimitExceeded, "tracking metadata of {} bytes is too small for a volume of {}",
                       metadata_.size(), new_size));
    }
    // The new pages are written as clean before the superblock counts them, so the baseline never speaks for them.
    bitmap_.grow(new_size);
    log_.grow(new_size);
    bitmap_.save_all([this, new_size, done = std::move(done)](Errno error) mutable {
      if (error != 0) return done(io_status(error, "write saved bitmap"));
      Superblock next = superblock_;
      next.tracked_size_previous = superblock_.tracked_size;
      next.tracked_size = new_size;
      save_superblock(next, std::move(done));
    });
  });
}

void TrackMetadata::save_dirty(Done done) {
  bitmap_.save_all([done = std::move(done)](Errno error) { done(io_status(error, "write saved bitmap")); });
}

void TrackMetadata::close(Done done) {
  stop_timers();
  if (!active()) return done({});
  when_idle([this, done = std::move(done)]() mutable {
    bitmap_.save_all([this, done = std::move(done)](Errno error) mutable {
      if (error != 0) return done(io_status(error, "write saved bitmap"));
      Superblock next = superblock_;
      next.clean = true;
      next.stamp = stamp();
      save_superblock(next, std::move(done));
    });
  });
}

void TrackMetadata::save_superblock(const Superblock& next, Done done) {
  record_.save(encode(next), [this, next, done = std::move(done)](Status status) {
    if (!status) return done(fail_with(status.error(), "tracking superblock"));
    superblock_ = next;
    done({});
  });
}

// Acknowledged blocks leave the saved bitmap after a while, so that a crash does not send them again for ever.
void TrackMetadata::note_cleared(ByteRange range) {
  if (!active()) return;
  bitmap_.note_cleared(range);
  if (save_timer_.running()) return;
  save_timer_.start(options_.save_interval, [this] {
    if (!active()) return;
    bitmap_.save_all([this](Errno error) {
      if (error != 0) log::warn("volume={} error=\"write saved bitmap: {}\"", options_.name, errno_text(error));
    });
  });
}

}  // namespace vmferry
