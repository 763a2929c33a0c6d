// SPDX-License-Identifier: Apache-2.0
//
// QMP, QEMU's control protocol (docs/interop/qmp-spec of QEMU): one JSON object per line in each direction. Bytes in,
// typed messages out; commands out as lines.
//
// QEMU may be taken over by its guest, so every byte is hostile: line size and nesting are limited, types are checked,
// and a violation ends the conversation. Threads: one owner.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "netproto/rpc/json_lines.h"

namespace vmferry::qmp {

inline constexpr JsonLimits kLimits = {.line_size_max = 1U << 20, .depth_max = 64};

struct Greeting {
  int major = 0;
  int minor = 0;
  int micro = 0;
};
struct Event {
  std::string name;  // "MIGRATION"
  Json data;         // an object, perhaps empty
};
struct Reply {
  uint64_t id = 0;
  Result<Json> value;  // the error has QEMU's own description
};
using Message = std::variant<Greeting, Event, Reply>;

class Codec {
 public:
  // Appends what `bytes` completes. An error (Corrupt, LimitExceeded) is final: close the connection.
  Status feed(ByteSpan bytes, std::vector<Message>& out);
  // The line that runs `command`; `id` names its Reply. Arguments must be an object or null.
  std::string encode(std::string_view command, const Json& arguments, uint64_t& id);

 private:
  Result<Message> decode(Json&& value);

  JsonLineReader lines_{kLimits};
  uint64_t id_next_ = 1;
  bool greeted_ = false;
  bool failed_ = false;
};

// Fields of replies, for callers that must not trust them: the default when missing or of another type.
std::string text_of(const Json& object, const char* key);
uint64_t number_of(const Json& object, const char* key);  // negative and fractional numbers count as missing
bool flag_of(const Json& object, const char* key);
const Json& object_of(const Json& object, const char* key);  // {} when missing
const Json& array_of(const Json& object, const char* key);   // [] when missing

}  // namespace vmferry::qmp
