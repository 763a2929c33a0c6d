// SPDX-License-Identifier: Apache-2.0
//
// The peers that this daemon knows, by name and by pinned key. A plain list: the daemon makes it durable as a part of
// its node state (PeerService tells it when).
// Threads: the executor's thread.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "netproto/repl/pairing.h"

namespace vmferry {

struct PeerRecord {
  std::string name{};                    // what we call it; unique here
  KeyHash key{};                         // pinned; unique here
  std::vector<std::string> addresses{};  // where to dial it, in order; may be empty: then it dials us
  PeerRights rights{};                   // what it may do here
  PeerRights granted{};                  // what it said that we may do there
  std::string their_name_for_us{};       // as of the pairing
  int64_t paired_at_s = 0;               // seconds since 1970
};

class PeerDirectory {
 public:
  static constexpr size_t kPeersMax = 64;

  const std::vector<PeerRecord>& peers() const { return peers_; }
  const PeerRecord* find(std::string_view name) const;
  const PeerRecord* find(const KeyHash& key) const;

  // Exists: another peer has the name or the key. LimitExceeded: kPeersMax.
  Status add(PeerRecord record);
  // Replaces the record with the same key, name included.
  Status update(PeerRecord record);
  Status remove(std::string_view name);

  // `wanted` (or "peer" when it is no valid name), with "-2", "-3"... when taken.
  std::string unique_name(std::string_view wanted) const;

  nlohmann::json to_json() const;  // an array
  static Result<PeerDirectory> from_json(const nlohmann::json& json);

 private:
  std::vector<PeerRecord> peers_;
};

}  // namespace vmferry
