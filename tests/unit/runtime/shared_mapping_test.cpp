// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/shared_mapping.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/runtime/unique_fd.h"
#include "tests/unit/runtime/reactor_fixture.h"

namespace vmferry {
namespace {

// A fault on a thread that blocks the signal ends the process whatever handler there is: one front-end that cuts its
// memory would take every guest with it, whenever a worker is the one that looks.
TEST(SharedMapping, MemoryTakenAwayIsSurvivedOnWorkersToo) {
  auto reactor = make_reactor(WaitsIn::Epoll, 1);
  const UniqueFd fd(::memfd_create("memory", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(fd.get(), 8192), 0);
  auto mapping = SharedMapping::map(fd.get(), 0, 8192);
  ASSERT_TRUE(mapping.has_value()) << mapping.error().text;
  mapping->data()[4096] = 1;
  ASSERT_EQ(::ftruncate(fd.get(), 0), 0);
  EXPECT_FALSE(mapping->damaged());
  int seen = -1;
  bool done = false;
  reactor->offload([&] { seen = static_cast<volatile uint8_t*>(mapping->data())[4096]; }, [&] { done = true; });
  ASSERT_TRUE(reactor->run_until([&] { return done; }, 5 * kSecond));
  EXPECT_EQ(seen, 0);
  EXPECT_TRUE(mapping->damaged());
}

}  // namespace
}  // namespace vmferry
