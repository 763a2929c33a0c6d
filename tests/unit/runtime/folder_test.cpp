// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/folder.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>

namespace vmferry {
namespace {

class FolderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/vmferry-folder-XXXXXX";
    ASSERT_NE(mkdtemp(pattern), nullptr);
    base_ = pattern;
    std::filesystem::create_directory(base_ + "/inside");
    write(base_ + "/outside", "not ours");
    write(base_ + "/inside/own", "ours");
    auto opened = Folder::open(base_ + "/inside");
    ASSERT_TRUE(opened.has_value()) << opened.error().text;
    folder_ = std::move(*opened);
  }
  void TearDown() override { std::filesystem::remove_all(base_); }

  static void write(const std::string& path, const std::string& text) { std::ofstream(path) << text; }
  static std::string read(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  std::string base_;
  Folder folder_;
};

// A group's id is chosen by a peer: whatever its name resolves to, no other file may be opened, made or overwritten.
TEST_F(FolderTest, NoNameAndNoLinkLeadsOut) {
  std::filesystem::create_symlink("../outside", base_ + "/inside/relative");
  std::filesystem::create_symlink(base_ + "/outside", base_ + "/inside/absolute");
  std::filesystem::create_symlink("own", base_ + "/inside/within");
  std::filesystem::create_directory_symlink("..", base_ + "/inside/up");
  std::filesystem::create_symlink(base_ + "/made", base_ + "/inside/dangling");
  struct Row {
    const char* name;
    int error;
  };
  for (const Row& row :
       {Row{"../outside", EXDEV}, Row{"/etc/passwd", EXDEV}, Row{"relative", ELOOP}, Row{"absolute", ELOOP},
        Row{"within", ELOOP}, Row{"up/outside", ELOOP}, Row{"dangling", ELOOP}, Row{"missing", ENOENT}}) {
    for (const int flags : {O_RDONLY, O_RDWR, O_RDWR | O_TRUNC, O_PATH}) {
      errno = 0;
      EXPECT_FALSE(folder_.open_file(row.name, flags).valid()) << row.name;
      EXPECT_EQ(errno, row.error) << row.name << " with flags " << flags;
    }
  }
  EXPECT_FALSE(folder_.open_file("dangling", O_CREAT | O_RDWR, 0600).valid());
  EXPECT_FALSE(folder_.open_file("../made", O_CREAT | O_RDWR, 0600).valid());
  EXPECT_FALSE(std::filesystem::exists(base_ + "/made"));
  EXPECT_EQ(read(base_ + "/outside"), "not ours");
  EXPECT_TRUE(folder_.open_file("own", O_RDWR).valid());
  EXPECT_TRUE(folder_.open_file("new", O_CREAT | O_EXCL | O_RDWR, 0600).valid());
  EXPECT_TRUE(folder_.holds("new") && folder_.holds("dangling"));
  EXPECT_FALSE(folder_.holds("missing"));
}

// The folder that was opened stays the one that is used, also when its path is given to another one.
TEST_F(FolderTest, ItIsTheFolderAndNotItsPath) {
  std::filesystem::rename(base_ + "/inside", base_ + "/moved");
  std::filesystem::create_directory_symlink(base_, base_ + "/inside");
  ASSERT_TRUE(folder_.link("own", "second").has_value());
  EXPECT_EQ(read(base_ + "/moved/second"), "ours");
  ASSERT_TRUE(folder_.remove("own").has_value());
  EXPECT_FALSE(std::filesystem::exists(base_ + "/moved/own"));
  EXPECT_EQ(read(base_ + "/moved/second"), "ours");
  EXPECT_TRUE(folder_.sync().has_value());
}

TEST_F(FolderTest, LinkAndRemoveTakeNamesOnlyAndNoTargets) {
  for (const char* name : {"../outside", "..", ".", "", "/tmp/x", "sub/name"}) {
    EXPECT_FALSE(folder_.remove(name).has_value()) << name;
    EXPECT_FALSE(folder_.link(name, "copy").has_value()) << name;
    EXPECT_FALSE(folder_.link("own", name).has_value()) << name;
  }
  std::filesystem::create_symlink(base_ + "/outside", base_ + "/inside/link");
  EXPECT_TRUE(folder_.remove("link").has_value());
  EXPECT_FALSE(folder_.holds("link"));
  EXPECT_EQ(read(base_ + "/outside"), "not ours");
  EXPECT_TRUE(folder_.remove("link").has_value()) << "nothing is there any more: fine";
}

}  // namespace
}  // namespace vmferry
