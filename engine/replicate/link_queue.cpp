// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/link_queue.h"

#include <algorithm>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

constexpr size_t kMemory = lane_of(TrafficClass::Memory);
constexpr size_t kBulk = lane_of(TrafficClass::Bulk);
static_assert(kTrafficClassCount == kFrameLaneCount);

void append_part(ByteSpan part, size_t from, size_t size, Bytes& out) {
  const ByteSpan piece = part.subspan(from, size);
  out.insert(out.end(), piece.begin(), piece.end());
}

}  // namespace

void LinkQueue::push(TrafficClass traffic, MessageType type, const std::optional<Id128>& group, Bytes payload) {
  Message message{.type = type, .group = {}, .payload = std::move(payload), .sent = 0};
  if (group) message.group.assign(group->bytes.begin(), group->bytes.end());
  VF_ASSERT(message.size() <= kFramePayloadSizeMax);
  Lane& lane = lanes_[lane_of(traffic)];
  if (lane.messages.empty() && (traffic == TrafficClass::Memory || traffic == TrafficClass::Bulk)) {
    // A lane that was idle has no claim to the bandwidth that it did not use.
    lane.served = std::max(lane.served, lanes_[traffic == TrafficClass::Memory ? kBulk : kMemory].served);
  }
  lane.bytes += message.size();
  lane.messages.push_back(std::move(message));
}

std::optional<size_t> LinkQueue::next_lane(bool control_only) const {
  for (const TrafficClass strict : {TrafficClass::Control, TrafficClass::Urgent}) {
    if (!lanes_[lane_of(strict)].messages.empty()) return lane_of(strict);
    if (control_only) return std::nullopt;
  }
  const bool memory = !lanes_[kMemory].messages.empty();
  const bool bulk = !lanes_[kBulk].messages.empty();
  if (memory && bulk) return lanes_[kMemory].served <= lanes_[kBulk].served ? kMemory : kBulk;
  if (memory) return kMemory;
  if (bulk) return kBulk;
  return std::nullopt;
}

void LinkQueue::append_fragment(size_t lane_number, size_t space, Bytes& out) {
  Lane& lane = lanes_[lane_number];
  Message& message = lane.messages.front();
  const size_t left = message.size() - message.sent;
  const size_t size = std::min(left, space - kFrameHeaderSize);
  append_frame_header(
      {.type = message.type, .critical = true, .continues = size < left, .lane = static_cast<uint8_t>(lane_number)},
      size, out);
  const size_t from_group =
      message.sent < message.group.size() ? std::min(size, message.group.size() - message.sent) : 0;
  if (from_group > 0) append_part(message.group, message.sent, from_group, out);
  append_part(message.payload, message.sent + from_group - message.group.size(), size - from_group, out);
  message.sent += size;
  lane.bytes -= size;
  const uint64_t weight = lane_number == kMemory ? weights_.memory : lane_number == kBulk ? weights_.bulk : 1;
  lane.served += size / std::max<uint64_t>(weight, 1);
  if (message.sent == message.size()) lane.messages.pop_front();
}

void LinkQueue::fill(Bytes& out, size_t size_max, bool control_only) {
  while (const auto lane = next_lane(control_only)) {
    const size_t space = size_max - std::min(size_max, out.size());
    const Message& message = lanes_[*lane].messages.front();
    const size_t left = message.size() - message.sent;
    // Nothing smaller than kFragmentMin is cut off, so that headers stay a small part of the stream.
    if (space < std::min(left + kFrameHeaderSize, kFragmentMin)) return;
    append_fragment(*lane, space, out);
  }
}

bool LinkQueue::empty() const {
  return std::all_of(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return lane.messages.empty(); });
}

void LinkQueue::clear() {
  for (Lane& lane : lanes_) {
    lane.messages.clear();
    lane.bytes = 0;
  }
}

}  // namespace vmferry
