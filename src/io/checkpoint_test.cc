// Checkpoint directories: with and without an index, complete and not, honest and not.
#include "io/checkpoint.h"

#include <sys/stat.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "io/test_files.h"
#include "testing/golden.h"

namespace kl {
namespace {

using testing::fails_with;
using testing::safetensors_bytes;
using testing::TempDir;
using testing::write_file;

const std::string kIndex = "model.safetensors.index.json";

// A file that holds U8 tensors of one byte with these names.
std::string shard(const std::vector<std::string>& names) {
  std::string header;
  for (size_t i = 0; i < names.size(); ++i) {
    header += cat(i ? "," : "{", '"', names[i], R"(":{"dtype":"U8","shape":[1],"data_offsets":[)", i, ",",
                  i + 1, "]}");
  }
  return safetensors_bytes(header + "}", names.size());
}

// A directory with two shards: x, y in 1.safetensors and z in 2.safetensors.
struct TwoShards : TempDir {
  TwoShards() {
    write_file(*this / "config.json", "{}");
    write_file(*this / "1.safetensors", shard({"x", "y"}));
    write_file(*this / "2.safetensors", shard({"z"}));
  }
  void index(const std::string& weight_map) const {
    write_file(*this / kIndex, R"({"metadata":{"total_size":1},"weight_map":)" + weight_map + "}");
  }
};

const std::string kHonest = R"({"x":"1.safetensors","y":"1.safetensors","z":"2.safetensors"})";

TEST(Checkpoint, FindsTensorsOfAllFiles) {
  for (const bool with_index : {false, true}) {
    const TwoShards dir;
    if (with_index) dir.index(kHonest);
    Checkpoint opened = Checkpoint::open(dir.path());
    const Checkpoint checkpoint = std::move(opened);
    EXPECT_EQ(checkpoint.directory(), dir.path());
    EXPECT_EQ(checkpoint.files(), 2u);
    EXPECT_EQ(checkpoint.bytes(), 3);
    ASSERT_EQ(checkpoint.entries().size(), 3u);
    EXPECT_EQ(checkpoint.entries()[2]->name, "z");
    for (const char* name : {"x", "y", "z"}) {
      ASSERT_TRUE(checkpoint.find(name)) << name;
      EXPECT_EQ(*checkpoint.find(name)->ptr<uint8_t>(), name[0] == 'y' ? 1 : 0);
    }
    for (const char* name : {"", "w", "xx", "zz"}) {
      EXPECT_FALSE(checkpoint.find(name));
      EXPECT_EQ(checkpoint.find_entry(name), nullptr);
    }
  }
}

TEST(Checkpoint, OpensOnlyWhatTheIndexNames) {
  const TwoShards dir;
  write_file(dir / "other.safetensors", "not even a safetensors file");
  EXPECT_THROW(Checkpoint::open(dir.path()), Error);
  dir.index(kHonest);
  EXPECT_EQ(Checkpoint::open(dir.path()).files(), 2u);
  dir.index(R"({"x":"1.safetensors"})");  // y is not named, but it is there
  EXPECT_TRUE(Checkpoint::open(dir.path()).find("y"));
  EXPECT_FALSE(Checkpoint::open(dir.path()).find("z"));
}

TEST(Checkpoint, SkipsHiddenAndOtherFiles) {
  const TwoShards dir;
  write_file(dir / "._1.safetensors", "resource fork");
  write_file(dir / "1.safetensors.incomplete", "");
  write_file(dir / "tokenizer.json", "{}");
  EXPECT_EQ(Checkpoint::open(dir.path()).files(), 2u);
}

TEST(Checkpoint, FollowsLinks) {
  const TwoShards dir;
  std::filesystem::create_directory(dir / "snapshot");
  for (const char* name : {"config.json", "1.safetensors", "2.safetensors"}) {
    std::filesystem::create_symlink(std::string("../") + name, dir / "snapshot" + "/" + name);
  }
  EXPECT_EQ(Checkpoint::open(dir / "snapshot").bytes(), 3);
  std::filesystem::remove(dir / "2.safetensors");
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir / "snapshot"); }, {"1 of 2", "missing: 2.safetensors"}));
}

TEST(Checkpoint, SaysWhatADirectoryLacks) {
  const TempDir dir;
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir / "none"); }, {dir / "none", "No such file"}));
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); }, {dir.path(), "config.json", "found none"}));
  write_file(dir / "config.json", "{}");
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir / "config.json"); }, {"not a directory"}));
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); }, {dir.path(), "*.safetensors", "found none"}));
  std::filesystem::create_directory(dir / "folder.safetensors");
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); }, {"missing: folder.safetensors"}));
}

TEST(Checkpoint, ListsAllMissingShards) {
  const TwoShards dir;
  dir.index(R"({"a":"8.safetensors","b":"9.safetensors","x":"1.safetensors","c":"8.safetensors"})");
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); },
                         {dir.path(), "2 of 3", "missing: 8.safetensors, 9.safetensors", "download"}));
  std::string many;
  for (int i = 0; i < 150; ++i) many += cat(i ? "," : "{", '"', i, "\":\"missing-", i, '"');
  dir.index(many + "}");
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); }, {"150 of 150", "missing-99", "and 50 more"}));
}

