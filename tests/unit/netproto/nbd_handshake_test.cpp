// SPDX-License-Identifier: Apache-2.0
//
// The handshake, byte by byte: what proto.md and the list of things that implementers forget ask for.
#include "netproto/nbd/handshake.h"

#include <gtest/gtest.h>

#include "engine/base/random.h"
#include "tests/unit/netproto/nbd_test_client.h"

namespace vmferry::nbd {
namespace {

using namespace nbd_test;
using State = Handshake::State;

// "vda" (default) and "vdb" (read-only).
class TwoExports final : public ExportCatalog {
 public:
  std::optional<ExportInfo> find_export(std::string_view name) const override {
    for (const ExportInfo& info : exports_)
      if (info.name == name || (name.empty() && info.name == "vda")) return info;
    return std::nullopt;
  }
  std::vector<ExportInfo> list_exports() const override { return exports_; }

 private:
  std::vector<ExportInfo> exports_{
      {.name = "vda", .description = "first disk", .size = 1 << 20, .block_size_preferred = 65536},
      {.name = "vdb", .description = "", .size = 4096, .read_only = true},
  };
};

class NbdHandshake : public ::testing::Test {
 protected:
  std::vector<OptionAnswer> say(const Bytes& bytes) {
    Bytes out;
    used_ = handshake_.feed(bytes, out);
    last_out_ = out;
    auto answers = option_answers(out);
    EXPECT_TRUE(answers.has_value()) << "malformed option replies";
    return answers.value_or(std::vector<OptionAnswer>{});
  }
  // The type of the only answer to `bytes`.
  uint32_t answer_to(const Bytes& bytes) {
    const auto answers = say(bytes);
    EXPECT_EQ(answers.size(), 1U);
    return answers.empty() ? 0 : answers.back().type;
  }
  void begin(uint32_t flags = 3) {
    EXPECT_TRUE(say(client_flags(flags)).empty());
    EXPECT_EQ(handshake_.state(), State::OptionHeader);
  }

