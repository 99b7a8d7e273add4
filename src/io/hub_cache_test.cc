// Finding a model in directories and in Hugging Face caches.
#include "io/test_files.h"

namespace kl {
namespace {

using testing::fails_with;
using testing::TempDir;
using testing::write_file;

const std::string kCommit = "e1df551a447157d4658b573f9a695d57658590e9";

// A repository as the hub's client stores it: the snapshot's files are links to blobs.
void add_snapshot(const std::string& repository, const std::string& commit) {
  write_file(repository + "/blobs/0123", "{}");
  std::filesystem::create_directories(repository + "/snapshots/" + commit);
  std::filesystem::create_symlink("../../blobs/0123", repository + "/snapshots/" + commit + "/config.json");
}

TEST(ResolveModel, ADirectoryIsItself) {
  const TempDir dir;
  write_file(dir / "plain/config.json", "{}");
  EXPECT_EQ(resolve_model(dir / "plain", {}), dir / "plain");
  EXPECT_EQ(resolve_model(dir / "plain/", {}), dir / "plain/");
  add_snapshot(dir / "models--org--name", kCommit);
  const std::string snapshot = dir / "models--org--name/snapshots/" + kCommit;
  EXPECT_EQ(resolve_model(snapshot, {}), snapshot);
  EXPECT_EQ(resolve_model(dir / "models--org--name", {}), snapshot);
}

TEST(ResolveModel, LooksInTheCacheThatIsConfigured) {
  const TempDir dir;
  add_snapshot(dir / "cache/models--org--name", kCommit);
  add_snapshot(dir / "home/hub/models--org--name", kCommit);
  add_snapshot(dir / "user/.cache/huggingface/hub/models--org--name", kCommit);
  add_snapshot(dir / "user/own/models--org--name", kCommit);
  const std::string tail = "/models--org--name/snapshots/" + kCommit;
  const HubLocations all{dir / "cache", dir / "home", dir / "user"};
  EXPECT_EQ(resolve_model("org/name", all), dir / "cache" + tail);
  EXPECT_EQ(resolve_model("org/name", {"", dir / "home", dir / "user"}), dir / "home/hub" + tail);
  EXPECT_EQ(resolve_model("org/name", {"", "", dir / "user"}), dir / "user/.cache/huggingface/hub" + tail);
  EXPECT_EQ(resolve_model("org/name", {"~/own", "", dir / "user"}), dir / "user/own" + tail);
  // A configured cache is the only one that counts.
  EXPECT_TRUE(fails_with(
      [&] {
        resolve_model("org/name", {dir / "none", dir / "home", dir / "user"});
      },
      {"\"org/name\"", dir / "none/models--org--name"}));
}

TEST(ResolveModel, AnIdMayHaveNoOrganisation) {
  const TempDir dir;
  add_snapshot(dir / "models--tiny", kCommit);
  EXPECT_EQ(resolve_model("tiny", {dir.path(), "", ""}), dir / "models--tiny/snapshots/" + kCommit);
}

TEST(ResolveModel, RefsMainChoosesTheSnapshot) {
  const TempDir dir;
  const std::string repository = dir / "models--org--name";
  add_snapshot(repository, "aaaa"), add_snapshot(repository, "bbbb");
  const HubLocations hub{dir.path(), "", ""};
  EXPECT_TRUE(fails_with([&] { resolve_model("org/name", hub); }, {repository, "refs/main", "aaaa, bbbb"}));
  for (const char* ref : {"bbbb", "bbbb\n", "bbbb \r\n"}) {
    write_file(repository + "/refs/main", ref);
    EXPECT_EQ(resolve_model("org/name", hub), repository + "/snapshots/bbbb");
  }
  // Not another commit than the one that was asked for.
  write_file(repository + "/refs/main", "cccc");
  EXPECT_TRUE(fails_with([&] { resolve_model("org/name", hub); },
                         {repository + "/refs/main", repository + "/snapshots/cccc"}));
}

TEST(ResolveModel, RefsCannotLeadOutOfTheCache) {
  const TempDir dir;
  write_file(dir / "outside/config.json", "{}");
  const std::string repository = dir / "models--org--name";
  add_snapshot(repository, "aaaa");
  for (const std::string ref : {"../../../outside", "..", ".", "", "/tmp", "a/b", "a\nb", "\x1b[2J"}) {
    write_file(repository + "/refs/main", ref);
    EXPECT_TRUE(fails_with(
        [&] {
          resolve_model("org/name", {dir.path(), "", ""});
        },
        {repository + "/refs/main", "expected the name of a commit"}))
        << ref;
  }
  write_file(repository + "/refs/main", std::string(2000, 'a'));
  EXPECT_TRUE(fails_with([&] { resolve_model("org/name", {dir.path(), "", ""}); }, {"larger than 1024"}));
}

TEST(ResolveModel, SaysWhereItLooked) {
  const TempDir dir;
  const HubLocations hub{dir.path(), "", ""};
  EXPECT_TRUE(fails_with([&] { resolve_model("", hub); }, {"empty name"}));
  EXPECT_TRUE(fails_with([&] { resolve_model("org/name", hub); },
                         {"\"org/name\"", "not a directory", dir / "models--org--name"}));
  EXPECT_TRUE(fails_with([&] { resolve_model("org/name", {}); }, {"HF_HUB_CACHE", "HF_HOME", "HOME"}));
  EXPECT_TRUE(fails_with([&] { resolve_model(dir.path(), hub); }, {dir.path(), "without a config.json"}));
  std::filesystem::create_directories(dir / "models--org--empty/snapshots");
  EXPECT_TRUE(fails_with([&] { resolve_model("org/empty", hub); }, {"models--org--empty", "found none"}));
  std::filesystem::create_directories(dir / "models--org--bare");
  EXPECT_TRUE(fails_with([&] { resolve_model("org/bare", hub); }, {"models--org--bare", "No such file"}));
}

TEST(ResolveModel, IdsCannotLeadOutOfTheCache) {
  const TempDir dir;
  const HubLocations hub{dir / "hub", "", ""};
  std::filesystem::create_directories(dir / "hub/models--a");
  add_snapshot(dir / "b", kCommit);
  for (const std::string id :
       {"a/../../b", "../b", "a/..", "..", "org/name/more", "/name", "org/", "/", "org/na me", "org/na\\me",
        "org--name", "a/b--c", "org/.name", "-org/name", "org/name.", "org/\xc3\xa9", "org/a..b"}) {
    EXPECT_TRUE(fails_with([&] { resolve_model(id, hub); }, {"not a repository id"})) << id;
  }
  EXPECT_TRUE(
      fails_with([&] { resolve_model("org/" + std::string(97, 'n'), hub); }, {"not a repository id"}));
  EXPECT_TRUE(fails_with([&] { resolve_model(std::string("org/n\0", 6), hub); }, {"not a repository id"}));
}

}  // namespace
}  // namespace kl
