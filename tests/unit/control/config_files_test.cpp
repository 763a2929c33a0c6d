// SPDX-License-Identifier: Apache-2.0
//
// --check-config against real files. The permission test gives root's rights up for its moment.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "engine/control/config.h"

namespace vmferry {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
namespace fs = std::filesystem;

constexpr uid_t kNobody = 65534;

class ConfigFiles : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "vmferry_config_files_" + std::to_string(getpid());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    chmod(folder_.c_str(), 0755);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  std::string file(const std::string& name, uint64_t size = 1_MiB) const {
    std::ofstream(path(name)).flush();
    fs::resize_file(path(name), size);
    return path(name);
  }
  // Every problem, one per line; each volume as its own option.
  std::string problems(const std::vector<std::string>& volumes, std::vector<std::string> options = {}) const {
    if (options.empty()) options = {"--state-dir", path("state")};
    for (const std::string& volume : volumes) {
      options.emplace_back("--volume");
      options.push_back(volume);
    }
    ConfigOutcome outcome = load_config(options);
    check_files(outcome.config, outcome.problems);
    std::string text;
    for (const ConfigProblem& problem : outcome.problems) text += problem.to_string() + "\n";
    return text;
  }

  std::string folder_;
};

// It runs with the daemon's rights: whoever can write it, or put another in its place, has them.
TEST_F(ConfigFiles, AHookThatOthersCouldChangeIsRefused) {
  const auto said = [&](const std::string& hook) {
    return problems({}, {"--state-dir", path("state"), "--on-running", hook});
  };
  fs::create_directories(path("hooks"));
  const std::string hook = file("hooks/run", 1);
  chmod(hook.c_str(), 0700);
  EXPECT_EQ(said(hook), "");
  EXPECT_THAT(said("hooks/run"), HasSubstr("absolute path"));
  EXPECT_THAT(said(path("hooks/missing")), HasSubstr("hooks/missing"));
  EXPECT_THAT(said(path("hooks")), HasSubstr("is no file"));
  for (const mode_t mode : {0720U, 0702U, 0777U}) {
    chmod(hook.c_str(), mode);
    EXPECT_THAT(said(hook), HasSubstr("may be written by others")) << mode;
    EXPECT_THAT(said(hook), HasSubstr("chmod go-w " + hook));
    EXPECT_THAT(said(hook), StartsWith("--on-running"));
  }
  chmod(hook.c_str(), 0600);
  EXPECT_THAT(said(hook), HasSubstr("chmod +x"));
  chmod(hook.c_str(), 0755);
  chmod(path("hooks").c_str(), 0777);
  EXPECT_THAT(said(hook), HasSubstr("'" + path("hooks") + "' may be written by others"));
  chmod(path("hooks").c_str(), 01777);
  EXPECT_EQ(said(hook), "") << "sticky, as /tmp: others cannot replace it";
  // The folder of a link, too: it decides what the link leads to.
  fs::create_directories(path("links"));
  fs::create_symlink(hook, path("links/run"));
  EXPECT_EQ(said(path("links/run")), "");
  chmod(path("links").c_str(), 0777);
  EXPECT_THAT(said(path("links/run")), HasSubstr("'" + path("links") + "' may be written by others"));
  if (geteuid() != 0) return;  // only root gives files away
  ASSERT_EQ(chown(hook.c_str(), kNobody, 0), 0);
  EXPECT_THAT(said(hook), HasSubstr("belongs to user 65534"));
}

TEST_F(ConfigFiles, NothingIsSaidOfWhatWillWorkAndNothingIsMade) {
  file("a.img");
  fs::create_directories(path("run"));
  EXPECT_EQ(problems({"name=a,path=" + path("a.img") + ",nbd=unix:" + path("run/a.nbd"),
                      "name=b,path=" + path("new.img") + ",size=1M,vhost-user-blk=" + path("b.sock") +
                          ",qmp=" + path("later/qmp")}),
            "");
  EXPECT_EQ(problems({}, {"--state-dir", path("one/two/state"), "--control", "unix:" + path("one/two/./state/c")}), "");
  EXPECT_EQ(problems({}, {"--state-dir", path("state") + "/"}), "");
  EXPECT_FALSE(fs::exists(path("new.img")));
  EXPECT_FALSE(fs::exists(path("state")));
  EXPECT_FALSE(fs::exists(path("one")));
}

