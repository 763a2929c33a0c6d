// SPDX-License-Identifier: Apache-2.0
#include "engine/base/id.h"

#include <sys/random.h>

#include <algorithm>

#include "engine/base/assert.h"
#include "engine/base/hash.h"

namespace vmferry {

std::string Id128::to_string() const {
  return to_hex(bytes);
}

Result<Id128> Id128::parse(std::string_view hex) {
  const Bytes raw = from_hex(hex);
  if (raw.size() != 16) return fail(ErrorKind::InvalidArgument, "'{}' is not an identifier of 32 hex digits", hex);
  Id128 id;
  std::copy(raw.begin(), raw.end(), id.bytes.begin());
  return id;
}

Id128 random_id() {
  Id128 id;
  do {
    VF_ASSERT(getrandom(id.bytes.data(), id.bytes.size(), 0) == static_cast<ssize_t>(id.bytes.size()));
  } while (id.is_none());
  return id;
}

bool is_valid_name(std::string_view name) noexcept {
  const auto alnum = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); };
  if (name.empty() || name.size() > 64 || !alnum(name.front())) return false;
  return std::all_of(name.begin(), name.end(), [&](char c) { return alnum(c) || c == '.' || c == '_' || c == '-'; });
}

}  // namespace vmferry
