// SPDX-License-Identifier: Apache-2.0
#include "perf/micro/counting/counting_new.h"

#if VMFERRY_OWN_NEW

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<bool> counting{false};
std::atomic<uint64_t> allocations{0};
thread_local bool counted = false;
}  // namespace

namespace vmferry::counting_new {

void count_this_thread() {
  counted = true;
}
void start() {
  allocations = 0;
  counting = true;
}
uint64_t stop() {
  counting = false;
  return allocations;
}

}  // namespace vmferry::counting_new

void* operator new(size_t size) {
  if (counted && counting.load(std::memory_order_relaxed)) ++allocations;
  void* memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) std::abort();
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

#endif
