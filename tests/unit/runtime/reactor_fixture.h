// SPDX-License-Identifier: Apache-2.0
//
// Every test of the loop runs twice: waiting in epoll (libaio, no store yet) and waiting in io_uring.
#pragma once

#include <gtest/gtest.h>

#include "engine/runtime/reactor.h"

namespace vmferry {

enum class WaitsIn { Epoll, Uring };

inline std::unique_ptr<Reactor> make_reactor(WaitsIn waits_in, unsigned workers = 2) {
  auto reactor = Reactor::create({.worker_count = workers});
  EXPECT_TRUE(reactor.has_value());
  if (waits_in == WaitsIn::Uring) {
    EXPECT_TRUE((*reactor)->uring().has_value()) << "this kernel refuses io_uring";
  }
  return std::move(*reactor);
}

inline std::string name_of(const testing::TestParamInfo<WaitsIn>& info) {
  return info.param == WaitsIn::Uring ? "uring" : "epoll";
}
inline const auto kBothLoops = testing::Values(WaitsIn::Epoll, WaitsIn::Uring);

}  // namespace vmferry