  TwoExports catalog_;
  Handshake handshake_{catalog_, HandshakeLimits{}};
  Bytes last_out_;
  size_t used_ = 0;
};

// A client that does not see exactly these bytes takes us for something else.
TEST_F(NbdHandshake, GreetingIsFixedNewstyleWithNoZeroes) {
  Bytes out;
  handshake_.greet(out);
  const Bytes expected = {'N', 'B', 'D', 'M', 'A', 'G', 'I', 'C', 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0, 3};
  EXPECT_EQ(out, expected);
}

// Going on with a client whose flags we do not know means guessing the layout of everything that follows.
TEST_F(NbdHandshake, UnknownClientFlagDropsTheConnection) {
  for (unsigned bit = 2; bit < 32; ++bit) {
    Handshake handshake(catalog_, {});
    Bytes out;
    handshake.feed(client_flags(1U << bit | 3U), out);
    EXPECT_EQ(handshake.state(), State::Rejected) << "bit " << bit;
    EXPECT_TRUE(out.empty());
  }
}

// proto.md: without fixed newstyle there is no defined way to answer an option.
TEST_F(NbdHandshake, ClientWithoutFixedNewstyleMayOnlySendExportName) {
  begin(0);
  say(option(kOptList));
  EXPECT_EQ(handshake_.state(), State::Rejected);
}

TEST_F(NbdHandshake, WrongOptionMagicDropsTheConnection) {
  // After a wrong magic the position in the stream is unknown.
  begin();
  Bytes bytes = option(kOptList);
  bytes[3] ^= 1;
  say(bytes);
  EXPECT_EQ(handshake_.state(), State::Rejected);
}

// An answer other than ERR_UNSUP, or a dropped connection, breaks every client newer than the server.
TEST_F(NbdHandshake, UnknownOptionGetsUnsupportedAndTheSessionGoesOn) {
  begin();
  for (const uint32_t number : {0U, 4U, 12U, 0x7fffffffU, 0xffffffffU}) {
    EXPECT_EQ(answer_to(option(number, "whatever")), kRepErrUnsup) << number;
  }
  EXPECT_EQ(answer_to(option(kOptStructuredReply)), kRepAck);
}

// Unlimited option data is unlimited memory for whoever connects.
TEST_F(NbdHandshake, OptionDataOverTheLimitIsSkippedAndRefused) {
  begin();
  const size_t limit = HandshakeLimits{}.option_size_max;
  EXPECT_EQ(answer_to(option(77, Bytes(limit))), kRepErrUnsup) << "at the limit it is read";
  EXPECT_EQ(answer_to(option(kOptGo, Bytes(limit + 1))), kRepErrTooBig) << "one past it is not";
  EXPECT_EQ(answer_to(option(kOptStructuredReply)), kRepAck) << "and the stream is still in step";
}

// Without a limit on their number a client could keep the server busy for ever.
TEST_F(NbdHandshake, TooManyOptionsDropTheConnection) {
  begin();
  for (uint32_t i = 0; i < HandshakeLimits{}.option_count_max; ++i) EXPECT_EQ(answer_to(option(99)), kRepErrUnsup);
  say(option(99));
  EXPECT_EQ(handshake_.state(), State::Rejected);
}

TEST_F(NbdHandshake, AbortIsAcknowledgedAndEnds) {
  // A client that waits for the acknowledgement would hang.
  begin();
  EXPECT_EQ(answer_to(option(kOptAbort)), kRepAck);
  EXPECT_EQ(handshake_.state(), State::Finished);
}

TEST_F(NbdHandshake, ListNamesEveryExportWithItsDescription) {
  // Discovery (nbdinfo --list) shows what is missing here as not existing.
  begin();
  const auto answers = say(option(kOptList));
  ASSERT_EQ(answers.size(), 3U);
  EXPECT_EQ(answers[0].type, kRepServer);
  EXPECT_EQ(as_text(answers[0].data).substr(4), "vdafirst disk");
  EXPECT_EQ(ByteReader(answers[0].data).be32(), 3U);
  EXPECT_EQ(as_text(answers[1].data).substr(4), "vdb");
  EXPECT_EQ(answers[2].type, kRepAck);
  EXPECT_EQ(answer_to(option(kOptList, "x")), kRepErrInvalid) << "LIST takes no data";
}

TEST_F(NbdHandshake, ExportNameSendsSizeFlagsAndPaddingAsAgreed) {
  // 124 bytes too many or too few shift everything that follows.
  for (const uint32_t flags : {1U, 3U, 0U}) {
    Handshake handshake(catalog_, {});
    Bytes out;
    handshake.feed(client_flags(flags), out);
    handshake.feed(option(kOptExportName, "vda"), out);
    ASSERT_EQ(handshake.state(), State::Transmission);
    EXPECT_EQ(out.size(), (flags & 2) != 0 ? 10U : 134U);
    EXPECT_EQ(ByteReader(out).be64(), 1U << 20);
    EXPECT_FALSE(handshake.session().structured_replies);
    EXPECT_FALSE(handshake.session().block_sizes_agreed);
  }
}

TEST_F(NbdHandshake, ExportNameCannotBeRefusedSoTheConnectionIsDropped) {
  // This option has no error reply: anything sent would be read as size and flags.
  for (const std::string& name : {std::string("nosuch"), std::string(4097, 'x'), std::string("vda\0", 4)}) {
    Handshake handshake(catalog_, {});
    Bytes out;
    handshake.feed(joined({client_flags(3), option(kOptExportName, name)}), out);
    EXPECT_EQ(handshake.state(), State::Rejected) << name.size();
    EXPECT_TRUE(out.empty());
  }
}

TEST_F(NbdHandshake, InfoAnswersWhatWasAskedAndStaysInTheHandshake) {
  // Clients that only look (qemu-img info) must be able to go on with options.
  begin();
  const auto answers = say(option(kOptInfo, go_data("", {1, 2, 3, 77})));
  ASSERT_EQ(answers.size(), 5U);
  ByteReader info(answers[0].data);
  EXPECT_EQ(info.be16(), 0);
  EXPECT_EQ(info.be64(), 1U << 20);
  EXPECT_TRUE(info.ok());
  EXPECT_EQ(as_text(answers[1].data).substr(2), "vda") << "the default export tells its real name";
  EXPECT_EQ(as_text(answers[2].data).substr(2), "first disk");
  ByteReader sizes(answers[3].data);
  EXPECT_EQ(sizes.be16(), 3);
  EXPECT_EQ(sizes.be32(), 1U);
  EXPECT_EQ(sizes.be32(), 65536U);
  EXPECT_EQ(sizes.be32(), 32U << 20);
  EXPECT_EQ(answers[4].type, kRepAck);
  EXPECT_EQ(handshake_.state(), State::OptionHeader);
}

TEST_F(NbdHandshake, GoEntersTransmissionAndLeavesTheRestOfTheBytes) {
  // A client may send its first request together with GO: those bytes belong to the next phase.
  begin();
  const Bytes first_request = request(kCmdRead, 0, 1, 0, 512);
  const Bytes go = option(kOptGo, go_data("vdb"));
  const auto answers = say(joined({go, first_request}));
  EXPECT_EQ(used_, go.size());
  ASSERT_EQ(answers.size(), 2U) << "EXPORT and the acknowledgement, nothing that was not asked";
  EXPECT_EQ(handshake_.state(), State::Transmission);
  EXPECT_EQ(handshake_.session().export_info.name, "vdb");
  EXPECT_FALSE(handshake_.session().block_sizes_agreed);
}

// The minimum block size binds only a client that was told about it.
TEST_F(NbdHandshake, BlockSizesAreAgreedOnlyWhenGoAskedForThem) {
  begin();
  say(option(kOptInfo, go_data("vda", {3})));
  say(option(kOptGo, go_data("vda", {1})));
  EXPECT_FALSE(handshake_.session().block_sizes_agreed) << "INFO does not count";

  Handshake other(catalog_, {});
  Bytes out;
  other.feed(joined({client_flags(3), option(kOptGo, go_data("vda", {3}))}), out);
  EXPECT_TRUE(other.session().block_sizes_agreed);
}

TEST_F(NbdHandshake, UnknownExportIsAnErrorThatCanBeRetried) {
  // libnbd and QEMU try another name on the same connection.
  begin();
  EXPECT_EQ(answer_to(option(kOptGo, go_data("nosuch"))), kRepErrUnknown);
  EXPECT_EQ(answer_to(option(kOptInfo, go_data("nosuch"))), kRepErrUnknown);
  say(option(kOptGo, go_data("vda")));
  EXPECT_EQ(handshake_.state(), State::Transmission);
}

TEST_F(NbdHandshake, MalformedInfoIsInvalidAtEveryTruncationAndWithTrailingBytes) {
  // Reading past the option's data would disclose memory or lose the position in the stream.
  begin();
  const Bytes good = go_data("vda", {1, 3});
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_EQ(answer_to(option(kOptInfo, ByteSpan(good).first(size))), kRepErrInvalid) << size;
  }
  Bytes longer = good;
  longer.push_back(0);
  EXPECT_EQ(answer_to(option(kOptInfo, longer)), kRepErrInvalid);
  Bytes huge_name;
  ByteWriter(huge_name).be32(0xffffffff).be16(0);
  EXPECT_EQ(answer_to(option(kOptInfo, huge_name)), kRepErrInvalid);
  EXPECT_EQ(say(option(kOptInfo, good)).back().type, kRepAck) << "the good one still works";
}

TEST_F(NbdHandshake, StructuredReplyTakesNoData) {
  begin();
  EXPECT_EQ(answer_to(option(kOptStructuredReply, "x")), kRepErrInvalid);  // not silently accepted
  say(option(kOptGo, go_data("vda")));
  EXPECT_FALSE(handshake_.session().structured_replies) << "a refused option changes nothing";
}

// proto.md: SEND_DF must be clear when structured replies were not negotiated.
TEST_F(NbdHandshake, TransmissionFlagsFollowTheExportAndWhatWasAgreed) {
  ExportInfo writable;
  ExportInfo read_only;
  read_only.read_only = true;
  EXPECT_EQ(transmission_flags(writable, HeaderStyle::Structured), 0x0ded);
  EXPECT_EQ(transmission_flags(writable, HeaderStyle::Simple), 0x0d6d);
  EXPECT_EQ(transmission_flags(read_only, HeaderStyle::Structured), 0x058f)
      << "read-only: no TRIM, WRITE_ZEROES, FAST_ZERO";
}

class NbdMetaContext : public NbdHandshake {
 protected:
  void SetUp() override {
    begin();
    EXPECT_EQ(answer_to(option(kOptStructuredReply)), kRepAck);
  }
  bool set_for_go(std::string_view name = "vda") {
    say(option(kOptGo, go_data(name)));
    EXPECT_EQ(handshake_.state(), State::Transmission);
    return handshake_.session().base_allocation;
  }
};

TEST_F(NbdMetaContext, SetSelectsBaseAllocationByItsFullName) {
  // Without it nbdinfo --map and sparse copies do not work.
  const auto answers = say(option(kOptSetMeta, meta_data("vda", {"qemu:dirty-bitmap:x", "base:allocation"})));
  ASSERT_EQ(answers.size(), 2U) << "an unknown context is left out, not an error";
  EXPECT_EQ(answers[0].type, kRepMeta);
  EXPECT_NE(ByteReader(answers[0].data).be32(), 0U);
  EXPECT_EQ(as_text(answers[0].data).substr(4), "base:allocation");
  EXPECT_EQ(answers[1].type, kRepAck);
  EXPECT_TRUE(set_for_go());
}

// In SET the wildcard would select contexts that the client cannot name.
TEST_F(NbdMetaContext, BaseIsAWildcardInListOnly) {
  EXPECT_EQ(say(option(kOptListMeta, meta_data("vda", {"base:"}))).size(), 2U);
  EXPECT_EQ(say(option(kOptListMeta, meta_data("vda", {}))).size(), 2U) << "no query at all asks for everything";
  EXPECT_EQ(say(option(kOptListMeta, meta_data("vda", {"base"}))).size(), 1U);
  EXPECT_EQ(say(option(kOptListMeta, meta_data("vda", {"base:alloc"}))).size(), 1U);
  EXPECT_EQ(say(option(kOptSetMeta, meta_data("vda", {"base:"}))).size(), 1U);
  EXPECT_FALSE(set_for_go());
}

TEST_F(NbdMetaContext, AContextIsReportedOnceHoweverOftenItIsAsked) {
  // Two ids for one context would mean two BLOCK_STATUS chunks.
  EXPECT_EQ(say(option(kOptSetMeta, meta_data("vda", {"base:allocation", "base:allocation"}))).size(), 2U);
}

TEST_F(NbdMetaContext, ListDoesNotChangeWhatIsSet) {
  say(option(kOptSetMeta, meta_data("vda", {"base:allocation"})));
  say(option(kOptListMeta, meta_data("vda", {"other:thing"})));  // would unset it if it were taken for SET
  EXPECT_TRUE(set_for_go());
}

// A client whose second SET failed believes that nothing is set; sending BLOCK_STATUS data then is a violation.
TEST_F(NbdMetaContext, SetReplacesTheEarlierSetEvenWhenItFails) {
  const Bytes good = option(kOptSetMeta, meta_data("vda", {"base:allocation"}));
  Bytes trailing = meta_data("vda", {"base:allocation"});
  trailing.push_back(0);
  const struct {
    const char* name;
    Bytes second;
  } rows[] = {
      {"no queries", option(kOptSetMeta, meta_data("vda", {}))},
      {"unknown context", option(kOptSetMeta, meta_data("vda", {"x:y"}))},
      {"unknown export", option(kOptSetMeta, meta_data("nosuch", {"base:allocation"}))},
      {"trailing byte", option(kOptSetMeta, trailing)},
      {"empty", option(kOptSetMeta)},
      {"over the size limit", option(kOptSetMeta, Bytes(HandshakeLimits{}.option_size_max + 1))},
  };
  for (const auto& row : rows) {
    Handshake handshake(catalog_, {});
    Bytes out;
    handshake.feed(joined({client_flags(3), option(kOptStructuredReply), good, row.second}), out);
    handshake.feed(option(kOptGo, go_data("vda")), out);
    ASSERT_EQ(handshake.state(), State::Transmission) << row.name;
    EXPECT_FALSE(handshake.session().base_allocation) << row.name;
  }
}

// qemu-nbd accepts trailing bytes here and loses sync.
TEST_F(NbdMetaContext, TrailingBytesAndEveryTruncationAreErrors) {
  const Bytes good = meta_data("vda", {"base:allocation", "x:"});
  for (const uint32_t number : {kOptListMeta, kOptSetMeta}) {
    for (size_t size = 0; size < good.size(); ++size) {
      EXPECT_EQ(answer_to(option(number, ByteSpan(good).first(size))), kRepErrInvalid) << size;
    }
    Bytes longer = good;
    longer.push_back('x');
    EXPECT_EQ(answer_to(option(number, longer)), kRepErrInvalid);
  }
  Bytes many;
  ByteWriter(many).be32(3).raw(as_bytes("vda")).be32(0xffffffff);
  EXPECT_EQ(answer_to(option(kOptListMeta, many)), kRepErrInvalid) << "a count without the queries";
}

TEST_F(NbdMetaContext, ContextOfAnotherExportDoesNotCount) {
  // The client would get the allocation of a disk that it did not ask about.
  say(option(kOptSetMeta, meta_data("vdb", {"base:allocation"})));
  EXPECT_FALSE(set_for_go("vda"));
}

TEST_F(NbdMetaContext, DefaultExportAndItsNameAreTheSameExport) {
  say(option(kOptSetMeta, meta_data("", {"base:allocation"})));
  EXPECT_TRUE(set_for_go("vda"));  // libnbd sets by the empty name and goes by it too
}

TEST_F(NbdHandshake, MetaContextNeedsStructuredReplies) {
  // BLOCK_STATUS has no simple reply.
  begin();
  EXPECT_EQ(answer_to(option(kOptSetMeta, meta_data("vda", {"base:allocation"}))), kRepErrInvalid);
  EXPECT_EQ(answer_to(option(kOptListMeta, meta_data("vda", {}))), kRepErrInvalid);
}

TEST_F(NbdHandshake, ShutdownAnswersEveryOptionButAbort) {
  // A client that is told so reconnects elsewhere instead of reporting a broken server.
  begin();
  handshake_.shut_down();
  EXPECT_EQ(answer_to(option(kOptList)), kRepErrShutdown);
  EXPECT_EQ(answer_to(option(kOptGo, go_data("vda"))), kRepErrShutdown);
  EXPECT_EQ(answer_to(option(1234)), kRepErrShutdown);
  EXPECT_EQ(answer_to(option(kOptAbort)), kRepAck);
  EXPECT_EQ(handshake_.state(), State::Finished);
}

// Sockets deliver what they like: any cut must give the same answers.
TEST_F(NbdHandshake, EveryCutOfTheStreamGivesTheSameAnswers) {
  const Bytes whole = joined({client_flags(3), option(kOptStructuredReply), option(kOptList),
                              option(kOptSetMeta, meta_data("vda", {"base:allocation"})), option(55, Bytes(20000)),
                              option(kOptGo, go_data("vda", {1, 2, 3}))});
  Bytes expected;
  handshake_.feed(whole, expected);
  ASSERT_EQ(handshake_.state(), State::Transmission);
  for (const size_t step : {size_t{1}, size_t{3}, size_t{17}, size_t{1000}}) {
    Handshake handshake(catalog_, {});
    Bytes out;
    for (size_t at = 0; at < whole.size(); at += step) {
      const size_t count = std::min(step, whole.size() - at);
      EXPECT_EQ(handshake.feed(ByteSpan(whole).subspan(at, count), out), count);
    }
    EXPECT_EQ(handshake.state(), State::Transmission) << step;
    EXPECT_EQ(out, expected) << step;
  }
}

// Hostile bytes end in a known state with bounded output, whatever they are.
TEST_F(NbdHandshake, RandomBytesNeverBreakIt) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    Random random(seed);
    Handshake handshake(catalog_, {});
    Bytes out;
    handshake.feed(client_flags(3), out);
    for (int i = 0; i < 50; ++i) {
      Bytes data(random.below(64));
      for (uint8_t& byte : data) byte = static_cast<uint8_t>(random.next() >> 60);
      handshake.feed(option(static_cast<uint32_t>(random.below(13)), data), out);
    }
    EXPECT_TRUE(option_answers(out).has_value() || handshake.state() != State::OptionHeader) << "seed=" << seed;
    EXPECT_LT(out.size(), 50U * 1024) << "seed=" << seed;
  }
}

}  // namespace
}  // namespace vmferry::nbd
