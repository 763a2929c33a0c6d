// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/attachments.h"

#include <sys/epoll.h>
#include <sys/prctl.h>

#include <algorithm>
#include <cerrno>
#include <set>
#include <utility>

#include "engine/base/log.h"
#include "engine/base/text.h"
#include "engine/runtime/steps.h"
#include "kmod-shim/device_use.h"

namespace vmferry {

namespace {

constexpr Nanoseconds kTendInterval = kSecond;
constexpr Nanoseconds kMendDelay = 20 * kMillisecond;

std::string not_served(const std::string& volume) {
  return fmt::format("volume '{}' is not served now; see: vmferry volume show {}", volume, volume);
}

}  // namespace

Attachments::Attachments(Parts parts) : parts_(std::move(parts)), tend_timer_(parts_.reactor) {}

Attachments::~Attachments() {
  parts_.reactor.unwatch(links_watch_);
}

template <typename T>
void Attachments::on_worker(std::function<T()> work, std::function<void(T)> done) {
  auto result = std::make_shared<std::optional<T>>();
  ++work_count_;
  parts_.reactor.offload([work = std::move(work), result] { *result = work(); },
                         [this, alive = alive_.token(), done = std::move(done), result] {
                           if (!alive()) return;
                           --work_count_;
                           done(std::move(**result));
                           if (!alive() || !stopped_ || work_count_ > 0) return;
                           for (const auto& waiter : std::exchange(idle_waiters_, {})) waiter();
                         });
}

std::string Attachments::device_of(const std::string& volume) const {
  const auto record = records().find(volume);
  return record != records().end() ? record->second.device : std::string();
}

Json Attachments::to_json(const std::string& volume) const {
  const auto record = records().find(volume);
  if (record == records().end()) return nullptr;
  const auto entry = entries_.find(volume);
  const bool connected = entry != entries_.end() && entry->second.connected && entry->second.trouble.empty();
  return {
      {"device", record->second.device},
      {"state", connected ? "connected" : "disconnected"},
      {"error", entry == entries_.end() || entry->second.trouble.empty() ? Json(nullptr) : Json(entry->second.trouble)},
      {"connections", record->second.connections},
      {"dead_timeout_s", record->second.dead_timeout_s},
      {"request_timeout_s", record->second.request_timeout_s}};
}

// A daemon that waited for its own device would wait for ever. By name only: anything that has to look at the file
// could already wait.
Status Attachments::check_path(const std::string& path) const {
  for (const auto& [volume, record] : records()) {
    if (path != record.device && !path.starts_with(record.device + "p")) continue;
    return fail(ErrorKind::InvalidArgument,
                "'{}' is volume '{}' of this daemon, which would wait for itself; use another file or device", path,
                volume);
  }
  return {};
}

Status Attachments::check_wish(const AttachWish& wish) const {
  Volume* const volume = parts_.volume(wish.volume);
  if (volume == nullptr) return fail(ErrorKind::Unavailable, "{}", not_served(wish.volume));
  if (const std::string device = device_of(wish.volume); !device.empty()) {
    return fail(ErrorKind::Exists, "volume '{}' is attached already, as {}", wish.volume, device);
  }
  if (!parts_.may_write(wish.volume)) {
    return fail(ErrorKind::Fenced,
                "volume '{0}' is secondary here: its content changes below any file system, and writes are refused; "
                "attach it at its primary, or first: vmferry promote {0}",
                wish.volume);
  }
  if (wish.connections < 1 || wish.connections > kAttachConnectionsMax) {
    return fail(ErrorKind::InvalidArgument, "--connections is 1 to {}, not {}", kAttachConnectionsMax,
                wish.connections);
  }
  if (wish.request_timeout_s < 1 || wish.dead_timeout_s < wish.request_timeout_s) {
    return fail(ErrorKind::InvalidArgument,
                "--dead-timeout ({} s) has to be at least --request-timeout ({} s), and that one second",
                wish.dead_timeout_s, wish.request_timeout_s);
  }
  if (const uint64_t size = volume->device().size(); size < 4096) {
    return fail(ErrorKind::InvalidArgument,
                "volume '{0}' has {1} bytes, too small for a block device (4096): vmferry volume resize {0} SIZE",
                wish.volume, size);
  }
  for (const auto& [name, record] : records()) {
    if (record.device == wish.device) {
      return fail(ErrorKind::Busy, "{} is volume '{}': leave --device out, or first: vmferry detach {}", wish.device,
                  name, name);
    }
  }
  return {};
}

void Attachments::attach(const AttachWish& asked, Done done) {
  AttachWish wish = asked;
  if (!wish.device.empty()) {
    auto device = parts_.driver->device_of(wish.device);
    if (!device) return done(tl::unexpected(device.error()));
    wish.device = std::move(*device);
  }
  if (Status allowed = check_wish(wish); !allowed) return done(allowed);
  Entry& entry = entries_[wish.volume];
  if (entry.busy) return done(fail(ErrorKind::Busy, "volume '{}' is just being attached; try again", wish.volume));
  entry = {.busy = true};
  std::vector<std::string> reserved;
  for (const auto& [volume, record] : records()) reserved.push_back(record.device);
  on_worker<Result<std::string>>(
      [driver = parts_.driver, device = wish.device, reserved]() -> Result<std::string> {
        if (device.empty()) return driver->find_free(reserved);
        const auto state = driver->state_of(device, "");
        if (!state) return tl::unexpected(state.error());
        if (*state == KernelDeviceState::Free) return device;
        return fail(ErrorKind::Busy, "{} is attached to something else already: leave --device out, or free it first",
                    device);
      },
      [this, wish, done = std::move(done)](const Result<std::string>& device) {
        if (!device) {
          entries_.erase(wish.volume);
          return done(tl::unexpected(device.error()));
        }
        attach_as(wish.volume,
                  {.device = *device,
                   .identifier = "vmferry:" + parts_.reactor.new_id().to_string(),
                   .connections = wish.connections,
                   .dead_timeout_s = wish.dead_timeout_s,
                   .request_timeout_s = wish.request_timeout_s},
                  done);
      });
}

// Recorded first: a crash in between leaves an attachment that the next start completes, never a device without one.
void Attachments::attach_as(const std::string& volume, const AttachmentRecord& record, Done done) {
  run_steps(
      {[this, volume, record](StepDone next) {
         for (const auto& [name, other] : records()) {
           if (other.device == record.device) {
             return next(fail(ErrorKind::Busy, "{} was just taken for volume '{}'; try again", record.device, name));
           }
         }
         parts_.state().update([&](NodeRecord& node) { node.attachments[volume] = record; }, std::move(next));
       },
       [this, volume](StepDone next) { give_sockets(volume, true, std::move(next)); }},
      [this, volume, device = record.device, done = std::move(done)](const Status& status) {
        if (!status) {
          return released(volume, device, [done, status](const Status&) { done(status); });
        }
        entries_[volume].busy = false;
        log::info("volume={} attached={}", volume, device);
        parts_.events.add("volume_attached", {{"volume", volume}, {"device", device}});
        watch_links();
        tend_all();
        done({});
      });
}

// New connections for a device that was just chosen, or in the place of those that died.
void Attachments::give_sockets(const std::string& volume, bool new_device, Done done) {
  Volume* const served = parts_.volume(volume);
  if (served == nullptr || stopped_) return done(fail(ErrorKind::Unavailable, "{}", not_served(volume)));
  protect_from_reclaim();
  const AttachmentRecord record = records().at(volume);
  // Those that are alive stay.
  const uint64_t alive_count = new_device || !entries_[volume].connected ? 0 : served->kernel_connections();
  const uint32_t count =
      record.connections - static_cast<uint32_t>(std::min<uint64_t>(alive_count, record.connections - 1));
  make_kernel_sockets(
      parts_.reactor, served->kernel_export(), volume, record.device, count,
      [this, alive = alive_.token(), volume, record, new_device, done = std::move(done)](Result<KernelSockets> made) {
        if (!alive()) return;
        if (!made) return done(fail_with(made.error(), fmt::format("connections for {}", record.device)));
        if (stopped_) return done(fail(ErrorKind::Unavailable, "the daemon stops"));
        // The kernel takes references; ours end with this.
        const auto sockets = std::make_shared<KernelSockets>(std::move(*made));
        KernelDeviceSpec spec = spec_of(record, sockets->facts.size);
        spec.server_flags = sockets->facts.flags;
        for (const UniqueFd& fd : sockets->fds) spec.sockets.push_back(fd.get());
        on_worker<Status>([driver = parts_.driver, spec,
                           new_device] { return new_device ? driver->attach(spec) : driver->reconfigure(spec); },
                          [this, volume, sockets, done](const Status& status) {
                            sockets->fds.clear();
                            if (status) entries_[volume].connected = true;
                            done(status);
                          });
      });
}

KernelDeviceSpec Attachments::spec_of(const AttachmentRecord& record, uint64_t size) const {
  return {.device = record.device,
          .identifier = record.identifier,
          .size = size,
          .request_timeout_s = record.request_timeout_s,
          .dead_timeout_s = record.dead_timeout_s};
}

// The kernel has let go of the device, or never had it.
void Attachments::released(const std::string& volume, const std::string& device, Done done) {
  run_steps({[this, volume](StepDone next) {
               Volume* const served = parts_.volume(volume);
               if (served == nullptr) return next({});
               served->close_kernel_export([next] { next({}); });
             },
             [this, volume, device](StepDone next) {
               const auto record = records().find(volume);
               if (record == records().end() || record->second.device != device) return next({});
               parts_.state().update([&](NodeRecord& node) { node.attachments.erase(volume); }, std::move(next));
             }},
            [this, volume, done = std::move(done)](const Status& status) {
              entries_.erase(volume);
              if (records().empty()) {  // the module may go and come back, and then this hears nothing any more
                parts_.reactor.unwatch(std::exchange(links_watch_, 0));
                links_.reset();
              }
              done(status);
            });
}

void Attachments::detach(const std::string& what, bool force, Done done) {
  std::string volume;
  for (const auto& [name, record] : records()) {
    if (name == what || record.device == what) volume = name;
  }
  if (volume.empty()) {
    return done(fail(ErrorKind::NotFound, "nothing is attached as '{}'; see: vmferry volume list", printable(what)));
  }
  Entry& entry = entries_[volume];
  if (entry.busy) return done(fail(ErrorKind::Busy, "{} is just being reconnected; try again", device_of(volume)));
  entry.busy = true;
  on_worker<Status>(
      [driver = parts_.driver, record = records().at(volume), volume, force, well = is_well(volume)]() -> Status {
        const auto state = driver->state_of(record.device, record.identifier);
        if (!state && state.error().kind != ErrorKind::Unavailable) return tl::unexpected(state.error());
        if (!state || *state != KernelDeviceState::Ours) return {};  // somebody has done it
        if (force) return driver->detach(record.device);
        if (!well) {
          return fail(
              ErrorKind::Busy,
              "{0} has no connection now, and what programs wrote to it would be lost; wait, or: vmferry detach "
              "{1} --force",
              record.device, volume);
        }
        const auto claim = claim_unused_device(record.device);
        if (claim) return driver->detach(record.device);
        return fail(claim.error().kind,
                    "{0} is in use: {1}; end that first. With --force its programs get I/O errors and lose what they "
                    "have not synced: vmferry detach {2} --force",
                    record.device, claim.error().text, volume);
      },
      [this, volume, device = records().at(volume).device, done = std::move(done)](const Status& status) {
        entries_[volume].busy = false;
        if (!status) return done(status);
        entries_[volume].busy = true;
        released(volume, device, [this, volume, device, done](const Status& forgotten) {
          log::info("volume={} detached={}", volume, device);
          parts_.events.add("volume_detached", {{"volume", volume}, {"device", device}});
          done(forgotten);
        });
      });
}

void Attachments::volume_grew(const std::string& volume, Done done) {
  const auto record = records().find(volume);
  Volume* const served = parts_.volume(volume);
  // Without a connection it learns the size with the next one.
  if (record == records().end() || !is_well(volume)) return done({});
  const KernelDeviceSpec spec = spec_of(record->second, served->device().size());
  on_worker<Status>([driver = parts_.driver, spec] { return driver->reconfigure(spec); },
                    [volume, spec, done = std::move(done)](const Status& status) {
                      if (status) return done({});
                      done(fail(status.error().kind,
                                "volume '{0}' has {1} bytes now, but {2} keeps its size until it is attached anew: {3}",
                                volume, spec.size, spec.device, status.error().text));
                    });
}

void Attachments::start() {
  tend_all();
}

void Attachments::stop(std::function<void()> done) {
  stopped_ = true;
  tend_timer_.cancel();
  parts_.reactor.unwatch(std::exchange(links_watch_, 0));
  links_.reset();
  if (work_count_ == 0) return parts_.reactor.post(std::move(done));
  idle_waiters_.push_back(std::move(done));
}

void Attachments::tend_all() {
  if (stopped_ || records().empty()) return;
  const Records all = records();  // tend() may change it
  for (const auto& [volume, record] : all) tend(volume);
  tend_timer_.start(kTendInterval, [this] { tend_all(); });
}

bool Attachments::is_well(const std::string& volume) const {
  const auto found = entries_.find(volume);
  Volume* const served = parts_.volume(volume);
  return found != entries_.end() && served != nullptr && found->second.connected &&
         served->kernel_connections() >= records().at(volume).connections;
}

void Attachments::tend(const std::string& volume) {
  Entry& entry = entries_[volume];
  if (entry.busy || stopped_ || is_well(volume)) return;
  if (parts_.volume(volume) == nullptr)
    return note_trouble(volume, fail(ErrorKind::Unavailable, "{}", not_served(volume)));
  entry.busy = true;
  const auto tended = [this, volume](const Status& status) {
    entries_[volume].busy = false;
    note_trouble(volume, status);
    if (status) watch_links();
  };
  on_worker<Result<KernelDeviceState>>(
      [driver = parts_.driver, record = records().at(volume)] {
        return driver->state_of(record.device, record.identifier);
      },
      [this, volume, tended](const Result<KernelDeviceState>& state) {
        const std::string device = device_of(volume);
        if (!state) return tended(tl::unexpected(state.error()));
        if (*state == KernelDeviceState::Ours) return give_sockets(volume, false, tended);
        if (*state == KernelDeviceState::Taken) {
          return tended(fail(ErrorKind::Busy, "{0} is attached to something else; free it, or: vmferry detach {1}",
                             device, volume));
        }
        // The host was restarted, or somebody detached it behind our back.
        if (parts_.may_write(volume)) return give_sockets(volume, true, tended);
        tended(fail(ErrorKind::Fenced, "{0} cannot come back: volume '{1}' is secondary here; vmferry detach {1}",
                    device, volume));
      });
}

void Attachments::note_trouble(const std::string& volume, const Status& status) {
  const std::string now = status ? std::string() : status.error().text;
  Entry& entry = entries_[volume];
  if (!status) entry.connected = false;
  const bool news = now != entry.trouble || status;
  entry.trouble = now;
  if (!news) return;
  const std::string device = device_of(volume);
  if (status) {
    log::info("volume={} device={} state=connected", volume, device);
    parts_.events.add("attachment_connected", {{"volume", volume}, {"device", device}});
  } else {
    log::warn("volume={} device={} state=disconnected reason=\"{}\"", volume, device, now);
    parts_.events.add("attachment_disconnected", {{"volume", volume}, {"device", device}, {"reason", now}});
  }
}

// The kernel says at once when a connection dies. Which ones did shows in our ends of them, after the loop has seen
// these; what is missed shows in the next round of tend_all().
void Attachments::watch_links() {
  if (links_ != nullptr || stopped_) return;
  auto links = parts_.driver->watch_dead_links();
  if (!links) return log::warn("attach: {}", links.error().text);
  links_ = std::move(*links);
  links_watch_ = parts_.reactor.watch(links_->fd(), EPOLLIN, [this](uint32_t) { links_died(); });
}

void Attachments::links_died() {
  const std::vector<std::string> devices = links_->take();
  const std::set<std::string> dead(devices.begin(), devices.end());
  for (const auto& [volume, record] : records()) {
    if (dead.contains(record.device)) return tend_timer_.start(kMendDelay, [this] { tend_all(); });
  }
}

// Memory of this thread must not be freed by writing to the device that only this thread serves (prctl(2),
// PR_SET_IO_FLUSHER; needs CAP_SYS_RESOURCE).
void Attachments::protect_from_reclaim() {
  if (std::exchange(flusher_, true)) return;
  if (::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0) {
    log::warn("attach: PR_SET_IO_FLUSHER: {}; with little free memory the daemon may wait for its own device",
              errno_text(errno));
  }
}

}  // namespace vmferry
