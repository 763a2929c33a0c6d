// SPDX-License-Identifier: Apache-2.0
//
// An integer out of JSON that somebody else wrote: a state file, a peer.
//
// nlohmann's get<int64_t>() converts whatever number it finds, and a fraction or 1e37 is undefined behaviour there.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>

namespace vmferry {

// The member `key` of `object`, which has to be an integer within the range of Integer. Throws
// nlohmann::json::exception, as at() and get<std::string>() do, where a reader already catches those.
template <typename Integer>
Integer integer_at(const nlohmann::json& object, const char* key) {
  const nlohmann::json& value = object.at(key);
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (std::in_range<Integer>(number)) return static_cast<Integer>(number);
  } else if (value.is_number_integer()) {
    const auto number = value.get<int64_t>();
    if (std::in_range<Integer>(number)) return static_cast<Integer>(number);
  }
  throw nlohmann::json::other_error::create(501, std::string("'") + key + "' is not an integer of its range", &value);
}

}  // namespace vmferry
