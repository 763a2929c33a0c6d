// SPDX-License-Identifier: Apache-2.0
#include "engine/control/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

namespace vmferry {
namespace {

using ::testing::HasSubstr;

std::string all(const std::vector<ConfigProblem>& problems) {
  std::string text;
  for (const ConfigProblem& problem : problems) text += problem.to_string() + "\n";
  return text;
}

TEST(Config, OptionsBecomeTheConfiguration) {
  const auto outcome = load_config(
      {"--state-dir", "/tmp/s", "--listen", "[::1]:4411", "--volume",
       "name=vda,path=/srv/a,,b.img,size=1G,role=secondary,nbd=unix:/run/a.sock,qmp=/run/q,aio=libaio,cache=none",
       "--volume", "name=vdb,path=/srv/b.img,vhost-user-blk=/run/v.sock,queues=4"});
  ASSERT_TRUE(outcome.problems.empty()) << all(outcome.problems);
  ASSERT_EQ(outcome.config.volumes.size(), 2U);
  const VolumeConfig& vda = outcome.config.volumes[0];
  EXPECT_EQ(vda.path, "/srv/a,b.img");
  EXPECT_EQ(vda.size, 1_GiB);
  EXPECT_TRUE(vda.secondary);
  EXPECT_EQ(vda.aio, AioSetting::Libaio);
  EXPECT_EQ(vda.cache, CacheSetting::None);
  EXPECT_EQ(vda.nbd->path, "/run/a.sock");
  EXPECT_EQ(outcome.config.volumes[1].vhost_user_blk, "/run/v.sock");
  EXPECT_EQ(outcome.config.volumes[1].queues, 4U);
  EXPECT_EQ(outcome.config.control_path, "/tmp/s/control.sock");
  EXPECT_EQ(outcome.config.listen->host, "::1");
}

// An operator who is told of one problem per start needs a start per problem.
TEST(Config, EveryProblemOfAFileIsReportedWithItsLine) {
  DaemonConfig config;
  std::vector<ConfigProblem> problems;
  apply_toml(
      "state-dir = \"/s\"\nlog-level = \"loud\"\ntypo = 1\n[[volume]]\nname = \"bad name\"\npath = \"/a\"\nsize = "
      "\"x\"\n"
      "colour = \"red\"\n[[volume]]\nname = \"ok\"\n",
      "f.toml", config, problems);
  const std::string text = all(problems);
  EXPECT_THAT(text, HasSubstr("f.toml:2: log level 'loud'"));
  EXPECT_THAT(text, HasSubstr("f.toml:3: unknown key 'typo'"));
  EXPECT_THAT(text, HasSubstr("f.toml:5: 'bad name' is not a volume name"));
  EXPECT_THAT(text, HasSubstr("f.toml:7: 'x' is not a size"));
  EXPECT_THAT(text, HasSubstr("f.toml:8: unknown key 'colour'"));
  EXPECT_THAT(text, HasSubstr("f.toml:9: volume 'ok' needs path="));
  EXPECT_EQ(problems.size(), 6U) << text;
}

TEST(Config, FileAndOptionsAreJoinedAndOptionsWin) {
  const std::string path = testing::TempDir() + "vmferry_config_test_" + std::to_string(getpid()) + ".toml";
  std::ofstream(path) << "state-dir = \"/from-file\"\nlog-level = \"warn\"\n[[volume]]\nname = \"vda\"\npath = "
                         "\"/a\"\nsize = 1048576\n";
  const auto outcome = load_config({"--config", path, "--state-dir", "/from-option", "--volume", "name=vdb,path=/b"});
  std::filesystem::remove(path);
  ASSERT_TRUE(outcome.problems.empty()) << all(outcome.problems);
  EXPECT_EQ(outcome.config.state_dir, "/from-option");
  EXPECT_EQ(outcome.config.log_level, log::Level::Warn);
  EXPECT_EQ(outcome.config.volumes.size(), 2U);
  EXPECT_EQ(outcome.config.volumes[0].size, 1_MiB);
}

// NBD without TLS on a routable address hands the disk to the network.
TEST(Config, NbdBeyondLoopbackIsForRequiredTlsOnly) {
  const auto problems = [](std::vector<std::string> arguments, const std::string& volume) {
    arguments.insert(arguments.begin(), {"--state-dir", "/s", "--volume", "name=a,path=/a," + volume});
    return all(load_config(arguments).problems);
  };
  const std::string routable = "nbd=tcp:192.0.2.1:10809";
  EXPECT_THAT(problems({}, routable), HasSubstr("loopback"));
  EXPECT_THAT(problems({"--nbd-tls-psk", "/k", "--nbd-tls", "allow"}, routable), HasSubstr("loopback"));
  EXPECT_THAT(problems({"--nbd-tls-psk", "/k", "--nbd-tls", "off"}, routable), HasSubstr("loopback"));
  EXPECT_THAT(problems({"--nbd-tls-psk", "/k"}, routable + ",nbd-tls=off"), HasSubstr("loopback"));
  EXPECT_THAT(problems({"--nbd-tls", "require"}, routable), HasSubstr("needs nbd-tls-certificates"));
  EXPECT_EQ(problems({"--nbd-tls-psk", "/k"}, routable), "");
  EXPECT_EQ(problems({"--nbd-tls-certificates", "/c", "--nbd-tls", "off"}, routable + ",nbd-tls=require"), "");
  EXPECT_EQ(problems({}, "nbd=tcp:127.0.0.1:10809"), "");
}

// A limit that is read wrong locks every guest out, or nobody.
TEST(Config, LimitsOfTheNbdExportsAreCheckedAgainstTheirRange) {
  const auto with = [](const char* option, const char* value) {
    return load_config({"--state-dir", "/s", std::string("--") + option + "=" + value});
  };
  const NbdExportLimits defaults = load_config({"--state-dir", "/s"}).config.nbd_limits;
  EXPECT_EQ(defaults.connections, 1024U);
  EXPECT_EQ(defaults.handshake_timeout, 10 * kSecond);
  EXPECT_EQ(with("nbd-connections", "1").config.nbd_limits.connections, 1U);
  EXPECT_EQ(with("nbd-connections", "65535").config.nbd_limits.connections, 65535U);
  EXPECT_EQ(with("nbd-handshake-timeout", "1s").config.nbd_limits.handshake_timeout, kSecond);
  EXPECT_EQ(with("nbd-handshake-timeout", "10m").config.nbd_limits.handshake_timeout, 600 * kSecond);
  for (const char* bad : {"0", "65536", "-1", "1.5", "x"})
    EXPECT_THAT(all(with("nbd-connections", bad).problems), HasSubstr("is not a number from 1 to 65535")) << bad;
  for (const char* bad : {"0", "999ms", "601s", "x"})
    EXPECT_THAT(all(with("nbd-handshake-timeout", bad).problems), HasSubstr("is not a time from 1s to 10m")) << bad;
  DaemonConfig config;
  std::vector<ConfigProblem> problems;
  apply_toml("nbd-connections = 16\nnbd-handshake-timeout = \"3s\"\n", "f.toml", config, problems);
  EXPECT_EQ(all(problems), "");
  EXPECT_EQ(config.nbd_limits.connections, 16U);
  EXPECT_EQ(config.nbd_limits.handshake_timeout, 3 * kSecond);
}

TEST(Config, ReadOnlyIsTrueOrFalseInAFileAndOnOrOffInAnOption) {
  DaemonConfig config;
  std::vector<ConfigProblem> problems;
  apply_toml(
      "[[volume]]\nname = \"a\"\npath = \"/a\"\nread-only = true\n[[volume]]\nname = \"b\"\npath = \"/b\"\n"
      "read-only = false\n[[volume]]\nname = \"c\"\npath = \"/c\"\nread-only = \"on\"\n",
      "f.toml", config, problems);
  EXPECT_EQ(all(problems), "");
  ASSERT_EQ(config.volumes.size(), 3U);
  EXPECT_TRUE(config.volumes[0].read_only);
  EXPECT_FALSE(config.volumes[1].read_only);
  EXPECT_TRUE(config.volumes[2].read_only);
  // No other key takes true for a text, or `qmp = true` would be a socket named "on".
  apply_toml("listen = true\n[[volume]]\nname = true\npath = false\n", "f.toml", config, problems);
  EXPECT_THAT(all(problems), HasSubstr("f.toml:1: 'listen' has to be a string or a number"));
  EXPECT_THAT(all(problems), HasSubstr("f.toml:3: 'name' has to be a string or a number"));
  problems.clear();
  EXPECT_TRUE(parse_volume_option("name=a,path=/a,read-only=on", "", problems).read_only);
  EXPECT_FALSE(parse_volume_option("name=a,path=/a,read-only=off", "", problems).read_only);
  EXPECT_EQ(all(problems), "");
  for (const char* bad : {"true", "1", "", "On"}) {
    problems.clear();
    parse_volume_option(std::string("name=a,path=/a,read-only=") + bad, "", problems);
    EXPECT_THAT(all(problems), HasSubstr("is not on or off")) << bad;
  }
}

// Two addresses for one export, or one that the network reaches without TLS, are found before anything is served.
TEST(Config, SocketsOfTheServiceManagerTakeThePlaceOfNbd) {
  const auto problems = [](const std::string& more, const char* address, std::vector<std::string> arguments = {}) {
    arguments.insert(arguments.begin(), {"--state-dir", "/s", "--volume", "name=vda,path=/a" + more});
    return all(load_config(arguments, {{"vda", {*Endpoint::parse(address)}}}).problems);
  };
  const std::vector<std::string> tls{"--nbd-tls-psk", "/k"};
  EXPECT_EQ(problems("", "unix:/run/vda"), "");
  EXPECT_EQ(problems(",nbd=unix:/run/vda", "unix:/run/vda"), "");
  EXPECT_THAT(problems(",nbd=unix:/run/other", "unix:/run/vda"), HasSubstr("leave nbd= out"));
  EXPECT_EQ(problems("", "127.0.0.1:1"), "");
  EXPECT_THAT(problems("", "0.0.0.0:1"), HasSubstr("not on loopback"));
  EXPECT_THAT(problems("", "[::]:1"), HasSubstr("not on loopback"));
  EXPECT_EQ(problems("", "0.0.0.0:1", tls), "");
  EXPECT_THAT(problems(",nbd-tls=allow", "0.0.0.0:1", tls), HasSubstr("not on loopback"));
  EXPECT_EQ(problems(",tls-allow=alice", "unix:/run/vda", tls), "") << "nbd= is not missing";
  EXPECT_THAT(all(load_config({"--state-dir", "/s", "--volume", "name=vdb,path=/b,tls-allow=alice", tls[0], tls[1]},
                              {{"vda", {*Endpoint::parse("unix:/run/vda")}}})
                      .problems),
              HasSubstr("nbd=, which is missing"));
}

TEST(Config, WhatCannotBeTrueTogetherIsRefused) {
  const auto refused = [](std::vector<std::string> volumes) {
    std::vector<std::string> arguments{"--state-dir", "/s"};
    for (std::string& volume : volumes) {
      arguments.emplace_back("--volume");
      arguments.push_back(std::move(volume));
    }
    return all(load_config(arguments).problems);
  };
  EXPECT_THAT(refused({"name=a,path=/a", "name=a,path=/b"}), HasSubstr("volume 'a' is given twice"));
  EXPECT_THAT(refused({"name=a,path=/a", "name=b,path=/a"}), HasSubstr("path '/a' is used by two volumes"));
  EXPECT_THAT(refused({"name=a,path=/a,name=b"}), HasSubstr("'name' is given twice"));
  EXPECT_THAT(refused({"name=a,path=/a,size=1000"}), HasSubstr("multiple of 512"));
  EXPECT_THAT(refused({"name=a,path=/a,queues=2"}), HasSubstr("queues= is of vhost-user-blk="));
  EXPECT_THAT(refused({"name=a,path=/a,vhost-user-blk=/v,queues=0"}), HasSubstr("from 1 to 64"));
  EXPECT_THAT(refused({"name=a,path=/a,vhost-user-blk=/v,queues=65"}), HasSubstr("from 1 to 64"));
  EXPECT_THAT(refused({"name=a,path=/a,vhost-user-blk=/v,queues=4x"}), HasSubstr("from 1 to 64"));
  EXPECT_THAT(refused({"name=a,path=/a,vhost-user-blk=/v", "name=b,path=/b,vhost-user-blk=/v"}),
              HasSubstr("used by two exports"));
  EXPECT_THAT(refused({"name=a,path=/a,nbd=unix:/v,vhost-user-blk=/v"}), HasSubstr("used by two exports"));
  EXPECT_THAT(refused({"name=a,path"}), HasSubstr("not KEY=VALUE"));
  EXPECT_THAT(all(load_config({"--volume", "name=a,path=/a"}).problems), HasSubstr("--state-dir is missing"));
  EXPECT_FALSE(load_config({"--state-dir", "/s", "--nonsense"}).problems.empty());
  EXPECT_FALSE(load_config({"--config", "/nonexistent/vmferry.toml"}).problems.empty());
}

TEST(Config, HelpHasAnExample) {
  EXPECT_THAT(load_config({"--help"}).help, HasSubstr("Example:"));
}

TEST(Config, BrokenTomlNamesTheLine) {
  DaemonConfig config;
  std::vector<ConfigProblem> problems;
  apply_toml("state-dir = \"/s\"\nvolume = 3\n[broken\n", "f.toml", config, problems);
  ASSERT_EQ(problems.size(), 1U);
  EXPECT_THAT(problems[0].where, HasSubstr("f.toml:3"));
}

// toml++ runs into undefined behaviour for such characters outside of strings, in whatever way the string ended before
// them; found by fuzz_config, twice.
TEST(Config, CharactersBeyondAsciiAreTakenInStringsAndCommentsOnly) {
  DaemonConfig config;
  const auto problem_of = [&config](std::string_view text) {
    config = DaemonConfig{};
    std::vector<ConfigProblem> problems;
    apply_toml(text, "f.toml", config, problems);
    return problems.empty() ? std::string() : problems[0].to_string();
  };
  for (const char* bad : {"a = 1\nst\u00e9te = 1\n", "\n\u00e9", "a = \u00e9", "a = 'x' \u00e9", "a = \"\\\"\" \u00e9",
                          "[[volume]]\nname = \"vda\"\npath = 2\"/srv/h\u00f4te.img\" # \u00e9\n", "a\u3000=\u30001"})
    EXPECT_THAT(problem_of(bad), HasSubstr("f.toml:")) << bad;
  EXPECT_THAT(problem_of("a = 1\nst\u00e9te = 1\n"), testing::StartsWith("f.toml:2: "));
  EXPECT_THAT(problem_of("st\u00e9te \u20ac"), testing::Not(HasSubstr("\xF4")));  // shown as it was written
  EXPECT_THAT(problem_of("\"st\u00e9te\" = 1"), HasSubstr("st\u00e9te"));
  EXPECT_EQ(
      problem_of(
          "\xEF\xBB\xBF# h\u00f4te\nstate-dir = \"/srv/h\u00f4te\" # \u00e9\ncontrol = 'unix:/h\u20ac\U0001F600'\n"),
      "");
  EXPECT_EQ(config.state_dir, "/srv/h\u00f4te");
  EXPECT_EQ(problem_of("state-dir = \"\"\"/srv/h\u00f4\\\n  te\"\"\""), "");
  EXPECT_EQ(config.state_dir, "/srv/h\u00f4te");
}

// What is not strict UTF-8 would reach paths and JSON, whose readers then refuse the whole answer.
TEST(Config, BytesThatAreNotUtf8AreRefusedWithTheirLine) {
  for (const char* bad : {"\xff\xff", "\x80", "\xC0\xAF", "\xE0\x80\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xC3",
                          "\xE2\x82", "\xF5\x80\x80\x80", "\xC3\x28"}) {
    DaemonConfig config;
    std::vector<ConfigProblem> problems;
    apply_toml(std::string("# one\n# ") + bad, "f.toml", config, problems);
    ASSERT_EQ(problems.size(), 1U) << bad;
    EXPECT_THAT(problems[0].to_string(), testing::StartsWith("f.toml:2: bytes that are not UTF-8"));
  }
  for (const char* bad : {"a = '\U00100041'", "a = \"\\U00100041\""}) {
    DaemonConfig config;
    std::vector<ConfigProblem> problems;
    apply_toml(bad, "f.toml", config, problems);
    ASSERT_EQ(problems.size(), 1U) << bad;
    EXPECT_THAT(problems[0].to_string(), HasSubstr("private use"));
  }
}

}  // namespace
}  // namespace vmferry
