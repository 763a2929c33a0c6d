// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "engine/base/text.h"
#include "engine/daemon/commands.h"
#include "engine/daemon/daemon.h"

namespace vmferry {

namespace {

Result<uint32_t> seconds_of(const RpcCall& call, const char* key, uint32_t otherwise) {
  const auto text = call.optional_text(key);
  if (!text) return tl::unexpected(text.error());
  if (text->empty()) return otherwise;
  const auto duration = parse_duration(*text);
  if (!duration) return tl::unexpected(duration.error());
  const Nanoseconds seconds = *duration / kSecond;
  if (*duration % kSecond != 0 || seconds > INT32_MAX) {
    return fail(ErrorKind::InvalidArgument, "'{}' has to be whole seconds, not '{}'", key, printable(*text));
  }
  return static_cast<uint32_t>(seconds);
}

Result<AttachWish> read_wish(const RpcCall& call) {
  AttachWish wish;
  const auto volume = call.text("volume");
  const auto device = call.optional_text("device");
  const auto connections = call.optional_text("connections", "1");
  for (const auto* text : {&volume, &device, &connections}) {
    if (!*text) return tl::unexpected(text->error());
  }
  const auto count = parse_uint(*connections);
  if (!count) return tl::unexpected(count.error());
  const auto dead = seconds_of(call, "dead_timeout", wish.dead_timeout_s);
  const auto request = seconds_of(call, "request_timeout", wish.request_timeout_s);
  if (!dead) return tl::unexpected(dead.error());
  if (!request) return tl::unexpected(request.error());
  wish.volume = *volume;
  wish.device = *device;
  wish.connections = static_cast<uint32_t>(std::min<uint64_t>(*count, UINT32_MAX));
  wish.dead_timeout_s = *dead;
  wish.request_timeout_s = *request;
  return wish;
}

}  // namespace

void add_attach_methods(RpcServer& server, Daemon& daemon) {
  server.add_method("attach", [&daemon](const RpcCallPtr& call) {
    const auto wish = read_wish(*call);
    if (!wish) return call->error(wish.error());
    if (const auto volume = daemon.volume(wish->volume); !volume) return call->error(volume.error());
    daemon.attachments().attach(*wish, [&daemon, call, volume = wish->volume](const Status& status) {
      if (!status) return call->error(status.error());
      Json result = daemon.attachments().to_json(volume);
      result["volume"] = volume;
      call->result(result);
    });
  });
  server.add_method("detach", [&daemon](const RpcCallPtr& call) {
    const auto what = call->text("what");
    const auto force = call->flag("force");
    if (!what) return call->error(what.error());
    if (!force) return call->error(force.error());
    daemon.attachments().detach(*what, *force, [call, what = *what](const Status& status) {
      if (!status) return call->error(status.error());
      call->result({{"detached", what}});
    });
  });
}

}  // namespace vmferry
