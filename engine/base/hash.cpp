// SPDX-License-Identifier: Apache-2.0
#include "engine/base/hash.h"

#include <openssl/evp.h>
#include <xxhash.h>

#include "engine/base/assert.h"

namespace vmferry {

namespace {

const EVP_MD* sha256_algorithm() {
  // Fetched once: EVP_sha256() alone makes OpenSSL 3 look the provider up again for every digest.
  static EVP_MD* const algorithm = EVP_MD_fetch(nullptr, "SHA256", nullptr);
  VF_ASSERT(algorithm != nullptr);
  return algorithm;
}

constexpr std::array<uint32_t, 256> make_crc32c_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78U : 0U);
    table[i] = crc;
  }
  return table;
}

constexpr auto kCrc32cTable = make_crc32c_table();

uint32_t crc32c_portable(ByteSpan bytes, uint32_t crc) {
  for (const uint8_t byte : bytes) crc = kCrc32cTable[(crc ^ byte) & 0xff] ^ (crc >> 8);
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(ByteSpan bytes, uint32_t crc) {
  const uint8_t* p = bytes.data();
  size_t left = bytes.size();
  uint64_t wide = crc;
  for (; left >= 8; left -= 8, p += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p, sizeof(word));
    wide = __builtin_ia32_crc32di(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; left > 0; --left, ++p) crc = __builtin_ia32_crc32qi(crc, *p);
  return crc;
}
#endif

}  // namespace

struct Sha256Stream::Impl {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  Impl() {
    VF_ASSERT(context != nullptr);
    VF_ASSERT(EVP_DigestInit_ex2(context, sha256_algorithm(), nullptr) == 1);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() { EVP_MD_CTX_free(context); }
};

Sha256Stream::Sha256Stream() : impl_(std::make_unique<Impl>()) {}
Sha256Stream::~Sha256Stream() = default;
Sha256Stream::Sha256Stream(Sha256Stream&&) noexcept = default;
Sha256Stream& Sha256Stream::operator=(Sha256Stream&&) noexcept = default;

void Sha256Stream::update(ByteSpan bytes) {
  VF_ASSERT(EVP_DigestUpdate(impl_->context, bytes.data(), bytes.size()) == 1);
}

Sha256Digest Sha256Stream::digest() {
  Sha256Digest out{};
  unsigned int size = 0;
  VF_ASSERT(EVP_DigestFinal_ex(impl_->context, out.data(), &size) == 1 && size == out.size());
  return out;
}

Sha256Digest sha256(ByteSpan bytes) {
  Sha256Digest out{};
  unsigned int size = 0;
  // One context per thread: creating one costs as much as hashing 4 KiB.
  static thread_local EVP_MD_CTX* const context = EVP_MD_CTX_new();
  VF_ASSERT(EVP_DigestInit_ex2(context, sha256_algorithm(), nullptr) == 1);
  VF_ASSERT(EVP_DigestUpdate(context, bytes.data(), bytes.size()) == 1);
  VF_ASSERT(EVP_DigestFinal_ex(context, out.data(), &size) == 1 && size == out.size());
  return out;
}

Hash128 xxh3_128(ByteSpan bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  Hash128 out{};
  std::memcpy(out.data(), canonical.digest, out.size());
  return out;
}

uint64_t xxh3_64(ByteSpan bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

uint32_t crc32c(ByteSpan bytes, uint32_t seed) {
  const uint32_t start = ~seed;
#if defined(__x86_64__)
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2") != 0;
  if (has_sse42) return ~crc32c_sse42(bytes, start);
#endif
  return ~crc32c_portable(bytes, start);
}

std::string to_hex(ByteSpan bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  out.reserve(bytes.size() * 2);
  for (const uint8_t byte : bytes) {
    out.push_back(kDigits[byte >> 4]);
    out.push_back(kDigits[byte & 15]);
  }
  return out;
}

Bytes from_hex(std::string_view text) {
  const auto digit = [](char c) -> int {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
  };
  Bytes out;
  if (text.size() % 2 != 0) return out;
  out.reserve(text.size() / 2);
  for (size_t i = 0; i < text.size(); i += 2) {
    const int high = digit(text[i]);
    const int low = digit(text[i + 1]);
    if (high < 0 || low < 0) return {};
    out.push_back(static_cast<uint8_t>(high * 16 + low));
  }
  return out;
}

}  // namespace vmferry
