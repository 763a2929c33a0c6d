// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/write_load.h"

#include <memory>
#include <utility>

#include "engine/base/log.h"
#include "engine/daemon/daemon.h"
#include "engine/delta/stream_codec.h"
#include "engine/track/write_sample.h"

namespace vmferry {

namespace {

constexpr uint64_t kBlock = 4096;
constexpr size_t kBlocksRead = 512;  // of each volume: 2 MiB tell how its writes compress
constexpr size_t kFrame = 16;        // blocks that are compressed together

// One look at the volumes of one guest, shared by its callbacks. Everything is found by name again: volumes may go
// meanwhile.
struct Look {
  Daemon& daemon;
  std::vector<std::string> volumes;
  uint64_t long_rate;  // of the last ten seconds
  std::function<void(uint64_t)> done;
  Nanoseconds begun = 0;
  std::vector<std::shared_ptr<WriteSample>> samples{};  // in the order of volumes

  double distinct_bytes = 0;
  double written_bytes = 0;
  size_t reads_left = 0;
  bool read_failed = false;
  std::vector<Bytes> blocks{};
  double ratio = 0;  // compressed to raw; 0: not known
};

void finish(const std::shared_ptr<Look>& look) {
  const double elapsed_s = static_cast<double>(look->daemon.reactor().now() - look->begun) / 1e9;
  // Both the last ten seconds and the look: neither a burst that is over nor one that comes now and then counts.
  const double rate = std::min(look->written_bytes / elapsed_s, static_cast<double>(look->long_rate));
  const double share = look->written_bytes > 0 ? look->distinct_bytes / look->written_bytes * look->ratio : 0;
  const auto wire_rate = static_cast<uint64_t>(rate * std::min(share, 1.0));
  log::info("volume={} written_bytes_per_s={} to_send_bytes_per_s={}", look->volumes.front(),
            static_cast<uint64_t>(rate), wire_rate);
  look->done(wire_rate);
}

void compress(const std::shared_ptr<Look>& look) {
  if (look->read_failed || look->blocks.empty()) return finish(look);
  look->daemon.reactor().offload(
      [look] {
        delta::StreamCompressor compressor({.window_log = 21});
        Bytes coded;
        for (size_t at = 0; at < look->blocks.size(); at += kFrame) {
          Bytes frame;
          for (size_t i = at; i < std::min(at + kFrame, look->blocks.size()); ++i)
            frame.insert(frame.end(), look->blocks[i].begin(), look->blocks[i].end());
          coded.clear();
          compressor.compress(frame, coded);
        }
        look->ratio =
            static_cast<double>(compressor.totals().coded_bytes) / static_cast<double>(compressor.totals().raw_bytes);
      },
      [look] { finish(look); });
}

// What the blocks hold by now is as good as what was written: the same guest wrote it.
void read_blocks(const std::shared_ptr<Look>& look) {
  struct Place {
    TrackedDevice* device;
    uint64_t offset;
  };
  std::vector<Place> places;
  for (size_t i = 0; i < look->volumes.size(); ++i) {
    const auto volume = look->daemon.volume(look->volumes[i]);
    if (!volume) continue;
    (*volume)->device().sample_writes(nullptr);
    const WriteSample& sample = *look->samples[i];
    const std::vector<uint64_t> blocks = sample.blocks(kBlock);
    look->written_bytes += static_cast<double>(sample.written_bytes());
    // Where not every place was noted, the rest is taken to be like it.
    const double noted = static_cast<double>(std::max<uint64_t>(sample.noted_bytes(), 1));
    look->distinct_bytes += std::min(static_cast<double>(blocks.size() * kBlock), noted) *
                            (static_cast<double>(sample.written_bytes()) / noted);
    const size_t step = std::max<size_t>(blocks.size() / kBlocksRead, 1);
    for (size_t at = 0; at < blocks.size(); at += step) {
      const uint64_t offset = blocks[at] * kBlock;
      if (offset + kBlock <= (*volume)->device().size()) places.push_back({&(*volume)->device(), offset});
    }
  }
  if (places.empty()) return compress(look);
  look->blocks.assign(places.size(), Bytes(kBlock));
  look->reads_left = places.size();
  for (size_t i = 0; i < places.size(); ++i) {
    read_block(places[i].device->store(), places[i].offset, look->blocks[i].data(), kBlock, [look](Errno error) {
      look->read_failed = look->read_failed || error != 0;
      if (--look->reads_left == 0) compress(look);
    });
  }
}

}  // namespace

void measure_write_load(Daemon& daemon, const std::vector<std::string>& volumes, uint64_t link_rate,
                        std::function<void(uint64_t wire_rate)> done) {
  uint64_t written = 0;
  for (const std::string& name : volumes) written += daemon.write_rate(name).value_or(0);
  if (link_rate == 0 || written < link_rate) return done(0);
  auto look = std::make_shared<Look>(Look{.daemon = daemon,
                                          .volumes = volumes,
                                          .long_rate = written,
                                          .done = std::move(done),
                                          .begun = daemon.reactor().now()});
  for (const std::string& name : volumes) {
    look->samples.push_back(std::make_shared<WriteSample>());
    if (const auto volume = daemon.volume(name); volume) (*volume)->device().sample_writes(look->samples.back());
  }
  daemon.reactor().start_timer(kWriteLookTime, [look] { read_blocks(look); });
}

}  // namespace vmferry
