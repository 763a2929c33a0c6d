// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/socket_dialer.h"

#include <utility>

namespace vmferry {

SocketOptions peer_socket_options() {
  return {.notsent_lowat = 128 * 1024, .send_buffer = 0, .receive_buffer = 0, .congestion = "bbr"};
}

void SocketDialer::connect(const std::string& address, Done done) {
  const auto endpoint = Endpoint::parse(address);
  if (!endpoint) {
    reactor_.post([done = std::move(done), error = endpoint.error()] { done(tl::unexpected(error)); });
    return;
  }
  // The caller has its own, shorter timeout; this one only ends what nobody waits for any more.
  const ConnectOptions options{.timeout = 10 * kSecond, .socket = peer_socket_options()};
  const auto attempt = attempts_.emplace(attempts_.end(), reactor_);
  attempt->done = std::move(done);
  attempt->connector.connect(*endpoint, options, [this, attempt](Result<std::unique_ptr<SocketStream>> stream) {
    const Done finished = std::move(attempt->done);
    attempts_.erase(attempt);
    if (!stream) return finished(tl::unexpected(stream.error()));
    finished(std::unique_ptr<ByteStream>(std::move(*stream)));
  });
}

}  // namespace vmferry
