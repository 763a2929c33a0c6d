// SPDX-License-Identifier: Apache-2.0
//
// Cursors over byte spans for codecs: bounds-checked reads, appending writes, either endianness.
//
// ByteReader never throws and never reads past its span: the first read that does not fit makes the reader bad, and
// every later read returns zero. A decoder reads everything and checks ok() (and done()) once at the end, before it
// acts on any value that it read.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vmferry {

using Bytes = std::vector<uint8_t>;
using ByteSpan = std::span<const uint8_t>;
using MutableByteSpan = std::span<uint8_t>;

inline ByteSpan as_bytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}
inline std::string_view as_text(ByteSpan bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

class ByteReader {
 public:
  explicit ByteReader(ByteSpan bytes) : bytes_(bytes) {}

  uint8_t u8() { return static_cast<uint8_t>(little(1)); }
  uint16_t le16() { return static_cast<uint16_t>(little(2)); }
  uint32_t le32() { return static_cast<uint32_t>(little(4)); }
  uint64_t le64() { return little(8); }
  uint16_t be16() { return static_cast<uint16_t>(big(2)); }
  uint32_t be32() { return static_cast<uint32_t>(big(4)); }
  uint64_t be64() { return big(8); }

  // The next `count` bytes; empty (and bad) when fewer are left.
  ByteSpan take(size_t count) {
    if (count > remaining()) {
      bad_ = true;
      position_ = bytes_.size();
      return {};
    }
    ByteSpan result = bytes_.subspan(position_, count);
    position_ += count;
    return result;
  }
  // A string with a le16 length prefix, at most `size_max` bytes.
  std::string le16_string(size_t size_max) {
    const size_t size = le16();
    if (size > size_max) bad_ = true;
    const ByteSpan raw = bad_ ? ByteSpan{} : take(size);
    return std::string(as_text(raw));
  }
  template <size_t N>
  void copy_to(uint8_t (&out)[N]) {
    const ByteSpan raw = take(N);
    if (raw.size() == N) std::memcpy(out, raw.data(), N);
  }
  void copy_to(MutableByteSpan out) {
    const ByteSpan raw = take(out.size());
    if (raw.size() == out.size() && !raw.empty()) std::memcpy(out.data(), raw.data(), out.size());
  }
  ByteSpan rest() { return take(remaining()); }

  size_t position() const { return position_; }
  size_t remaining() const { return bytes_.size() - position_; }
  bool ok() const { return !bad_; }
  bool done() const { return ok() && remaining() == 0; }  // everything was read and nothing was missing

 private:
  uint64_t little(size_t count) {
    const ByteSpan raw = take(count);
    uint64_t value = 0;
    for (size_t i = raw.size(); i > 0; --i) value = value << 8 | raw[i - 1];
    return value;
  }
  uint64_t big(size_t count) {
    const ByteSpan raw = take(count);
    uint64_t value = 0;
    for (const uint8_t byte : raw) value = value << 8 | byte;
    return value;
  }

  ByteSpan bytes_;
  size_t position_ = 0;
  bool bad_ = false;
};

// Appends to a caller-owned vector.
class ByteWriter {
 public:
  explicit ByteWriter(Bytes& out) : out_(out) {}

  ByteWriter& u8(uint8_t value) { return little(value, 1); }
  ByteWriter& le16(uint16_t value) { return little(value, 2); }
  ByteWriter& le32(uint32_t value) { return little(value, 4); }
  ByteWriter& le64(uint64_t value) { return little(value, 8); }
  ByteWriter& be16(uint16_t value) { return big(value, 2); }
  ByteWriter& be32(uint32_t value) { return big(value, 4); }
  ByteWriter& be64(uint64_t value) { return big(value, 8); }
  ByteWriter& raw(ByteSpan bytes) {
    out_.insert(out_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  // The caller has checked text.size() <= 65535.
  ByteWriter& le16_string(std::string_view text) {
    le16(static_cast<uint16_t>(text.size()));
    return raw(as_bytes(text));
  }
  size_t size() const { return out_.size(); }

 private:
  ByteWriter& little(uint64_t value, size_t count) {
    for (size_t i = 0; i < count; ++i) out_.push_back(static_cast<uint8_t>(value >> (8 * i)));
    return *this;
  }
  ByteWriter& big(uint64_t value, size_t count) {
    for (size_t i = count; i > 0; --i) out_.push_back(static_cast<uint8_t>(value >> (8 * (i - 1))));
    return *this;
  }

  Bytes& out_;
};

}  // namespace vmferry