// An operator who checks before a reboot has to hear what would fail after it, all of it, with the place.
TEST_F(ConfigFiles, EveryFileThatWouldFailIsReportedAtOnceWithItsLine) {
  file("ten.img", 10U << 20);
  file("odd.img", 1000);
  file("empty.img", 0);
  file("plain");
  fs::create_directories(path("folder"));
  fs::create_symlink(path("nowhere"), path("dangling.img"));
  std::ofstream(path("f.toml")) << "state-dir = \"" << path("plain/state") << "\"\n"
                                << "control = \"unix:" << path("gone/c.sock") << "\"\n"
                                << "[[volume]]\nname = \"a\"\npath = \"" << path("gone/a.img") << "\"\nsize = \"1M\"\n"
                                << "[[volume]]\nname = \"b\"\npath = \"" << path("folder") << "\"\n"
                                << "nbd = \"unix:" << path("plain") << "\"\n"
                                << "[[volume]]\nname = \"c\"\npath = \"" << path("ten.img") << "\"\nsize = \"1M\"\n"
                                << "[[volume]]\nname = \"d\"\npath = \"" << path("odd.img") << "\"\n"
                                << "[[volume]]\nname = \"e\"\npath = \"" << path("empty.img") << "\"\n"
                                << "[[volume]]\nname = \"f\"\npath = \"" << path("missing.img") << "\"\n"
                                << "[[volume]]\nname = \"g\"\npath = \"" << path("dangling.img") << "\"\nsize = 512\n"
                                << "vhost-user-blk = \"" << path("gone/v.sock") << "\"\n";
  const std::string text = problems({}, {"--config", path("f.toml")});
  const auto at = [&](int line) { return path("f.toml") + ":" + std::to_string(line) + ": "; };
  EXPECT_THAT(text, HasSubstr(at(1) + "state-dir '" + path("plain/state") + "'"));
  EXPECT_THAT(text, HasSubstr(at(2) + "control '" + path("gone/c.sock") + "': the folder '" + path("gone") +
                              "' does not exist"));
  EXPECT_THAT(text, HasSubstr(at(5) + "volume 'a': '" + path("gone/a.img") + "': the folder '" + path("gone") +
                              "' does not exist"));
  EXPECT_THAT(text, HasSubstr(at(9) + "volume 'b': '" + path("folder") + "' is neither a regular file nor"));
  EXPECT_THAT(text, HasSubstr(at(10) + "nbd '" + path("plain") + "': a file of that name exists"));
  EXPECT_THAT(text,
              HasSubstr(at(14) + "volume 'c': size= is 1048576 bytes, but '" + path("ten.img") + "' has 10485760"));
  EXPECT_THAT(text, HasSubstr(at(17) + "volume 'd': '" + path("odd.img") + "' has 1000 bytes"));
  EXPECT_THAT(text, HasSubstr(at(20) + "volume 'e': '" + path("empty.img") + "' is empty"));
  EXPECT_THAT(text,
              HasSubstr(at(23) + "volume 'f': '" + path("missing.img") + "' does not exist; size= would make it"));
  EXPECT_THAT(text, HasSubstr(at(26) + "volume 'g': '" + path("dangling.img") + "' is a symbolic link to a file that"));
  EXPECT_THAT(text, HasSubstr(at(28) + "vhost-user-blk '" + path("gone/v.sock") + "': the folder"));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 11) << text;
}

