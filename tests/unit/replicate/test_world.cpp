// SPDX-License-Identifier: Apache-2.0
#include "tests/unit/replicate/test_world.h"

#include <cerrno>

#include "engine/base/assert.h"

namespace vmferry::testing {

namespace {

// Requests that never completed because their host crashed: nobody may free them, and they are no leak either.
std::vector<BlockRequest*>& graveyard() {
  // Never destroyed: the leak check comes after the destructors.
  static auto* const requests = new std::vector<BlockRequest*>();
  return *requests;
}

}  // namespace

Bytes pattern(size_t size, uint64_t seed) {
  Random random(seed);
  Bytes out(size);
  for (auto& byte : out) byte = static_cast<uint8_t>(random.next());
  return out;
}

// --- Executor

TimerId TestExecutor::add(Nanoseconds delay, Task task) {
  const TimerId id = ++order_;
  const Key key{now_ + delay, id};
  events_.emplace(key, std::move(task));
  keys_.emplace(id, key);
  return id;
}

void TestExecutor::cancel_timer(TimerId id) {
  const auto found = keys_.find(id);
  if (found == keys_.end()) return;
  events_.erase(found->second);
  keys_.erase(found);
}

void TestExecutor::offload(Task work, Task done) {
  add(static_cast<Nanoseconds>(random.below(200)) * kMicrosecond, [work = std::move(work), done = std::move(done)] {
    work();
    done();
  });
}

Id128 TestExecutor::new_id() {
  Id128 id;
  for (auto& byte : id.bytes) byte = static_cast<uint8_t>(random.next());
  id.bytes[0] |= 1;
  return id;
}

bool TestExecutor::run_one() {
  if (events_.empty()) return false;
  auto node = events_.extract(events_.begin());
  keys_.erase(node.key().second);
  now_ = std::max(now_, node.key().first);
  node.mapped()();
  return true;
}

void TestExecutor::run_for(Nanoseconds duration) {
  const Nanoseconds until = now_ + duration;
  while (!events_.empty() && events_.begin()->first.first <= until) run_one();
  now_ = until;
}

bool TestExecutor::run_until(const std::function<bool()>& condition, Nanoseconds limit) {
  const Nanoseconds until = now_ + limit;
  while (!condition()) {
    if (events_.empty() || events_.begin()->first.first > until) return false;
    run_one();
  }
  return true;
}

// --- Disk

TestDisk::TestDisk(TestExecutor& executor, uint64_t size) : data(size, 0), executor_(executor), durable_(size, 0) {
  limits_.can_punch = true;
}

TestDisk::~TestDisk() {
  graveyard().insert(graveyard().end(), requests_.begin(), requests_.end());
}

void TestDisk::submit(BlockRequest& request) noexcept {
  VF_ASSERT(request.op == BlockOp::Flush || fits_in(request.range.offset, request.range.length, data.size()));
  ++in_flight_;
  requests_.insert(&request);
  const auto delay = static_cast<Nanoseconds>(20 + executor_.random.below(300)) * kMicrosecond;
  // A flush covers what was complete when it was submitted.
  std::shared_ptr<std::set<uint64_t>> covered;
  if (request.op == BlockOp::Flush) covered = std::make_shared<std::set<uint64_t>>(unflushed_);
  const Errno failed = covered ? std::exchange(flush_error_once, 0) : 0;
  executor_.start_timer(delay, [this, &request, covered, failed, life = life_] {
    if (life != life_) return;
    --in_flight_;
    requests_.erase(&request);
    if (failed != 0) return request.completion->block_done(request, failed);
    if (covered && flush_error == 0) {
      for (const uint64_t sector : *covered) {
        const uint64_t at = sector * kSector;
        std::memcpy(&durable_[at], &data[at], std::min(kSector, data.size() - at));
        unflushed_.erase(sector);
      }
    }
    complete(request);
  });
}

void TestDisk::complete(BlockRequest& request) {
  Errno error = 0;
  const uint64_t at = request.range.offset;
  const uint64_t length = request.range.length;
  switch (request.op) {
    case BlockOp::Read:
      std::memcpy(request.data, &data[at], length);
      read_bytes += length;
      break;
    case BlockOp::Write:
    case BlockOp::WriteZeroes:
      error = at + length > write_error_from && at < write_error_to ? write_error : 0;
      if (error != 0) break;
      ++writes;
      if (request.op == BlockOp::Write) {
        std::memcpy(&data[at], request.data, length);
      } else {
        std::memset(&data[at], 0, length);
      }
      for (uint64_t sector = at / kSector; sector * kSector < at + length; ++sector) {
        unflushed_.insert(sector);
        if (request.fua) {
          std::memcpy(&durable_[sector * kSector], &data[sector * kSector],
                      std::min(kSector, data.size() - sector * kSector));
          unflushed_.erase(sector);
        }
      }
      break;
    case BlockOp::Flush:
      error = flush_error;
      break;
  }
  request.completion->block_done(request, error);
}

void TestDisk::query_extents(ByteRange range, size_t extents_max, ExtentsDone done) {
  std::vector<Extent> extents;
  for (uint64_t at = range.offset; at < range.end() && extents.size() <= extents_max;) {
    const uint64_t end = std::min(range.end(), round_down(at, 4096) + 4096);
    bool hole = true;
    for (uint64_t i = at; i < end && hole; ++i) hole = data[i] == 0;
    if (!extents.empty() && extents.back().hole == hole) {
      extents.back().range.length += end - at;
    } else {
      if (extents.size() == extents_max) break;
      extents.push_back({{at, end - at}, hole, hole});
    }
    at = end;
  }
  executor_.start_timer(query_delay, [extents = std::move(extents), done = std::move(done), this, life = life_] {
    if (life == life_) done(extents);
  });
}

void TestDisk::crash() {
  ++life_;
  in_flight_ = 0;
  // What was under way may have reached the medium in part.
  for (const BlockRequest* request : requests_) {
    if (!is_mutating(request->op)) continue;
    for (uint64_t i = 0; i < request->range.length; ++i) {
      const uint64_t at = request->range.offset + i;
      if (i == 0 || at % kSector == 0) {
        if (executor_.random.chance(1, 2)) {
          i += std::min(kSector - at % kSector, request->range.length - i) - 1;
          continue;
        }
      }
      durable_[at] = request->op == BlockOp::Write ? request->data[i] : uint8_t{0};
    }
  }
  graveyard().insert(graveyard().end(), requests_.begin(), requests_.end());
  requests_.clear();
  for (const uint64_t sector : unflushed_) {
    if (executor_.random.chance(1, 2)) continue;
    const uint64_t at = sector * kSector;
    std::memcpy(&durable_[at], &data[at], std::min(kSector, data.size() - at));
  }
  unflushed_.clear();
  data = durable_;
}

// --- Link

bool TestChannel::connected() const {
  return link->up;
}

void TestChannel::send(TrafficClass traffic, MessageType type, Bytes payload) {
  if (!link->up) return;
  const auto lane = static_cast<size_t>(traffic);
  if (tamper) tamper(type, payload);
  ++sent_messages;
  sent_bytes += payload.size();
  queued[lane] += payload.size();
  TestExecutor& executor = link->executor;
  const auto duration = static_cast<Nanoseconds>(payload.size() * 1'000'000'000U / link->bytes_per_second);
  ready_at[lane] = std::max(executor.now(), ready_at[lane]) + duration;
  const Nanoseconds jitter = static_cast<Nanoseconds>(executor.random.below(50)) * kMicrosecond;
  const Nanoseconds left = ready_at[lane] - executor.now();
  auto message = std::make_shared<Bytes>(std::move(payload));
  executor.start_timer(left, [this, lane, traffic, message, life = link->life] {
    if (life != link->life) return;
    queued[lane] -= message->size();
    if (writable) writable(traffic);
  });
  ready_at[lane] += jitter;
  executor.start_timer(left + jitter + link->delay, [this, type, message, life = link->life] {
    if (life == link->life && other->deliver) other->deliver(type, *message);
  });
}

// --- Host

TestHost::TestHost(TestExecutor& e, const HostOptions& options) : executor(e) {
  for (const uint64_t size : options.volume_sizes) {
    stores.push_back(std::make_unique<TestDisk>(e, size));
    metadata.push_back(std::make_unique<TestDisk>(e, TrackedDevice::metadata_size(size)));
  }
  staging = std::make_unique<TestDisk>(e, options.staging_size);
}

void TestHost::boot() {
  size_t pending = stores.size() + 1;
  Status failed{};
  const auto done = [&](Status status) {
    if (!status) failed = status;
    --pending;
  };
  for (size_t i = 0; i < stores.size(); ++i) {
    TrackOptions track;
    track.name = fmt::format("v{}", i);
    devices.push_back(std::make_unique<TrackedDevice>(executor, *stores[i], *metadata[i], std::move(track)));
    devices.back()->open(done);
  }
  state = std::make_unique<ReplicaState>(*staging);
  state->open(done);
  VF_ASSERT(executor.run_until([&] { return pending == 0; }));
  VF_ASSERT(failed.has_value());
  up = true;
}

std::vector<ReplicaVolume> TestHost::volumes() const {
  std::vector<ReplicaVolume> out;
  for (size_t i = 0; i < devices.size(); ++i) out.push_back({fmt::format("v{}", i), devices[i].get()});
  return out;
}

void TestHost::crash() {
  up = false;
  for (auto& disk : stores) disk->crash();
  for (auto& disk : metadata) disk->crash();
  staging->crash();
  sender.reset();
  receiver.reset();
  state.reset();
  abandon_devices();
}

TestHost::~TestHost() {
  abandon_devices();
}

// What a device had in flight never completes; it stays reachable through the device, for the leak check.
void TestHost::abandon_devices() {
  static auto* const abandoned = new std::vector<std::unique_ptr<TrackedDevice>>();
  std::move(devices.begin(), devices.end(), std::back_inserter(*abandoned));
  devices.clear();
}

// --- World

TestWorld::TestWorld(WorldOptions o)
    : options(std::move(o)),
      executor(options.seed),
      link(executor),
      a(executor, options.host),
      b(executor, options.host) {
  a.boot();
  b.boot();
  const auto wire = [this](TestHost& host) {
    TestChannel& channel = channel_of(host);
    channel.deliver = [this, &host](MessageType type, const Bytes& payload) { deliver(host, type, payload); };
    channel.writable = [&host](TrafficClass traffic) {
      if (host.sender) host.sender->on_writable(traffic);
    };
  };
  wire(a);
  wire(b);
}

TestWorld::~TestWorld() {
  a.sender.reset();
  b.sender.reset();
  a.receiver.reset();
  b.receiver.reset();
}

void TestWorld::deliver(TestHost& host, MessageType type, const Bytes& payload) {
  Status status{};
  if (host.sender) status = host.sender->on_message(type, payload);
  if (host.receiver) status = host.receiver->on_message(type, payload);
  if (!status) protocol_error = status.error();
}

void TestWorld::start_source(TestHost& host) {
  source = &host;
  host.receiver.reset();
  for (auto& device : host.devices) {
    device->serve_zeroes(false);
    device->set_gate(WriteGate::Open);
  }
  host.sender = std::make_unique<Sender>(executor, channel_of(host), *host.state, host.volumes(), options.sender);
  std::optional<Status> started;
  host.sender->start([&](Status status) { started = status; });
  VF_ASSERT(executor.run_until([&] { return started.has_value(); }));
  VF_ASSERT(started->has_value());
  ++life_;
  writes_in_flight = 0;
  note_quiet();
}

void TestWorld::start_copy(TestHost& host) {
  copy = &host;
  host.sender.reset();
  for (auto& device : host.devices) device->set_gate(WriteGate::ReadOnly);
  ReceiverEvents events;
  events.epoch_applied = [this, &host](uint64_t epoch, CopyQuality quality) {
    Bytes image;
    for (auto& store : host.stores) image.insert(image.end(), store->data.begin(), store->data.end());
    applied[epoch] = {quality, xxh3_128(image)};
  };
  events.final_epoch_applied = [this](const Id128& attempt, uint64_t epoch) { finals.emplace_back(attempt, epoch); };
  events.protocol_error = [this](const Error& error) { protocol_error = error; };
  host.receiver = std::make_unique<Receiver>(executor, channel_of(host), *host.state, *host.staging, host.volumes(),
                                             options.receiver, std::move(events));
  std::optional<Status> opened;
  host.receiver->open([&](Status status) { opened = status; });
  VF_ASSERT(executor.run_until([&] { return opened.has_value(); }));
  VF_ASSERT(opened->has_value());
}

Status TestWorld::connect() {
  VF_ASSERT(!link.up);
  link.up = true;
  ++link.life;
  for (TestChannel* channel : {&link.a, &link.b}) {
    std::fill(std::begin(channel->queued), std::end(channel->queued), 0U);
    std::fill(std::begin(channel->ready_at), std::end(channel->ready_at), 0);
  }
  GroupHello from_source;
  GroupHello from_copy;
  source->sender->fill_hello(from_source);
  copy->receiver->fill_hello(from_copy);
  const auto source_hello = decode_group_hello(encode(from_source));
  const auto copy_hello = decode_group_hello(encode(from_copy));
  VF_ASSERT(source_hello && copy_hello);
  const Status by_copy = copy->receiver->on_peer_hello(*source_hello);
  const Status by_source = source->sender->on_peer_hello(*copy_hello);
  if (!by_copy || !by_source) {
    cut();
    return by_copy ? by_source : by_copy;
  }
  return {};
}

void TestWorld::cut() {
  if (!link.up) return;
  link.up = false;
  ++link.life;
  if (source != nullptr && source->sender) source->sender->on_disconnected();
  if (copy != nullptr && copy->receiver) copy->receiver->on_disconnected();
}

void TestWorld::crash_source() {
  cut();
  source->crash();
  ++life_;
  writes_in_flight = 0;
}

void TestWorld::crash_copy() {
  cut();
  copy->crash();
}

void TestWorld::note_quiet() {
  if (writes_in_flight == 0) quiet_images.insert(xxh3_128(source_image()));
}

GuestRequest& TestWorld::guest_request() {
  ++writes_in_flight;
  ++writes_total;
  guest_requests_.push_back(std::make_unique<GuestRequest>());
  GuestRequest& request = *guest_requests_.back();
  request.completion = &request;
  request.done = [this, &request, life = life_] {
    request.bytes = {};
    if (life != life_) return;
    --writes_in_flight;
    note_quiet();
  };
  return request;
}

void TestWorld::write(size_t volume, uint64_t offset, Bytes bytes) {
  GuestRequest& request = guest_request();
  request.op = BlockOp::Write;
  request.range = {offset, bytes.size()};
  request.bytes = std::move(bytes);
  request.data = request.bytes.data();
  source->devices[volume]->submit(request);
}

void TestWorld::zero(size_t volume, ByteRange range) {
  GuestRequest& request = guest_request();
  request.op = BlockOp::WriteZeroes;
  request.may_unmap = true;
  request.range = range;
  source->devices[volume]->submit(request);
}

void TestWorld::random_write() {
  Random& random = executor.random;
  const size_t volume = random.below(source->stores.size());
  const uint64_t size = source->stores[volume]->size();
  const uint64_t unit = random.chance(1, 4) ? 512 : 4096;
  const uint64_t offset = random.below(size / unit) * unit;
  const uint64_t length = std::min(size - offset, unit * (1 + random.below(8)));
  if (random.chance(1, 8)) return zero(volume, {offset, length});
  if (random.chance(1, 4)) {
    // Content that is elsewhere already.
    const uint64_t from = random.below((size - length) / 4096 + 1) * 4096;
    const Bytes& image = source->stores[volume]->data;
    const uint64_t usable = std::min(length, size - from);
    return write(
        volume, offset,
        Bytes(image.begin() + static_cast<int64_t>(from), image.begin() + static_cast<int64_t>(from + usable)));
  }
  write(volume, offset, pattern(length, random.next()));
}

bool TestWorld::sync(Nanoseconds limit) {
  // Only acknowledged writes are promised.
  if (!executor.run_until([this] { return writes_done(); }, limit)) return false;
  auto synced = std::make_shared<bool>(false);
  source->sender->wait_in_sync([synced](Status) { *synced = true; });
  return executor.run_until([synced] { return *synced; }, limit);
}

Bytes TestWorld::source_image() const {
  Bytes image;
  for (auto& store : source->stores) image.insert(image.end(), store->data.begin(), store->data.end());
  return image;
}

Bytes TestWorld::copy_image() const {
  Bytes image;
  for (auto& store : copy->stores) image.insert(image.end(), store->data.begin(), store->data.end());
  return image;
}

bool TestWorld::equal() const {
  return source_image() == copy_image();
}

WorldOptions small_world(uint64_t seed) {
  WorldOptions options;
  options.seed = seed;
  options.sender.interval = kSecond;
  options.sender.codec.window_log = 12;
  options.sender.urgent_window_log = 12;
  options.receiver.codec.window_log = 12;
  options.sender.index_bytes_max = 1 << 20;
  return options;
}

void start(TestWorld& world) {
  world.start_source(world.a);
  world.start_copy(world.b);
  VF_ASSERT(world.connect().has_value());
}

}  // namespace vmferry::testing
