// SPDX-License-Identifier: Apache-2.0
#include "perf/wan/emulator.h"

#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>

namespace vmferry::wan {
namespace {

// Packets read from one device, or runs written to one, before the others get their turn.
constexpr int kBatch = 64;

constexpr Nanoseconds kRttMax = 10 * kSecond;
constexpr Nanoseconds kCutMax = 3600 * kSecond;

Nanoseconds monotonic_now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * kSecond + time.tv_nsec;
}

std::string answer_error(std::string_view text) {
  return nlohmann::json{{"error", text}}.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

double to_seconds(Nanoseconds time) {
  return static_cast<double>(time) / static_cast<double>(kSecond);
}

std::string_view next_word(std::string_view& line) {
  line.remove_prefix(std::min(line.find_first_not_of(" \t\r"), line.size()));
  const std::string_view word = line.substr(0, line.find_first_of(" \t\r"));
  line.remove_prefix(word.size());
  return word;
}

}  // namespace

Status set_property(Profile& profile, std::string_view name, std::string_view value) {
  const auto keep = [](auto& target, const auto& result) -> Status {
    if (!result) return tl::unexpected(result.error());
    target = *result;
    return {};
  };
  if (name == "rate") return keep(profile.rate_bps, parse_rate_bps(value));
  if (name == "rtt") {
    return keep(profile.delay, parse_duration(value, kRttMax).map([](Nanoseconds rtt) { return rtt / 2; }));
  }
  if (name == "jitter") return keep(profile.jitter, parse_duration(value, kRttMax));
  if (name == "loss") return keep(profile.loss, parse_share(value));
  if (name == "queue") return keep(profile.queue, parse_queue(value));
  if (name == "reorder" && (value == "on" || value == "off")) {
    profile.reorder = value == "on";
    return {};
  }
  if (name == "reorder") return fail(ErrorKind::InvalidArgument, "'{}' is neither on nor off", value);
  return fail(ErrorKind::InvalidArgument, "unknown property '{}' (rate, rtt, jitter, loss, queue, reorder)", name);
}

Emulator::Emulator(const End& a, const End& b, const Profile& profile, uint64_t seed, int signals)
    : directions_{Direction{"a_to_b", a, b, Link(profile, seed)},
                  // Another seed: the same draws both ways would lose acknowledgements in step with data.
                  Direction{"b_to_a", b, a, Link(profile, seed + 0xbb67ae8584caa73bU)}},
      signals_(signals),
      started_(monotonic_now()),
      counted_since_(started_),
      scratch_(kFrameSizeMax) {}

Status Emulator::run(ControlServer* control) {
  std::vector<pollfd> polls;
  for (;;) {
    for (Direction& direction : directions_) deliver_due(direction);

    polls.clear();
    for (const Direction& direction : directions_) polls.push_back({direction.from.tun(), POLLIN, 0});
    polls.push_back({signals_, POLLIN, 0});
    const size_t control_begin = polls.size();
    if (control != nullptr) control->append_polls(polls);

    timespec timeout{};
    const std::optional<Nanoseconds> due = next_due();
    if (due) {
      const Nanoseconds wait = std::max<Nanoseconds>(0, *due - monotonic_now());
      timeout = {.tv_sec = wait / kSecond, .tv_nsec = wait % kSecond};
    }
    if (ppoll(polls.data(), polls.size(), due ? &timeout : nullptr, nullptr) <= 0) continue;

    for (size_t i = 0; i < directions_.size(); ++i) {
      if (polls[i].revents == 0) continue;
      if (Status taken = take_arrivals(directions_[i]); !taken) return taken;
    }
    if (polls[directions_.size()].revents != 0) return {};
    const bool anybody = std::any_of(polls.begin() + static_cast<std::ptrdiff_t>(control_begin), polls.end(),
                                     [](const pollfd& poll) { return poll.revents != 0; });
    if (anybody) control->serve([this](std::string_view line) { return command(line); });
  }
}

std::optional<Nanoseconds> Emulator::next_due() const {
  const std::optional<Nanoseconds> first = directions_[0].link.next_due();
  const std::optional<Nanoseconds> second = directions_[1].link.next_due();
  if (!first || !second) return first ? first : second;
  return std::min(*first, *second);
}

void Emulator::deliver_due(Direction& direction) {
  std::array<std::byte, kHeadSizeMax> scratch;
  for (int i = 0; i < kBatch; ++i) {
    const Nanoseconds now = monotonic_now();
    const std::optional<Link::Flight> flight = direction.link.pop_due(now);
    if (!flight) return;
    const Packet::Slice slice = flight->packet->render(flight->first, flight->count, scratch);
    // writev() only reads; iovec has no const.
    std::array<iovec, 2> parts{iovec{const_cast<std::byte*>(slice.head.data()), slice.head.size()},
                               iovec{const_cast<std::byte*>(slice.body.data()), slice.body.size()}};
    const ssize_t written = writev(direction.to.tun(), parts.data(), slice.body.empty() ? 1 : 2);
    if (written < 0) {
      direction.link.refused(*flight);
    } else {
      direction.link.delivered(*flight, now);
    }
  }
}

Status Emulator::take_arrivals(Direction& direction) {
  for (int i = 0; i < kBatch; ++i) {
    const ssize_t size = read(direction.from.tun(), scratch_.data(), scratch_.size());
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return {};
    if (size <= 0) {
      return fail(ErrorKind::Io, "read from the device of {}: {}", direction.name, errno_text(size < 0 ? errno : 0));
    }
    const auto packet = Packet::parse(std::span(scratch_).first(static_cast<size_t>(size)));
    if (!packet) {
      direction.link.malformed();
      continue;
    }
    direction.link.offer(*packet, monotonic_now());
  }
  return {};
}

std::string Emulator::command(std::string_view line) {
  const std::string_view verb = next_word(line);
  if (verb == "counters" && next_word(line).empty()) return answer_counters();
  if (verb == "reset" && next_word(line).empty()) {
    for (Direction& direction : directions_) direction.link.reset_counters();
    counted_since_ = monotonic_now();
    return R"({"ok":true})";
  }
  if (verb == "cut") {
    // Seconds are the natural unit here: "cut 5"; "cut 300ms" works too, and "cut 0" heals.
    std::string time(next_word(line));
    if (!time.empty() && time.find_first_not_of("0123456789.") == std::string::npos) time += 's';
    const Result<Nanoseconds> length = parse_duration(time, kCutMax);
    if (!length) return answer_error(length.error().text);
    if (!next_word(line).empty()) return answer_error("cut takes one time");
    cut_end_ = monotonic_now() + *length;
    for (Direction& direction : directions_) direction.link.cut_until(cut_end_);
    return R"({"ok":true})";
  }
  if (verb == "set") {
    Profile profile = directions_[0].link.profile();
    for (std::string_view word = next_word(line); !word.empty(); word = next_word(line)) {
      if (const Status applied = set(word, profile); !applied) return answer_error(applied.error().text);
    }
    if (const Status checked = profile.check(); !checked) return answer_error(checked.error().text);
    for (Direction& direction : directions_) direction.link.set_profile(profile);
    return R"({"ok":true})";
  }
  return answer_error(fmt::format("unknown command '{}' (cut TIME, counters, set NAME=VALUE..., reset)", verb));
}

Status Emulator::set(std::string_view assignment, Profile& profile) const {
  const size_t equals = assignment.find('=');
  if (equals == std::string_view::npos) {
    return fail(ErrorKind::InvalidArgument, "'{}' is not NAME=VALUE", assignment);
  }
  return set_property(profile, assignment.substr(0, equals), assignment.substr(equals + 1));
}

std::string Emulator::answer_counters() const {
  const Nanoseconds now = monotonic_now();
  const Profile& profile = directions_[0].link.profile();
  nlohmann::ordered_json answer{
      {"seconds", to_seconds(now - counted_since_)},
      {"rate_bps", profile.rate_bps},
      {"rtt_us", 2 * profile.delay / kMicrosecond},
      {"jitter_us", profile.jitter / kMicrosecond},
      {"loss", profile.loss},
      {"reorder", profile.reorder},
      {"cut_seconds_left", to_seconds(std::max<Nanoseconds>(0, cut_end_ - now))},
  };
  for (const Direction& direction : directions_) {
    const Counters& counters = direction.link.counters();
    // The kernel counts since the device was made: not affected by reset.
    const Result<uint64_t> overruns = direction.from.overruns();
    answer[direction.name] = {
        {"bytes", counters.wire_bytes},
        {"packets", counters.wire_packets},
        {"dropped", counters.dropped()},
        {"offered_bytes", counters.offered_bytes},
        {"offered_packets", counters.offered_packets},
        {"delivered_bytes", counters.delivered_bytes},
        {"delivered_packets", counters.delivered_packets},
        {"dropped_queue", counters.dropped_queue},
        {"dropped_loss", counters.dropped_loss},
        {"dropped_cut", counters.dropped_cut},
        {"dropped_device", counters.dropped_device},
        {"overruns", overruns ? nlohmann::ordered_json(*overruns) : nlohmann::ordered_json(nullptr)},
        {"in_flight_bytes", direction.link.in_flight_bytes()},
        {"queued_bytes", direction.link.queued_bytes(now)},
        {"late_packets", counters.late_packets},
        {"lateness_us_max", counters.lateness_max / kMicrosecond},
    };
  }
  return answer.dump();
}

}  // namespace vmferry::wan
