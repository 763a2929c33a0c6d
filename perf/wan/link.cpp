// SPDX-License-Identifier: Apache-2.0
#include "perf/wan/link.h"

#include <algorithm>

#include "engine/base/assert.h"

namespace vmferry::wan {
namespace {

// Segments of one super-packet that leave within this time are handed over together. The first of them is late by at
// most this much; 21 segments of 1500 bytes at 1 Gbit/s, three at 100 Mbit/s. Twice as long saves little more CPU (15
// instead of 18 % of a core at 100 Mbit/s, 200 us needs 23 %) and would use up the half millisecond that is promised.
constexpr Nanoseconds kRunTimeMax = 250 * kMicrosecond;

// Memory for packets on the way, per direction.
constexpr uint64_t kInFlightBytesMax = 1_GiB;

// Deviations are drawn at least this far apart, and far enough that delay never falls as fast as time passes.
constexpr Nanoseconds kJitterStep = 5 * kMillisecond;
constexpr Nanoseconds kJitterStepPerJitter = 4;

constexpr uint64_t kBitsPerByte = 8;

Nanoseconds wire_time(uint64_t bytes, uint64_t rate_bps) {
  return static_cast<Nanoseconds>(static_cast<double>(bytes * kBitsPerByte) * 1e9 / static_cast<double>(rate_bps) +
                                  0.5);
}

uint64_t bytes_in(Nanoseconds time, uint64_t rate_bps) {
  return static_cast<uint64_t>(static_cast<double>(time) * static_cast<double>(rate_bps) / 1e9 / kBitsPerByte);
}

}  // namespace

Status Profile::check() const {
  if (jitter > delay) {
    return fail(ErrorKind::InvalidArgument, "jitter of {} us is larger than half the round trip of {} us",
                jitter / kMicrosecond, 2 * delay / kMicrosecond);
  }
  const uint64_t pipe = bytes_in(delay + jitter, rate_bps);
  const uint64_t queued = std::holds_alternative<QueueBytes>(queue)
                              ? std::get<QueueBytes>(queue).value
                              : bytes_in(std::get<QueueTime>(queue).value, rate_bps);
  if (pipe + queued > kInFlightBytesMax) {
    return fail(ErrorKind::InvalidArgument, "this rate, delay and queue keep {} MiB on the way, the limit is {} MiB",
                (pipe + queued) / 1_MiB, kInFlightBytesMax / 1_MiB);
  }
  return {};
}

double Link::Random::share() {
  state += 0x9e3779b97f4a7c15U;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

// Two streams, so that jitter does not change which packets are lost.
Link::Link(const Profile& profile, uint64_t seed)
    : profile_(profile), loss_draws_{seed}, jitter_draws_{seed ^ 0x6a09e667f3bcc909U} {}

uint64_t Link::queued_bytes(Nanoseconds now) const {
  return busy_until_ <= now ? 0 : bytes_in(busy_until_ - now, profile_.rate_bps);
}

bool Link::has_room(uint64_t bytes, Nanoseconds now) const {
  if (busy_until_ <= now) return true;  // straight to the transmitter, however short the queue
  if (const auto* limit = std::get_if<QueueBytes>(&profile_.queue)) {
    return queued_bytes(now) + bytes <= limit->value;
  }
  return busy_until_ - now + wire_time(bytes, profile_.rate_bps) <= std::get<QueueTime>(profile_.queue).value;
}

Nanoseconds Link::jitter_at(Nanoseconds departure) {
  if (profile_.jitter == 0) return 0;
  const auto draw = [this] { return 2 * jitter_draws_.share() - 1; };
  double deviation = 0;
  if (profile_.reorder) {
    deviation = draw();
  } else {
    if (departure >= knot_at_ + knot_step_) {
      const Nanoseconds step = std::max(kJitterStep, kJitterStepPerJitter * profile_.jitter);
      const bool idle_since = departure >= knot_at_ + knot_step_ + step;
      knot_from_ = idle_since ? draw() : knot_to_;
      knot_at_ = idle_since ? departure : knot_at_ + knot_step_;
      knot_to_ = draw();
      knot_step_ = step;
    }
    const double progress = static_cast<double>(departure - knot_at_) / static_cast<double>(knot_step_);
    deviation = knot_from_ + (knot_to_ - knot_from_) * progress;
  }
  return static_cast<Nanoseconds>(deviation * static_cast<double>(profile_.jitter));
}

void Link::offer(const std::shared_ptr<const Packet>& packet, Nanoseconds now) {
  Flight run{.packet = packet};
  Nanoseconds run_begin = 0;
  const auto flush = [&] {
    if (run.count > 0) launch(Flight{run});
    run.count = 0;
    run.bytes = 0;
  };

  for (uint32_t i = 0; i < packet->segment_count(); ++i) {
    const uint64_t bytes = packet->segment_size(i);
    counters_.offered_bytes += bytes;
    ++counters_.offered_packets;
    if (now < cut_end_) {
      ++counters_.dropped_cut;
      continue;
    }
    if (!has_room(bytes, now)) {
      ++counters_.dropped_queue;
      flush();
      continue;
    }
    busy_until_ = std::max(busy_until_, now) + wire_time(bytes, profile_.rate_bps);
    counters_.wire_bytes += bytes;
    ++counters_.wire_packets;
    if (profile_.loss > 0 && loss_draws_.share() < profile_.loss) {
      ++counters_.dropped_loss;
      flush();
      continue;
    }
    Nanoseconds due = busy_until_ + profile_.delay + jitter_at(busy_until_);
    if (!profile_.reorder) {
      // Only a smaller delay set while packets are on the way could overtake them.
      due = std::max(due, due_last_);
      due_last_ = due;
    }
    if (run.count > 0 && (profile_.reorder || due - run_begin > kRunTimeMax)) flush();
    if (run.count == 0) {
      run.first = i;
      run_begin = due;
    }
    run.due = due;
    run.bytes += bytes;
    ++run.count;
  }
  flush();
}

void Link::launch(Flight&& flight) {
  in_flight_bytes_ += flight.bytes;
  const auto later = [](Nanoseconds due, const Flight& other) { return due < other.due; };
  const auto at = std::upper_bound(flights_.begin(), flights_.end(), flight.due, later);
  flights_.insert(at, std::move(flight));
}

std::optional<Nanoseconds> Link::next_due() const {
  if (flights_.empty()) return std::nullopt;
  return flights_.front().due;
}

std::optional<Link::Flight> Link::pop_due(Nanoseconds now) {
  while (!flights_.empty() && flights_.front().due <= now) {
    Flight flight = std::move(flights_.front());
    flights_.pop_front();
    VF_ASSERT(in_flight_bytes_ >= flight.bytes);
    in_flight_bytes_ -= flight.bytes;
    if (now >= cut_end_) return flight;
    counters_.dropped_cut += flight.count;
  }
  return std::nullopt;
}

void Link::delivered(const Flight& flight, Nanoseconds now) {
  counters_.delivered_bytes += flight.bytes;
  counters_.delivered_packets += flight.count;
  const Nanoseconds lateness = now - flight.due;
  counters_.lateness_max = std::max(counters_.lateness_max, lateness);
  if (lateness > kLateness) counters_.late_packets += flight.count;
}

}  // namespace vmferry::wan
