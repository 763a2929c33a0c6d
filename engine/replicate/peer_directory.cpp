// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/peer_directory.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/base/json_integer.h"

namespace vmferry {

namespace {

Result<PeerRecord> record_from_json(const nlohmann::json& json) {
  try {
    PeerRecord record;
    record.name = json.at("name").get<std::string>();
    const Bytes key = from_hex(json.at("key").get<std::string>());
    record.addresses = json.at("addresses").get<std::vector<std::string>>();
    record.rights = rights_from_bits(integer_at<uint8_t>(json, "rights"));
    record.granted = rights_from_bits(integer_at<uint8_t>(json, "granted"));
    record.their_name_for_us = json.at("their_name_for_us").get<std::string>();
    record.paired_at_s = integer_at<int64_t>(json, "paired_at_s");
    const bool addresses_ok = record.addresses.size() <= kPeerAddressesMax &&
                              std::all_of(record.addresses.begin(), record.addresses.end(), is_valid_peer_address);
    if (!is_valid_name(record.name) || key.size() != record.key.size() || !addresses_ok) {
      return fail(ErrorKind::Corrupt, "peer record '{}' is malformed", printable(record.name, 64));
    }
    std::copy(key.begin(), key.end(), record.key.begin());
    return record;
  } catch (const nlohmann::json::exception& error) {
    return fail(ErrorKind::Corrupt, "peer record: {}", error.what());
  }
}

}  // namespace

const PeerRecord* PeerDirectory::find(std::string_view name) const {
  const auto found = std::find_if(peers_.begin(), peers_.end(), [&](const PeerRecord& p) { return p.name == name; });
  return found == peers_.end() ? nullptr : &*found;
}

const PeerRecord* PeerDirectory::find(const KeyHash& key) const {
  const auto found = std::find_if(peers_.begin(), peers_.end(), [&](const PeerRecord& p) { return p.key == key; });
  return found == peers_.end() ? nullptr : &*found;
}

Status PeerDirectory::add(PeerRecord record) {
  if (peers_.size() >= kPeersMax) return fail(ErrorKind::LimitExceeded, "{} peers are the limit", kPeersMax);
  if (find(record.name) != nullptr) return fail(ErrorKind::Exists, "a peer named '{}' exists", record.name);
  if (const PeerRecord* other = find(record.key)) {
    return fail(ErrorKind::Exists, "that daemon is known already, as peer '{}'", other->name);
  }
  peers_.push_back(std::move(record));
  return {};
}

Status PeerDirectory::update(PeerRecord record) {
  const PeerRecord* named = find(record.name);
  if (named != nullptr && named->key != record.key) {
    return fail(ErrorKind::Exists, "a peer named '{}' exists", record.name);
  }
  const auto found =
      std::find_if(peers_.begin(), peers_.end(), [&](const PeerRecord& p) { return p.key == record.key; });
  if (found == peers_.end()) return fail(ErrorKind::NotFound, "no peer has the key {}", to_hex(record.key));
  *found = std::move(record);
  return {};
}

Status PeerDirectory::remove(std::string_view name) {
  const auto found = std::find_if(peers_.begin(), peers_.end(), [&](const PeerRecord& p) { return p.name == name; });
  if (found == peers_.end()) return fail(ErrorKind::NotFound, "there is no peer '{}'", printable(name, 64));
  peers_.erase(found);
  return {};
}

std::string PeerDirectory::unique_name(std::string_view wanted) const {
  std::string base(is_valid_name(wanted) ? wanted : "peer");
  if (find(base) == nullptr) return base;
  base.resize(std::min<size_t>(base.size(), 60));  // leaves room for the number within the 64 of a name
  for (size_t number = 2;; ++number) {             // ends: at most kPeersMax names are taken
    std::string candidate = fmt::format("{}-{}", base, number);
    if (find(candidate) == nullptr) return candidate;
  }
}

nlohmann::json PeerDirectory::to_json() const {
  nlohmann::json out = nlohmann::json::array();
  for (const PeerRecord& record : peers_) {
    out.push_back({{"name", record.name},
                   {"key", to_hex(record.key)},
                   {"addresses", record.addresses},
                   {"rights", to_bits(record.rights)},
                   {"granted", to_bits(record.granted)},
                   {"their_name_for_us", record.their_name_for_us},
                   {"paired_at_s", record.paired_at_s}});
  }
  return out;
}

Result<PeerDirectory> PeerDirectory::from_json(const nlohmann::json& json) {
  if (!json.is_array()) return fail(ErrorKind::Corrupt, "the list of peers is no array");
  PeerDirectory directory;
  for (const nlohmann::json& entry : json) {
    auto record = record_from_json(entry);
    if (!record) return tl::unexpected(record.error());
    if (auto added = directory.add(std::move(*record)); !added) return tl::unexpected(added.error());
  }
  return directory;
}

}  // namespace vmferry
