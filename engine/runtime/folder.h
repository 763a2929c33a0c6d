// SPDX-License-Identifier: Apache-2.0
//
// A folder that is held open, and files that are surely in it: for names that come from a peer.
//
// Flow: Daemon holds its `groups` folder, FileStore opens staging areas in it. A name is resolved by the kernel beneath
// the folder (openat2 with RESOLVE_BENEATH) and through no symbolic link, so that neither a strange name nor something
// put in the folder's place leads to another file. Needs Linux 5.6. Threads: a value, not shared; every call blocks.
#pragma once

#include <sys/types.h>

#include <string>
#include <string_view>

#include "engine/base/result.h"
#include "engine/runtime/unique_fd.h"

namespace vmferry {

class Folder {
 public:
  Folder() = default;  // no folder: open() gives one
  static Result<Folder> open(const std::string& path);

  // As ::open(): invalid with errno set when it fails. ELOOP: there is a symbolic link in its place; EXDEV: the name
  // leads out of the folder. "." is the folder itself.
  UniqueFd open_file(const std::string& name, int flags, mode_t mode = 0) const noexcept;
  bool holds(const std::string& name) const noexcept;  // anything of that name, a dangling link too
  // A second name for the same file. One of a symbolic link is a symbolic link, too, which open_file() refuses.
  Status link(const std::string& from, const std::string& to) const;
  Status remove(const std::string& name) const;  // the name itself, whatever it leads to; fine when there is none
  Status sync() const;                           // the names are durable

  std::string path_of(std::string_view name) const;  // for messages

 private:
  std::string path_;
  UniqueFd fd_;
};

}  // namespace vmferry
