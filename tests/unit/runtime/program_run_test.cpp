// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/program_run.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <optional>

#include "tests/unit/runtime/reactor_fixture.h"

namespace vmferry {
namespace {

class ProgramRunTest : public ::testing::Test {
 protected:
  ProgramOptions shell(const std::string& script) {
    return {.arguments = {"/bin/sh", "-c", script, "sh"}, .environment = {"PATH=/usr/bin:/bin"}};
  }
  void begin(ProgramOptions options) {
    lines_.clear();
    ended_.reset();
    run_ = std::make_unique<ProgramRun>(
        *reactor_, std::move(options), [this](std::string_view line) { lines_.emplace_back(line); },
        [this](const Status& status) {
          EXPECT_FALSE(ended_) << "ended twice";
          ended_ = status;
        });
  }
  Status end() {
    EXPECT_TRUE(reactor_->run_until([this] { return ended_.has_value(); }, 20 * kSecond));
    return ended_.value_or(fail(ErrorKind::Internal, "not ended"));
  }
  static bool no_child_left() {
    errno = 0;
    return ::waitpid(-1, nullptr, WNOHANG) < 0 && errno == ECHILD;
  }

  std::unique_ptr<Reactor> reactor_ = make_reactor(WaitsIn::Epoll, 1);
  std::vector<std::string> lines_;
  std::optional<Status> ended_;
  std::unique_ptr<ProgramRun> run_;
};

// What the daemon has open (images, keys, sockets of guests) and what its environment holds is none of a hook's
// business.
TEST_F(ProgramRunTest, ItInheritsNothingButItsArgumentsAndVariables) {
  ::setenv("VMFERRY_TEST_SECRET", "x", 1);
  const UniqueFd open_without_cloexec(::open("/dev/zero", O_RDONLY));
  signal(SIGPIPE, SIG_IGN);
  sigset_t blocked;
  sigset_t before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  auto options = shell(
      "echo $0 \"$@\"; env; ls /proc/self/fd | wc -l; pwd; grep -E 'Sig(Blk|Ign)' /proc/self/status; "
      "readlink /proc/self/fd/0");
  options.arguments.emplace_back("two words; $HOME");
  options.environment.emplace_back("NAME=a b");
  begin(std::move(options));
  const Status ended = end();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  signal(SIGPIPE, SIG_DFL);
  ASSERT_TRUE(ended.has_value()) << ended.error().text;
  std::string all;
  for (const std::string& line : lines_) all += line + "\n";
  EXPECT_EQ(lines_.front(), "sh two words; $HOME");
  EXPECT_NE(all.find("NAME=a b\n"), std::string::npos) << all;
  EXPECT_EQ(all.find("SECRET"), std::string::npos) << all;
  EXPECT_NE(all.find("\n4\n/\n"), std::string::npos) << "0, 1, 2 and the folder that ls reads\n" << all;
  EXPECT_NE(all.find("SigBlk:\t0000000000000000\nSigIgn:\t"), std::string::npos) << all;
  // 32 and 33 are the C library's own: nobody can set them back, whoever started the test may have ignored them.
  constexpr uint64_t kLibrarySignals = 0x180000000;
  const size_t ignored = all.find("SigIgn:\t");
  EXPECT_EQ(std::stoull(all.substr(ignored + 8, 16), nullptr, 16) & ~kLibrarySignals, 0U) << all;
  EXPECT_NE(all.find("\n/dev/null\n"), std::string::npos) << all;
  EXPECT_TRUE(no_child_left());
}

TEST_F(ProgramRunTest, HowItEndedIsSaidInWords) {
  begin(shell("exit 3"));
  EXPECT_NE(end().error().text.find("'/bin/sh' ended with status 3"), std::string::npos);
  begin(shell("kill -SEGV $$"));
  EXPECT_NE(end().error().text.find("signal 11"), std::string::npos);
  begin({.arguments = {"/no/such/program"}});
  EXPECT_NE(end().error().text.find("'/no/such/program'"), std::string::npos);
  begin({.arguments = {"/dev/null"}});
  EXPECT_FALSE(end().has_value());
  EXPECT_TRUE(no_child_left());
}

// A hook that hangs would stay for ever, and with it what it started.
TEST_F(ProgramRunTest, AtTheTimeLimitTheWholeGroupIsKilled) {
  auto options = shell("trap '' TERM INT HUP; sleep 1000 & echo $!; wait");
  options.time_limit = 300 * kMillisecond;
  const Nanoseconds begun = reactor_->now();
  begin(std::move(options));
  const Status ended = end();
  ASSERT_FALSE(ended.has_value());
  EXPECT_EQ(ended.error().kind, ErrorKind::Timeout);
  EXPECT_GE(reactor_->now() - begun, 300 * kMillisecond);
  ASSERT_EQ(lines_.size(), 1U);
  const int grandchild = std::stoi(lines_.front());
  EXPECT_TRUE(reactor_->run_until([&] { return ::kill(grandchild, 0) != 0; }, 5 * kSecond)) << "its child lives on";
  EXPECT_TRUE(no_child_left());
}

TEST_F(ProgramRunTest, ItGoesWithItsOwner) {
  begin(shell("echo $$; exec sleep 1000"));
  ASSERT_TRUE(reactor_->run_until([&] { return !lines_.empty(); }, 5 * kSecond));
  const int pid = std::stoi(lines_.front());
  run_.reset();
  EXPECT_NE(::kill(pid, 0), 0);
  EXPECT_TRUE(no_child_left());
  // While a worker starts it, too.
  begin(shell("exec sleep 1000"));
  run_.reset();
  EXPECT_TRUE(reactor_->run_until([] { return no_child_left(); }, 5 * kSecond));
  EXPECT_FALSE(ended_);
}

// I9: a program that writes without end fills neither log nor memory, and the loop goes on meanwhile.
TEST_F(ProgramRunTest, OutputIsBoundedAndTheProgramStillEnds) {
  auto options = shell("echo first; head -c 30000000 /dev/zero | tr '\\0' x; echo last >&2");
  options.output_max = 2000;
  begin(std::move(options));
  ASSERT_TRUE(end().has_value());
  size_t bytes = 0;
  for (const std::string& line : lines_) {
    EXPECT_LE(line.size(), 500U);
    bytes += line.size();
  }
  EXPECT_EQ(lines_.front(), "first");
  EXPECT_NE(lines_.back().find("left out"), std::string::npos);
  EXPECT_LE(bytes, 2000U + lines_.back().size());
  EXPECT_GT(bytes, 1900U);
}

// A daemon that the hook starts keeps the pipe open: that is not waited for.
TEST_F(ProgramRunTest, WhatItLeavesInTheBackgroundIsNotWaitedFor) {
  auto options = shell("sleep 1000 & echo $!");
  options.time_limit = 10 * kSecond;
  const Nanoseconds begun = reactor_->now();
  begin(std::move(options));
  EXPECT_TRUE(end().has_value());
  EXPECT_LT(reactor_->now() - begun, 5 * kSecond);
  ASSERT_EQ(lines_.size(), 1U);
  EXPECT_EQ(::kill(std::stoi(lines_.front()), SIGKILL), 0);
}

}  // namespace
}  // namespace vmferry
