// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/shared_mapping.h"

#include <linux/magic.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <mutex>
#include <utility>

#include "engine/base/units.h"

namespace vmferry {

namespace {

// What the signal handler sees: only atomics, no locks. `end` 0: the slot is free.
struct Slot {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> damaged{false};
};
std::array<Slot, SharedMapping::kMappingsMax>& slots() {
  static std::array<Slot, SharedMapping::kMappingsMax> all;
  return all;
}
std::atomic<size_t> slots_used_max{0};  // how far the handler has to look
std::mutex slots_mutex;                 // taking and giving back, never in the handler

void on_bus_error(int signal, siginfo_t* info, void*) {
  const int saved_errno = errno;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const size_t count = slots_used_max.load(std::memory_order_acquire);
  for (size_t i = 0; i < count; ++i) {
    Slot& slot = slots()[i];
    const uintptr_t begin = slot.begin.load(std::memory_order_acquire);
    const uintptr_t end = slot.end.load(std::memory_order_acquire);
    if (address < begin || address >= end) continue;
    // All of it, because pages of a huge page cannot be replaced one by one.
    void* fresh = ::mmap(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) break;
    slot.damaged.store(true, std::memory_order_release);
    errno = saved_errno;
    return;
  }
  ::signal(signal, SIG_DFL);  // the access is repeated and ends the process
}

void install_handler() {
  slots();  // made before a handler could need it
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
}

Result<size_t> take_slot(uintptr_t begin, uintptr_t end) {
  static std::once_flag installed;
  std::call_once(installed, install_handler);
  const std::lock_guard lock(slots_mutex);
  for (size_t i = 0; i < slots().size(); ++i) {
    Slot& slot = slots()[i];
    if (slot.end.load() != 0) continue;
    slot.damaged.store(false);
    slot.begin.store(begin);
    slot.end.store(end);
    if (i >= slots_used_max.load()) slots_used_max.store(i + 1, std::memory_order_release);
    return i;
  }
  return fail(ErrorKind::LimitExceeded, "{} shared mappings are in use", slots().size());
}

}  // namespace

Result<SharedMapping> SharedMapping::map(int fd, uint64_t offset, uint64_t size) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return fail(ErrorKind::InvalidArgument, "fstat: {}", errno_text(errno));
  // Whoever serves a FUSE file could keep every access to it waiting for ever, and us with it.
  struct statfs file_system {};
  if (!S_ISREG(info.st_mode) || ::fstatfs(fd, &file_system) != 0 || file_system.f_type == FUSE_SUPER_MAGIC)
    return fail(ErrorKind::InvalidArgument, "not memory: neither a memfd nor a plain file");
  if (size == 0 || !fits_in(offset, size, static_cast<uint64_t>(std::max<off_t>(info.st_size, 0))))
    return fail(ErrorKind::Mismatch, "{} bytes at {} of a file of {} bytes", size, offset, info.st_size);
  // Of huge pages only whole ones can be mapped; st_blksize is their size.
  const uint64_t page = std::max<uint64_t>(4096, static_cast<uint64_t>(info.st_blksize));
  if (offset % 4096 != 0) return fail(ErrorKind::InvalidArgument, "offset {} is not on a page", offset);
  const uint64_t skipped = offset % page;
  const uint64_t length = round_up(size + skipped, page);
  void* const address = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                               static_cast<off_t>(offset - skipped));
  if (address == MAP_FAILED) return fail(ErrorKind::InvalidArgument, "mmap: {}", errno_text(errno));
  ::madvise(address, length, MADV_DONTDUMP);  // a guest's memory does not belong into our core file
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const auto slot = take_slot(begin, begin + length);
  if (!slot) {
    ::munmap(address, length);
    return tl::unexpected(slot.error());
  }
  SharedMapping mapping;
  mapping.data_ = static_cast<uint8_t*>(address) + skipped;
  mapping.size_ = size;
  mapping.slot_ = *slot;
  return mapping;
}

SharedMapping::SharedMapping(SharedMapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)), slot_(other.slot_) {}

SharedMapping& SharedMapping::operator=(SharedMapping&& other) noexcept {
  if (this == &other) return *this;
  unmap();
  data_ = std::exchange(other.data_, nullptr);
  size_ = std::exchange(other.size_, 0);
  slot_ = other.slot_;
  return *this;
}

bool SharedMapping::damaged() const {
  return data_ != nullptr && slots()[slot_].damaged.load(std::memory_order_acquire);
}

void SharedMapping::unmap() {
  if (data_ == nullptr) return;
  Slot& slot = slots()[slot_];
  const uintptr_t begin = slot.begin.load();
  ::munmap(reinterpret_cast<void*>(begin), slot.end.load() - begin);
  slot.end.store(0);  // only now may the slot be used again
  data_ = nullptr;
}

}  // namespace vmferry