TEST(Checkpoint, ATensorStandsInOneFile) {
  const TwoShards dir;
  write_file(dir / "2.safetensors", shard({"z", "y"}));
  const std::vector<std::string> message = {dir.path(), "\"y\"", "two files", "1.safetensors",
                                            "2.safetensors"};
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); }, message));
  dir.index(kHonest);
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); }, message));
}

TEST(Checkpoint, TheIndexMustTellTheTruth) {
  const TwoShards dir;
  dir.index(R"({"x":"1.safetensors","y":"2.safetensors"})");
  EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); },
                         {"\"y\"", "says that it is in 2.safetensors", "found it in 1.safetensors"}));
  for (const char* absent : {"a", "xx", "zz"}) {  // before, between and behind the tensors that are there
    dir.index(cat(R"({"x":"1.safetensors","z":"2.safetensors",")", absent, R"(":"2.safetensors"})"));
    EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); },
                           {cat('"', absent, '"'), "in 2.safetensors", "found it in no file"}));
  }
}

TEST(Checkpoint, TheIndexCannotLeadOutOfTheDirectory) {
  const TwoShards dir;
  std::filesystem::create_directory(dir / "sub");
  for (const char* name :
       {"", ".", "..", "../1.safetensors", "/etc/passwd", "sub/1.safetensors", "./1.safetensors", ".hidden",
        "..\\\\1.safetensors", "1.safetensors\\u0000", "1\\n.safetensors"}) {
    dir.index(cat(R"({"x":")", name, "\"}"));
    EXPECT_TRUE(fails_with([&] { Checkpoint::open(dir.path()); },
                           {kIndex, "\"x\"", "expected the name of a file in the same directory"}))
        << name;
  }
}

TEST(Checkpoint, RefusesHostileIndexes) {
  const TwoShards dir;
  const auto refuses = [&](const std::string& text, const std::vector<std::string>& message) {
    write_file(dir / kIndex, text);
    return fails_with([&] { Checkpoint::open(dir.path()); }, message);
  };
  const std::string nested(17, '['), map = R"("weight_map":)" + kHonest;
  EXPECT_TRUE(refuses("", {kIndex, "not valid JSON"}));
  EXPECT_TRUE(refuses("[]", {kIndex, "weight_map", "found a list"}));
  EXPECT_TRUE(refuses("3", {kIndex, "weight_map", "found a number"}));
  EXPECT_TRUE(refuses("{}", {kIndex, "weight_map", "found none"}));
  EXPECT_TRUE(
      refuses(R"({"metadata":{"weight_map":{"x":"1.safetensors"}}})", {kIndex, "weight_map", "found none"}));
  EXPECT_TRUE(refuses(R"({"weight_map":{}})", {kIndex, "weight_map is empty"}));
  EXPECT_TRUE(refuses(R"({"weight_map":[]})", {kIndex, "expected an object", "found a list"}));
  EXPECT_TRUE(refuses(R"({"weight_map":"x"})", {kIndex, "expected an object", "found a string"}));
  EXPECT_TRUE(refuses(R"({"weight_map":null})", {kIndex, "expected an object", "found null"}));
  EXPECT_TRUE(refuses(R"({"weight_map":{"x":1}})", {kIndex, "\"x\"", "found a number"}));
  EXPECT_TRUE(refuses(R"({"weight_map":{"x":{}}})", {kIndex, "\"x\"", "found an object"}));
  EXPECT_TRUE(refuses(R"({"weight_map":{"x":["1.safetensors"]}})", {kIndex, "\"x\"", "found a list"}));
  EXPECT_TRUE(
      refuses(R"({"weight_map":{"x":"1.safetensors","x":"1.safetensors"}})", {kIndex, "\"x\" twice"}));
  EXPECT_TRUE(refuses("{" + map + "," + map + "}", {kIndex, "weight_map stands twice"}));
  EXPECT_TRUE(refuses("{" + map + "} x", {kIndex, "not valid JSON"}));
  EXPECT_TRUE(refuses("{" + map + "}" + std::string("\0x", 2), {kIndex, "zero byte"}));
  EXPECT_TRUE(refuses("{\"\xff\":1," + map + "}", {kIndex, "UTF-8"}));
  EXPECT_TRUE(refuses("{\"deep\":" + nested, {kIndex, "more than 16 deep"}));
  // Whatever else stands beside the map is nobody's business.
  write_file(dir / kIndex,
             R"({"a":[1,{"weight_map":{"q":"/"}},null],"b":-1.5,)" + map + R"(,"c":{"d":true}})");
  EXPECT_EQ(Checkpoint::open(dir.path()).entries().size(), 3u);
}

