// SPDX-License-Identifier: Apache-2.0
//
// Lines from the guest to the host and back, over a virtio-serial port (or into a file when run on a host).
//
// One descriptor is shared by all processes of the load; each line is one write(), which the driver hands over as one
// buffer, so lines do not mix. A write blocks while nobody listens on the host: an acknowledgement is never dropped.
//
//   R TEXT                                       ready, with what was found
//   S DISK RUN SLOTS OFFSET HOT RANDOM% HOT% FSYNC SEED   a writer starts (see SlotPattern)
//   X DISK LOGICAL PHYSICAL LENGTH               where the file lies on the disk, bytes (file mode)
//   A DISK FIRST COUNT MICROSECONDS              records FIRST.. are durable (after fsync); longest wait of the batch
//   W DISK FIRST COUNT MICROSECONDS              records FIRST.. were written, no fsync was asked for
//   D DISK NEXT                                  the writer has stopped after a last fsync; NEXT was not written
//   M GENERATIONS PAGES BAD                      all pages of the memory load were verified
//   E TEXT                                       an error: I/O, memory verification, anything unexpected
//   Q                                            all writers have stopped
#pragma once

#include <optional>
#include <string>

namespace vmferry::guest {

// Path of the virtio-serial port with this name below /dev; nullopt when it does not appear within five seconds.
std::optional<std::string> find_port(const std::string& name);

class LogChannel {
 public:
  explicit LogChannel(int fd) : fd_(fd) {}

  // printf-like. Never fails: without a channel there is nobody to tell.
  void line(const char* format, ...) const __attribute__((format(printf, 2, 3)));
  int fd() const { return fd_; }

 private:
  int fd_;
};

}  // namespace vmferry::guest
