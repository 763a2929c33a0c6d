// SPDX-License-Identifier: Apache-2.0
#include "engine/delta/session_index.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace vmferry::delta {

SessionIndex::SessionIndex(uint64_t bytes_max, uint64_t group_bytes) {
  constexpr uint64_t kSetSize = kWays * (sizeof(ContentSlot) + sizeof(PlaceSlot));
  const uint64_t blocks = div_up(group_bytes, kDedupBlockSize);
  const uint64_t sets_wanted = std::bit_ceil(std::max<uint64_t>(div_up(blocks, kWays), 1));
  const uint64_t sets_allowed = std::bit_floor(std::max<uint64_t>(bytes_max / kSetSize, 1));
  const size_t sets = static_cast<size_t>(std::min(sets_wanted, sets_allowed));
  set_mask_ = sets - 1;
  contents_.resize(sets * kWays);
  places_.resize(sets * kWays);
}

size_t SessionIndex::memory_bytes() const {
  return contents_.size() * sizeof(ContentSlot) + places_.size() * sizeof(PlaceSlot);
}

// Consecutive blocks fall into consecutive sets, so a table as large as the group holds every block of it.
size_t SessionIndex::place_set(BlockPlace place) const noexcept {
  const uint64_t mixed = place.value() + uint64_t{place.volume()} * 0x9e3779b97f4a7c15U;
  return (mixed & set_mask_) * kWays;
}

const SessionIndex::PlaceSlot* SessionIndex::place_slot(BlockPlace place) const noexcept {
  const size_t set = place_set(place);
  for (size_t i = set; i < set + kWays; ++i) {
    if (places_[i].content != kZeroFingerprint && places_[i].place == place) return &places_[i];
  }
  return nullptr;
}

SessionIndex::PlaceSlot* SessionIndex::place_slot(BlockPlace place) noexcept {
  return const_cast<PlaceSlot*>(std::as_const(*this).place_slot(place));
}

void SessionIndex::record(BlockPlace place, Fingerprint content, uint64_t frame) noexcept {
  PlaceSlot* slot = place_slot(place);
  if (content == kZeroFingerprint) {
    if (slot != nullptr) *slot = {};
    return;
  }
  if (slot == nullptr) {
    const size_t set = place_set(place);
    slot = &places_[set + turn_ % kWays];
    for (size_t i = set; i < set + kWays; ++i) {
      if (places_[i].content == kZeroFingerprint) slot = &places_[i];
    }
    ++turn_;
  }
  *slot = {place, content, frame};

  const size_t set = content_set(content);
  ContentSlot* target = &contents_[set + turn_ % kWays];
  for (size_t i = set; i < set + kWays; ++i) {
    if (contents_[i].content == content) {
      // A place that still holds it stays: the older one is the likelier beginning of a long run.
      const auto held = sent(contents_[i].place);
      if (held && held->content == content) return;
      target = &contents_[i];
      break;
    }
    if (contents_[i].content == kZeroFingerprint) target = &contents_[i];
  }
  *target = {content, place};
}

bool SessionIndex::learn(BlockPlace place, Fingerprint content) noexcept {
  if (content == kZeroFingerprint || place_slot(place) != nullptr) return false;
  const size_t places = place_set(place);
  PlaceSlot* free_place = nullptr;
  for (size_t i = places; i < places + kWays && free_place == nullptr; ++i) {
    if (places_[i].content == kZeroFingerprint) free_place = &places_[i];
  }
  if (free_place == nullptr) return false;
  const size_t contents = content_set(content);
  ContentSlot* free_content = nullptr;
  bool known = false;
  for (size_t i = contents; i < contents + kWays; ++i) {
    ContentSlot& slot = contents_[i];
    const PlaceSlot* held = slot.content == kZeroFingerprint ? nullptr : place_slot(slot.place);
    const bool holds = held != nullptr && held->content == slot.content;
    if (!holds) free_content = &slot;
    known = known || (holds && slot.content == content);
  }
  if (!known && free_content == nullptr) return false;
  *free_place = {place, content, 0};
  if (!known) *free_content = {content, place};
  return true;
}

void SessionIndex::forget(uint16_t volume, ByteRange range) noexcept {
  const uint64_t blocks = div_up(range.length, kDedupBlockSize);
  if (blocks <= places_.size()) {
    BlockPlace place(volume, range.offset);
    for (uint64_t i = 0; i < blocks; ++i, place = place.next()) record(place, kZeroFingerprint, 0);
    return;
  }
  for (auto& slot : places_) {
    if (slot.place.volume() == volume && slot.place.offset() >= range.offset && slot.place.offset() < range.end()) {
      slot = {};
    }
  }
}

std::optional<SessionIndex::Found> SessionIndex::find(Fingerprint content) const noexcept {
  if (content == kZeroFingerprint) return std::nullopt;
  const size_t set = content_set(content);
  for (size_t i = set; i < set + kWays; ++i) {
    if (contents_[i].content != content) continue;
    const auto held = sent(contents_[i].place);
    if (held && held->content == content) return Found{contents_[i].place, held->frame};
  }
  return std::nullopt;
}

std::optional<SessionIndex::Sent> SessionIndex::sent(BlockPlace place) const noexcept {
  const PlaceSlot* slot = place_slot(place);
  if (slot == nullptr) return std::nullopt;
  return Sent{slot->content, slot->frame};
}

void SessionIndex::drop_after(uint64_t frame) noexcept {
  for (auto& slot : places_) {
    if (slot.frame > frame) slot = {};
  }
}

void SessionIndex::clear() noexcept {
  std::fill(places_.begin(), places_.end(), PlaceSlot{});
  std::fill(contents_.begin(), contents_.end(), ContentSlot{});
}

}  // namespace vmferry::delta
