// SPDX-License-Identifier: Apache-2.0
#include "tests/guest/workload/memory_load.h"

#include <sys/mman.h>

#include <array>
#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "tests/guest/record/record.h"
#include "tests/guest/workload/pacer.h"

namespace vmferry::guest {

namespace {

constexpr std::size_t kPageSize = 4096;
constexpr std::size_t kWords = kPageSize / sizeof(std::uint64_t);
constexpr std::size_t kHeaderWords = 3;  // page number, generation, checksum
constexpr std::size_t kChangeWords = 32;
constexpr std::size_t kPoolSize = 1 << 20;
constexpr std::uint64_t kHotTouchPercent = 70;
constexpr std::uint64_t kHotPart = 5;
constexpr std::uint64_t kRewritePercent = 25;
constexpr std::size_t kTextPercent = 60;
constexpr std::uint64_t kReportsMax = 20;  // lines about single pages; the totals are never cut short

using Page = std::span<std::uint64_t, kWords>;

// Weighted sum: cheap without hardware help (the guest may be emulated), and blind neither to swapped words nor to a
// shifted page, unlike a plain sum.
std::uint64_t sum_of(Page page) {
  std::uint64_t sum = page[0] ^ (page[1] << 1);
  for (std::size_t i = kHeaderWords; i < kWords; ++i) sum += page[i] * (2 * i + 1);
  return sum;
}

class MemoryLoad {
 public:
  MemoryLoad(std::span<std::uint64_t> memory, std::uint64_t seed, const LogChannel& log)
      : memory_(memory), generations_(memory.size() / kWords), pool_(2 * kPoolSize), random_(seed), log_(log) {
    fill_text(std::span(pool_).first(kPoolSize), seed);
    fill_noise(std::span(pool_).subspan(kPoolSize), ~seed);
    for (std::uint64_t i = 0; i < page_count(); ++i) rewrite(i);
  }

  void touch();
  void verify_all();
  bool clean() const { return bad_ == 0; }

 private:
  std::uint64_t page_count() const { return generations_.size(); }
  Page page(std::uint64_t index) const { return Page(memory_.data() + index * kWords, kWords); }
  std::uint64_t next() { return random_ = splitmix64(random_); }
  void rewrite(std::uint64_t index);
  void change(std::uint64_t index);
  bool verify(std::uint64_t index);
  void copy_from_pool(std::span<std::byte> out, bool text);

  std::span<std::uint64_t> memory_;
  std::vector<std::uint32_t> generations_;
  std::vector<std::byte> pool_;  // text, then noise: making it afresh for each page would cost more than writing it
  std::uint64_t random_;
  const LogChannel& log_;
  std::uint64_t touched_ = 0;
  std::uint64_t bad_ = 0;
};

void MemoryLoad::copy_from_pool(std::span<std::byte> out, bool text) {
  const std::size_t start = next() % (kPoolSize - out.size()) + (text ? 0 : kPoolSize);
  std::memcpy(out.data(), pool_.data() + start, out.size());
}

void MemoryLoad::rewrite(std::uint64_t index) {
  const Page words = page(index);
  const auto body = std::as_writable_bytes(words.subspan(kHeaderWords));
  const std::size_t text_size = body.size() * kTextPercent / 100;
  copy_from_pool(body.first(text_size), true);
  copy_from_pool(body.subspan(text_size), false);
  words[0] = index;
  words[1] = ++generations_[index];
  words[2] = sum_of(words);
}

void MemoryLoad::change(std::uint64_t index) {
  const Page words = page(index);
  const std::size_t at = kHeaderWords + next() % (kWords - kHeaderWords - kChangeWords);
  for (std::size_t i = 0; i < kChangeWords; ++i) words[at + i] += next() & 0xff;
  words[1] = ++generations_[index];
  words[2] = sum_of(words);
}

bool MemoryLoad::verify(std::uint64_t index) {
  const Page words = page(index);
  if (words[0] == index && words[1] == generations_[index] && words[2] == sum_of(words)) return true;
  if (++bad_ <= kReportsMax) {
    log_.line("E memory: page %" PRIu64 " holds page %" PRIu64 " generation %" PRIu64 " (expected %u), checksum %s",
              index, words[0], words[1], generations_[index], words[2] == sum_of(words) ? "right" : "wrong");
  }
  return false;
}

void MemoryLoad::touch() {
  const std::uint64_t choice = next();
  const std::uint64_t range = choice % 100 < kHotTouchPercent ? page_count() / kHotPart : page_count();
  const std::uint64_t index = next() % range;
  ++touched_;
  if (!verify(index) || (choice >> 32) % 100 < kRewritePercent) {
    rewrite(index);
  } else {
    change(index);
  }
}

void MemoryLoad::verify_all() {
  for (std::uint64_t i = 0; i < page_count(); ++i) {
    if (!verify(i)) rewrite(i);  // reported once
  }
  log_.line("M %" PRIu64 " %" PRIu64 " %" PRIu64, touched_, page_count(), bad_);
}

}  // namespace

int run_memory_load(const Options& options, const LogChannel& log, const volatile std::sig_atomic_t& stop,
                    volatile std::sig_atomic_t& verify) {
  const std::size_t size = options.memory_bytes / kPageSize * kPageSize;
  if (size < kHotPart * kPageSize) {
    log.line("E memory: vf.mem is less than %zu bytes", kHotPart * kPageSize);
    return EXIT_FAILURE;
  }
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    log.line("E memory: no %zu bytes", size);
    return EXIT_FAILURE;
  }
  MemoryLoad load({static_cast<std::uint64_t*>(memory), size / sizeof(std::uint64_t)}, options.seed, log);
  log.line("R memory %zu", size);
  Pacer pacer(options.memory_rate, kPageSize);
  const std::uint64_t end_ns = options.seconds == 0 ? UINT64_MAX : now_ns() + options.seconds * 1'000'000'000ULL;
  while (stop == 0 && now_ns() < end_ns) {
    load.touch();
    if (verify != 0) {
      verify = 0;
      load.verify_all();
    }
    pacer.wait();
  }
  load.verify_all();
  ::munmap(memory, size);
  return load.clean() ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace vmferry::guest