// A legal file whose F32 tensor begins one byte too late for its type.
TEST(Checkpoint, CopiesWhatIsNotAligned) {
  const TempDir dir;
  std::string header = R"({"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                       R"("none":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},)"
                       R"("word":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
  header.append(8 - header.size() % 8, ' ');
  std::string file = safetensors_bytes(header, 9);
  const float values[] = {1.5f, -2.f};
  std::memcpy(file.data() + file.size() - 8, values, 8);
  write_file(dir / "config.json", "{}");
  write_file(dir / "m.safetensors", file);

  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  std::vector<void*> seen(4);
  std::vector<std::thread> threads;
  for (void*& p : seen) threads.emplace_back([&] { p = checkpoint.find("word")->data; });
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(std::set<void*>(seen.begin(), seen.end()).size(), 1u);  // one copy
  const Tensor word = *checkpoint.find("word");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(word.data) % 4, 0u);
  EXPECT_EQ(word.ptr<float>()[0], 1.5f);
  EXPECT_EQ(word.ptr<float>()[1], -2.f);
  EXPECT_EQ(checkpoint.find("none")->numel(), 0);
  EXPECT_TRUE(*checkpoint.find("none"));
  EXPECT_EQ(static_cast<const void*>(checkpoint.find_entry("byte")->data), checkpoint.find("byte")->data);
}

// The shipped model, against its headers as a general JSON library reads them.
TEST(Checkpoint, DemoModelIsWhatItsHeadersSay) {
  const std::string model = testing::demo_model();
  const Checkpoint checkpoint = Checkpoint::open(model);
  EXPECT_EQ(checkpoint.files(), 3u);
  size_t count = 0;
  int64_t total = 0;
  for (int i = 1; i <= 3; ++i) {
    const std::string bytes = read_text_file(cat(model, "/model-0000", i, "-of-00003.safetensors"));
    uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    const auto header = nlohmann::json::parse(bytes.substr(8, length));
    for (const auto& [name, fields] : header.items()) {
      if (name == "__metadata__") continue;
      ++count;
      const SafetensorsFile::Entry* entry = checkpoint.find_entry(name);
      ASSERT_NE(entry, nullptr) << name;
      EXPECT_EQ(name_of(entry->dtype), fields["dtype"].get<std::string>()) << name;
      EXPECT_EQ(entry->shape, fields["shape"].get<std::vector<int64_t>>()) << name;
      const auto begin = fields["data_offsets"][0].get<size_t>(),
                 end = fields["data_offsets"][1].get<size_t>();
      ASSERT_EQ(entry->bytes, static_cast<int64_t>(end - begin)) << name;
      EXPECT_EQ(std::memcmp(entry->data, bytes.data() + 8 + length + begin, end - begin), 0) << name;
      EXPECT_TRUE(checkpoint.find(name)->is_contiguous()) << name;
      total += entry->bytes;
    }
  }
  EXPECT_EQ(checkpoint.entries().size(), count);
  EXPECT_EQ(checkpoint.bytes(), total);
  const auto index = nlohmann::json::parse(read_text_file(model + "/" + kIndex));
  EXPECT_EQ(index["weight_map"].size(), count);
  EXPECT_EQ(index["metadata"]["total_size"].get<int64_t>(), total);
  EXPECT_EQ(checkpoint.find("model.layers.0.self_attn.A_log")->shape_string(), "[1, 1, 2, 1]");
  EXPECT_EQ(checkpoint.find("lm_head.weight")->shape_string(), "[8192, 256]");
}

TEST(TextFile, ReadsUpToItsLimit) {
  const TempDir dir;
  write_file(dir / "t", std::string(1000, 'x'));
  EXPECT_EQ(read_text_file(dir / "t", 1000), std::string(1000, 'x'));
  EXPECT_TRUE(fails_with([&] { read_text_file(dir / "t", 999); }, {dir / "t", "larger than 999 bytes"}));
  write_file(dir / "empty", "");
  EXPECT_EQ(read_text_file(dir / "empty"), "");
  EXPECT_FALSE(read_text_file("/proc/self/status").empty());  // says that it has no bytes, and has some
  EXPECT_TRUE(fails_with([&] { read_text_file(dir / "none"); }, {dir / "none", "No such file"}));
  EXPECT_TRUE(fails_with([&] { read_text_file(dir.path()); }, {dir.path(), "not a regular file"}));
  ASSERT_EQ(mkfifo((dir / "pipe").c_str(), 0600), 0);
  EXPECT_TRUE(
      fails_with([&] { read_text_file(dir / "pipe"); }, {"not a regular file"}));  // and does not wait
}

TEST(TextFile, ExistsMeansARegularFile) {
  const TempDir dir;
  write_file(dir / "t", "");
  EXPECT_TRUE(file_exists(dir / "t"));
  EXPECT_FALSE(file_exists(dir / "none"));
  EXPECT_FALSE(file_exists(dir.path()));
  std::filesystem::create_symlink("t", dir / "link");
  std::filesystem::create_symlink("none", dir / "dangling");
  EXPECT_TRUE(file_exists(dir / "link"));
  EXPECT_FALSE(file_exists(dir / "dangling"));
}

}  // namespace
}  // namespace kl
