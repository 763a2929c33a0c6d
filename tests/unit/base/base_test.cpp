// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "engine/base/bytes.h"
#include "engine/base/hash.h"
#include "engine/base/id.h"
#include "engine/base/units.h"

namespace vmferry {
namespace {

// A decoder that reads past its input turns a truncated message into a crash or into somebody else's bytes.
TEST(ByteReader, EveryTruncationIsNoticed) {
  Bytes whole;
  ByteWriter(whole).le16(7).be32(0x01020304).le64(9).le16_string("name");
  for (size_t size = 0; size <= whole.size(); ++size) {
    ByteReader reader(ByteSpan(whole).first(size));
    reader.le16();
    reader.be32();
    reader.le64();
    reader.le16_string(64);
    EXPECT_EQ(reader.done(), size == whole.size()) << size;
  }
}

TEST(ByteReader, BothEndiannessesReadWhatWasWritten) {
  Bytes out;
  ByteWriter(out).be16(0x0102).le16(0x0102).be64(0x0102030405060708).le32(0xa0b0c0d0);
  EXPECT_EQ(out[0], 1);
  EXPECT_EQ(out[2], 2);
  ByteReader reader(out);
  EXPECT_EQ(reader.be16(), 0x0102);
  EXPECT_EQ(reader.le16(), 0x0102);
  EXPECT_EQ(reader.be64(), 0x0102030405060708U);
  EXPECT_EQ(reader.le32(), 0xa0b0c0d0U);
  EXPECT_TRUE(reader.done());
}

// A string longer than its limit must not be returned in part.
TEST(ByteReader, OverlongStringIsRefused) {
  Bytes out;
  ByteWriter(out).le16_string("12345");
  ByteReader reader(out);
  EXPECT_EQ(reader.le16_string(4), "");
  EXPECT_FALSE(reader.ok());
}

// Records on disk and references on the wire are compared by these: a wrong implementation would agree with itself.
TEST(Hash, KnownAnswers) {
  EXPECT_EQ(crc32c(as_bytes("123456789")), 0xe3069283U);  // RFC 3720 check value
  EXPECT_EQ(crc32c(as_bytes("6789"), crc32c(as_bytes("12345"))), 0xe3069283U);
  EXPECT_EQ(to_hex(sha256(as_bytes("abc"))), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  Sha256Stream stream;
  stream.update(as_bytes("a"));
  stream.update(as_bytes("bc"));
  EXPECT_EQ(stream.digest(), sha256(as_bytes("abc")));
}

TEST(Hex, RoundTripAndRefusals) {
  EXPECT_EQ(to_hex(from_hex("00ffA1")), "00ffa1");
  EXPECT_TRUE(from_hex("0").empty());
  EXPECT_TRUE(from_hex("zz").empty());
  EXPECT_FALSE(Id128::parse("00").has_value());
  const Id128 id = random_id();
  EXPECT_EQ(Id128::parse(id.to_string()).value(), id);
}

// A name becomes part of a path: one bad character is a way out of the state directory.
TEST(Names, OnlyTheDocumentedAlphabet) {
  EXPECT_TRUE(is_valid_name("vda"));
  EXPECT_TRUE(is_valid_name("Web-01.root_disk"));
  EXPECT_TRUE(is_valid_name(std::string(64, 'a')));
  for (const char* bad : {"", ".hidden", "-x", "_x", "a/b", "a b", "a\n", "a:b", "..", "\xc3\xa4"}) {
    EXPECT_FALSE(is_valid_name(bad)) << bad;
  }
  EXPECT_FALSE(is_valid_name(std::string(65, 'a')));
}

// offset + length wraps for hostile values; a wrapped range would look small enough.
TEST(Units, FitsInDoesNotOverflow) {
  EXPECT_TRUE(fits_in(4096, 0, 4096));
  EXPECT_TRUE(fits_in(0, 4096, 4096));
  EXPECT_FALSE(fits_in(1, 4096, 4096));
  EXPECT_FALSE(fits_in(UINT64_MAX, 2, 4096));
  EXPECT_FALSE(fits_in(2, UINT64_MAX, 4096));
}

}  // namespace
}  // namespace vmferry
