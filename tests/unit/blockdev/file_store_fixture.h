// SPDX-License-Identifier: Apache-2.0
//
// What the tests of FileStore share: a reactor, a folder on a real disk, and requests that are waited for.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "blockdev/file_store.h"
#include "engine/base/log.h"
#include "engine/base/random.h"

namespace vmferry {

// Of several requests at once, none of which may fail.
struct DoneCounter final : BlockCompletion {
  size_t done = 0;
  void block_done(BlockRequest&, Errno error) noexcept override {
    EXPECT_EQ(error, 0);
    ++done;
  }
};

class FileStoreFixture : public testing::Test {
 protected:
  void SetUp() override {
    auto made = Reactor::create();
    ASSERT_TRUE(made.has_value());
    reactor = std::move(*made);
    // /var/tmp is on a disk where /tmp may be a tmpfs.
    const char* base = getenv("TMPDIR");
    std::string pattern = std::string(base != nullptr ? base : "/var/tmp") + "/vmferry-store-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder = pattern;
    log::set_sink([this](log::Level level, std::string_view line) {
      if (level >= log::Level::Warn) log_lines.emplace_back(line);
    });
  }
  void TearDown() override {
    store.reset();
    log::set_sink({});
    std::filesystem::remove_all(folder);
  }
  std::string file() const { return folder + "/disk"; }

  void open(const FileStoreOptions& options) {
    store.reset();
    auto opened = FileStore::open(*reactor, file(), options);
    ASSERT_TRUE(opened.has_value()) << opened.error().text;
    store = std::move(*opened);
  }
  Errno wait(BlockRequest request) {
    struct Waiter final : BlockCompletion {
      std::optional<Errno> result;
      void block_done(BlockRequest&, Errno error) noexcept override {
        EXPECT_FALSE(result) << "completed twice";
        result = error;
      }
    } waiter;
    request.completion = &waiter;
    store->submit(request);
    EXPECT_FALSE(waiter.result) << "completed inline";
    EXPECT_TRUE(reactor->run_until([&] { return waiter.result.has_value(); }, 30 * kSecond));
    return waiter.result.value_or(-1);
  }
  Errno write(uint64_t offset, Bytes data, bool fua = false) {
    return wait({.op = BlockOp::Write, .fua = fua, .range = {offset, data.size()}, .data = data.data()});
  }
  Errno read(uint64_t offset, Bytes& data) {
    return wait({.op = BlockOp::Read, .range = {offset, data.size()}, .data = data.data()});
  }
  Bytes content(uint64_t offset, uint64_t length) {
    Bytes data(length);
    EXPECT_EQ(read(offset, data), 0);
    return data;
  }
  Errno flush() { return wait({.op = BlockOp::Flush}); }
  Result<std::vector<Extent>> extents(ByteRange range, size_t extents_max = 100) {
    std::optional<Result<std::vector<Extent>>> answer;
    store->query_extents(range, extents_max, [&](auto result) { answer = std::move(result); });
    EXPECT_FALSE(answer);
    EXPECT_TRUE(reactor->run_until([&] { return answer.has_value(); }, 10 * kSecond));
    return std::move(*answer);
  }
  uint64_t allocated_bytes() const {
    struct stat info {};
    EXPECT_EQ(::stat(file().c_str(), &info), 0);
    return static_cast<uint64_t>(info.st_blocks) * 512;
  }
  static Bytes pattern(uint64_t length, uint64_t seed) {
    Random random(seed);
    Bytes bytes(length);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next() | 1);
    return bytes;
  }

  std::unique_ptr<Reactor> reactor;
  std::string folder;
  std::vector<std::string> log_lines;
  std::unique_ptr<FileStore> store;
};

}  // namespace vmferry
