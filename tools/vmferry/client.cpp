// SPDX-License-Identifier: Apache-2.0
#include "tools/vmferry/client.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace vmferry::cli {

namespace {

ErrorKind kind_of(const std::string& text) {
  for (int kind = 0; kind <= static_cast<int>(ErrorKind::Internal); ++kind) {
    if (text == to_string(static_cast<ErrorKind>(kind))) return static_cast<ErrorKind>(kind);
  }
  return ErrorKind::Internal;
}

Status send_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t sent = send(fd, text.data(), text.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return fail(ErrorKind::Unavailable, "the daemon closed the control socket: {}", errno_text(errno));
    text.remove_prefix(static_cast<size_t>(sent));
  }
  return {};
}

}  // namespace

Client::~Client() {
  if (fd_ >= 0) close(fd_);
}

Status Client::connect() {
  // sun_path holds 108 bytes with its final zero (unix(7)).
  const std::string path = control_.starts_with("unix:") ? control_.substr(5) : "";
  if (path.empty() || path.size() >= sizeof(sockaddr_un{}.sun_path)) {
    return fail(ErrorKind::InvalidArgument, "--control '{}' is not unix:PATH with a path of 1 to 107 bytes", control_);
  }
  fd_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd_ < 0) return fail(ErrorKind::Internal, "socket: {}", errno_text(errno));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    const int error = errno;
    if (error == EACCES) {
      return fail(ErrorKind::Denied, "control socket '{}': permission denied; run as the user of vmferryd", path);
    }
    return fail(ErrorKind::Unavailable,
                "no vmferryd answers at '{}' ({}); start it, or name its socket with --control unix:PATH", path,
                errno_text(error));
  }
  return {};
}

Result<Json> Client::call(const std::string& method, const Json& params, const Progress& progress) {
  if (fd_ < 0) {
    if (auto connected = connect(); !connected) return tl::unexpected(connected.error());
  }
  const Json id = 1;
  if (auto sent = send_all(fd_, to_json_line(rpc::encode_request(id, method, params))); !sent) {
    return tl::unexpected(sent.error());
  }
  JsonLineReader reader({.line_size_max = 16U << 20, .depth_max = 64});
  uint8_t buffer[65536];
  while (true) {
    const ssize_t got = recv(fd_, buffer, sizeof(buffer), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      return fail(ErrorKind::Unavailable, "vmferryd closed the connection during '{}'; see its log", method);
    }
    std::vector<Json> values;
    const Status fed = reader.feed(ByteSpan(buffer, static_cast<size_t>(got)), values);
    for (const Json& value : values) {
      if (value.is_object() && value.contains("method")) {
        if (progress && value.contains("params") && value["params"].contains("value")) {
          progress(value["params"]["value"]);
        }
        continue;
      }
      auto response = rpc::decode_response(value);
      if (!response) return tl::unexpected(response.error());
      if (!response->is_error) return std::move(response->result);
      const ErrorKind kind =
          response->code == rpc::kInvalidParams ? ErrorKind::InvalidArgument : kind_of(response->kind);
      return tl::unexpected(Error{kind, response->text});
    }
    if (!fed) return tl::unexpected(fed.error());
  }
}

}  // namespace vmferry::cli
