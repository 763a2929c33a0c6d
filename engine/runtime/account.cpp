// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/account.h"

#include <grp.h>
#include <pwd.h>

#include <charconv>
#include <vector>

#include "engine/base/text.h"

namespace vmferry {

namespace {

constexpr size_t kEntryMax = 1U << 16;  // of /etc/group with many members; getgrnam_r(3) says ERANGE above

std::optional<uint32_t> number(std::string_view text) {
  const auto value = parse_uint(text);
  // The last number means "leave as it is" to chown(2).
  if (!value || *value >= UINT32_MAX) return std::nullopt;
  return static_cast<uint32_t>(*value);
}

// The entry of that name in one of the system's tables; `look_up` is getpwnam_r or getgrnam_r.
template <typename Entry, typename LookUp>
Result<Entry> find_entry(std::string_view what, const std::string& name, LookUp look_up) {
  std::vector<char> space(kEntryMax);
  Entry entry{};
  Entry* found = nullptr;
  const int error = look_up(name.c_str(), &entry, space.data(), space.size(), &found);
  if (found != nullptr) return entry;
  return fail(ErrorKind::NotFound, "no {} '{}'{}", what, name,
              error == 0 ? std::string() : ": " + std::string(errno_text(error)));
}

Result<uid_t> find_user(const std::string& name) {
  if (const auto id = number(name)) return *id;
  return find_entry<passwd>("user", name, getpwnam_r).map([](const passwd& entry) { return entry.pw_uid; });
}

Result<gid_t> find_group(const std::string& name) {
  if (const auto id = number(name)) return *id;
  return find_entry<group>("group", name, getgrnam_r).map([](const group& entry) { return entry.gr_gid; });
}

}  // namespace

Result<SocketOwner> find_owner(std::string_view text) {
  SocketOwner owner;
  const size_t colon = text.find(':');
  const std::string user(text.substr(0, colon));
  const std::string group(colon == std::string_view::npos ? "" : text.substr(colon + 1));
  if (text.find('\0') != std::string_view::npos || (user.empty() && group.empty()) ||
      (colon != std::string_view::npos && group.empty())) {
    return fail(ErrorKind::InvalidArgument, "'{}' is not USER, USER:GROUP or :GROUP", text);
  }
  if (!user.empty()) {
    const auto id = find_user(user);
    if (!id) return tl::unexpected(id.error());
    owner.user = *id;
  }
  if (!group.empty()) {
    const auto id = find_group(group);
    if (!id) return tl::unexpected(id.error());
    owner.group = *id;
  }
  return owner;
}

Result<mode_t> parse_socket_mode(std::string_view text) {
  mode_t mode = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), mode, 8);
  if (error != std::errc{} || end != text.data() + text.size() || (mode & 0600U) != 0600U || mode > 0777U)
    return fail(ErrorKind::InvalidArgument, "'{}' is not an octal mode from 0600 to 0777, such as 0660", text);
  return mode;
}

}  // namespace vmferry