// Two guests on one file destroy each other's file system, whatever the file is called.
TEST_F(ConfigFiles, OneFileUnderTwoNamesIsFound) {
  file("a.img");
  fs::create_hard_link(path("a.img"), path("hard.img"));
  fs::create_symlink(path("a.img"), path("soft.img"));
  fs::create_directories(path("real"));
  fs::create_directory_symlink(path("real"), path("link"));
  const std::string text =
      problems({"name=a,path=" + path("a.img"), "name=b,path=" + path("hard.img"), "name=c,path=" + path("soft.img"),
                "name=d,path=" + path("real/new.img") + ",size=1M", "name=e,path=" + path("link/new.img") + ",size=1M",
                "name=f,path=" + path("real/other.img") + ",size=1M"});
  for (const auto& [volume, own, other] : {std::tuple{"b", "hard.img", "a.img"}, std::tuple{"c", "soft.img", "a.img"},
                                           std::tuple{"e", "link/new.img", "real/new.img"}}) {
    EXPECT_THAT(text,
                HasSubstr(fmt::format("volume '{}': '{}' is the same file as '{}'", volume, path(own), path(other))));
  }
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << text;
  EXPECT_THAT(text, StartsWith("--volume name=b,path="));
}

// A known volume may have grown since size= was written, and its missing file is not made anew.
TEST_F(ConfigFiles, AKnownVolumeIsCheckedAsTheDaemonWouldOpenIt) {
  fs::create_directories(path("state/volumes"));
  file("state/volumes/a.meta");
  file("state/volumes/b.meta");
  file("a.img", 2U << 20);
  EXPECT_EQ(problems({"name=a,path=" + path("a.img") + ",size=1M"}), "");
  EXPECT_THAT(problems({"name=a,path=" + path("a.img") + ",size=4M"}), HasSubstr("size= is 4194304"));
  EXPECT_THAT(problems({"name=b,path=" + path("b.img") + ",size=1M"}), HasSubstr("never made anew"));
}

TEST_F(ConfigFiles, MissingRightsAreReportedForTheUserWhoAsks) {
  file("a.img");
  chmod(path("a.img").c_str(), 0400);
  fs::create_directories(path("state"));
  fs::create_directories(path("closed"));
  chmod(path("closed").c_str(), 0555);
  chmod(path("state").c_str(), 0555);
  const bool root = geteuid() == 0;
  if (root) {
    ASSERT_EQ(seteuid(kNobody), 0);
  }
  const std::string text = problems({"name=a,path=" + path("a.img") + ",nbd=unix:" + path("closed/a.nbd"),
                                     "name=b,path=" + path("closed/b.img") + ",size=1M"});
  if (root) {
    ASSERT_EQ(seteuid(0), 0);
  }
  EXPECT_THAT(text, HasSubstr("state-dir '" + path("state") + "' cannot be used: folder"));
  EXPECT_THAT(text, HasSubstr("'" + path("a.img") + "' cannot be read and written by this user"));
  EXPECT_THAT(text, HasSubstr("nbd '" + path("closed/a.nbd") + "': folder '" + path("closed") + "' is not writable"));
  EXPECT_THAT(text, HasSubstr("volume 'b': '" + path("closed/b.img") + "': folder"));
  chmod(path("closed").c_str(), 0700);
}

// From another working directory a relative path would be another file; and every socket has one, too.
TEST_F(ConfigFiles, RelativePathsBecomeAbsoluteAndMayBecomeTooLong) {
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  const std::string here = fs::current_path().string();
  auto outcome = load_config({"--state-dir", "state", "--control", "unix:c.sock", "--volume",
                              "name=a,path=a.img,nbd=unix:a.nbd,vhost-user-blk=run/v.sock,qmp=qmp"});
  EXPECT_TRUE(outcome.problems.empty());
  EXPECT_EQ(outcome.config.state_dir, here + "/state");
  EXPECT_EQ(outcome.config.control_path, here + "/c.sock");
  EXPECT_EQ(outcome.config.volumes[0].nbd->path, here + "/a.nbd");
  EXPECT_EQ(outcome.config.volumes[0].vhost_user_blk, here + "/run/v.sock");
  EXPECT_EQ(outcome.config.volumes[0].qmp, here + "/qmp");
  EXPECT_EQ(load_config({"--state-dir", "state"}).config.control_path, here + "/state/control.sock");
  const std::string deep(100, 'x');
  const std::string text = problems({"name=a,path=a.img,size=1M,nbd=unix:" + deep});
  EXPECT_THAT(text, HasSubstr("at most 107 bytes"));
  EXPECT_THAT(problems({}, {"--state-dir", deep}), HasSubstr("control socket"));
  fs::current_path(before);
}

}  // namespace
}  // namespace vmferry
