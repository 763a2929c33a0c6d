// SPDX-License-Identifier: Apache-2.0
//
// Moves packets between the two TUN devices through two Links, on time, and obeys the control socket.
//
// One thread, one ppoll(): packets that are due are written, then what has arrived is read, in batches small enough
// that neither waits long for the other.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "perf/wan/control.h"
#include "perf/wan/link.h"
#include "perf/wan/netns.h"

namespace vmferry::wan {

class Emulator {
 public:
  // `signals` is a signalfd; whatever arrives there ends run().
  Emulator(const End& a, const End& b, const Profile& profile, uint64_t seed, int signals);

  // Until a signal; an error when a device has gone, as with `ip link del` in one of the namespaces.
  Status run(ControlServer* control);

 private:
  struct Direction {
    const char* name;
    const End& from;
    const End& to;
    Link link;
  };

  void deliver_due(Direction& direction);
  Status take_arrivals(Direction& direction);
  std::optional<Nanoseconds> next_due() const;

  std::string command(std::string_view line);
  std::string answer_counters() const;
  Status set(std::string_view assignment, Profile& profile) const;

  std::array<Direction, 2> directions_;
  int signals_;
  Nanoseconds started_;
  Nanoseconds counted_since_;
  Nanoseconds cut_end_ = 0;
  std::vector<std::byte> scratch_;
};

// Applies "rate", "rtt", "jitter", "loss", "queue" or "reorder" in words of the command line.
Status set_property(Profile& profile, std::string_view name, std::string_view value);

}  // namespace vmferry::wan
