// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/nbd_tls.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "engine/runtime/unique_fd.h"

namespace vmferry {

namespace {

constexpr size_t kFileSizeMax = 4U << 20;

enum class Content : uint8_t { Public, Secret };
enum class Presence : uint8_t { Required, Optional };

Result<std::string> read_file(const std::string& path, Content content, Presence presence = Presence::Required) {
  const UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!fd.valid()) {
    if (errno == ENOENT && presence == Presence::Optional) return std::string();
    return fail(errno == ENOENT ? ErrorKind::NotFound : ErrorKind::Denied, "cannot read '{}': {}", path,
                errno_text(errno));
  }
  struct stat info {};
  if (fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    return fail(ErrorKind::InvalidArgument, "'{}' is not a file", path);
  }
  if (content == Content::Secret && (info.st_mode & 0007) != 0) {
    return fail(ErrorKind::Denied, "'{}' holds a secret and is open to everybody: chmod o= {}", path, path);
  }
  std::string text;
  char part[16384];
  for (;;) {
    const ssize_t size = read(fd.get(), part, sizeof part);
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return fail(ErrorKind::Io, "cannot read '{}': {}", path, errno_text(errno));
    if (size == 0) break;
    text.append(part, static_cast<size_t>(size));
    if (text.size() > kFileSizeMax) return fail(ErrorKind::LimitExceeded, "'{}' is larger than 4 MiB", path);
  }
  if (text.empty()) return fail(ErrorKind::InvalidArgument, "'{}' is empty", path);
  return text;
}

}  // namespace

Result<std::shared_ptr<const TlsCredentials>> load_nbd_credentials(const NbdTlsConfig& config) {
  if (config.certificates.empty() && config.psk.empty()) return std::shared_ptr<const TlsCredentials>();
  TlsCredentialTexts texts;
  struct Source {
    std::string* text;
    std::string path;
    Content content;
    Presence presence = Presence::Required;
  };
  std::vector<Source> sources;
  std::string from;
  if (const std::string& folder = config.certificates; !folder.empty()) {
    sources.push_back({&texts.ca_certificate, folder + "/ca-cert.pem", Content::Public});
    sources.push_back({&texts.server_certificate, folder + "/server-cert.pem", Content::Public});
    sources.push_back({&texts.server_key, folder + "/server-key.pem", Content::Secret});
    sources.push_back({&texts.revocation_list, folder + "/ca-crl.pem", Content::Public, Presence::Optional});
    from = "nbd-tls-certificates '" + folder + "'";
  }
  if (!config.psk.empty()) {
    sources.push_back({&texts.psk_users, config.psk, Content::Secret});
    from += (from.empty() ? "nbd-tls-psk '" : ", nbd-tls-psk '") + config.psk + "'";
  }
  for (const Source& source : sources) {
    auto text = read_file(source.path, source.content, source.presence);
    if (!text) return fail_with(text.error(), "TLS of the NBD exports");
    *source.text = std::move(*text);
  }
  auto credentials = TlsCredentials::create(texts);
  if (!credentials) return fail_with(credentials.error(), from);
  return credentials;
}

}  // namespace vmferry
