// SPDX-License-Identifier: Apache-2.0
//
// The load generator's verification: it passes where content is right and fails where it is not.
#include "perf/vhost/driver/load.h"

#include "tests/unit/vhost/vhost_fixture.h"

namespace vmferry {
namespace {

perf::LoadResult run_load(VhostBackend& backend, perf::Pattern pattern, const virtio::RingOptions& ring = {}) {
  perf::FrontendOptions options;
  options.ring = ring;
  auto frontend = make_frontend(options);
  EXPECT_TRUE(frontend->connect(backend.dial()));
  perf::BlkQueue queue(*frontend, 0, 16, 4096);
  return perf::Load(queue,
                    {.pattern = pattern, .depth = 16, .first_block = 3, .blocks = 500, .seconds = 0.2, .verify = true})
      .run();
}

TEST(VhostLoad, RightContentPasses) {
  for (const bool packed : {false, true}) {
    VhostBackend backend;
    const auto result = run_load(backend, perf::Pattern::RandomMixed, {packed, true, true});
    EXPECT_GT(result.requests, 100U);
    EXPECT_GT(result.verified, 50U);
    EXPECT_EQ(result.errors, 0U);
    EXPECT_EQ(result.mismatches, 0U);
    EXPECT_EQ(result.latency_ns.size(), result.requests);
  }
}

// A verification that cannot fail would pass a back-end that mixes up blocks.
TEST(VhostLoad, AWriteThatIsLostIsFound) {
  VhostBackend backend;
  backend.disk->lost_offset = (3 + 100) * 4096;
  const auto result = run_load(backend, perf::Pattern::Write);
  EXPECT_GT(result.mismatches, 0U);
}

TEST(VhostLoad, FailedRequestsAreCounted) {
  VhostBackend backend;
  backend.disk->error = EIO;
  const auto result = run_load(backend, perf::Pattern::Read);
  EXPECT_EQ(result.errors, result.requests);
  EXPECT_GT(result.errors, 0U);
}

}  // namespace
}  // namespace vmferry
