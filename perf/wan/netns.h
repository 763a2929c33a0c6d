// SPDX-License-Identifier: Apache-2.0
//
// The two ends of the wire: a network namespace with a TUN device in it, made and removed with iproute2.
//
// Namespaces are iproute2's named ones (/run/netns/NAME), so that harnesses start programs with `ip netns exec`.
// The process itself stays in its own namespace; it enters an end's only to open the device there.
// Threads: single-threaded program, required by setns() here.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/base/result.h"

namespace vmferry::wan {

// A file descriptor that is closed once.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept;
  ~Fd();
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

struct EndOptions {
  std::string netns;
  std::string address;                                       // IPv4
  std::string peer_address;                                  // IPv4, of the other end
  bool offload = true;                                       // take super-packets from the kernel
  std::vector<std::pair<std::string, std::string>> sysctls;  // "net.ipv4...": value
};

// Owns the namespace: removes it in the destructor.
class End {
 public:
  // Replaces a stale namespace of that name. The device is called kDeviceName.
  static Result<End> create(const EndOptions& options);

  End(End&& other) noexcept;
  End& operator=(End&&) = delete;
  ~End();

  int tun() const { return tun_.get(); }
  // Packets that the kernel threw away because this process did not read in time. They never reached the link.
  Result<uint64_t> overruns() const;

 private:
  explicit End(std::string netns) : netns_(std::move(netns)) {}
  Status open_device(const EndOptions& options);

  std::string netns_;  // empty: moved from
  Fd tun_;
  Fd device_statistics_;
};

constexpr const char* kDeviceName = "wan0";

// Root, /dev/net/tun, TUN features, iproute2, namespaces: what create() needs, each with what to do about it.
Status check_host();

}  // namespace vmferry::wan
