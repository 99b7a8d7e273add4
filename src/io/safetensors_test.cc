// Reading safetensors: what a legal file may look like, what becomes of it, and what damage to it does.
#include "io/safetensors.h"

#include <gtest/gtest.h>
// After gtest, which it uses without naming it.
#include <rapidcheck/gtest.h>

#include "io/test_files.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::fails_with;
using testing::little_endian;
using testing::Parsed;
using testing::safetensors_bytes;

std::string valid_file() {
  return safetensors_bytes(R"({"__metadata__":{"format":"pt","x":"\u00e9 \"y\""},)"
                           R"("w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                           R"("b":{"data_offsets":[24,28],"shape":[1,2],"dtype":"BF16"},)"
                           R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[28,29]},)"
                           R"("empty":{"dtype":"I64","shape":[0,7],"data_offsets":[24,24]}}     )",
                           29);
}

TEST(Safetensors, ReadsEveryField) {
  const Parsed parsed(valid_file());
  const SafetensorsFile& file = parsed.file;
  ASSERT_EQ(file.entries().size(), 4u);
  EXPECT_EQ(file.entries()[0].name, "b");  // sorted
  EXPECT_EQ(file.entries()[3].name, "w");
  const SafetensorsFile::Entry* w = file.find("w");
  ASSERT_NE(w, nullptr);
  EXPECT_EQ(w->dtype, DType::f32);
  EXPECT_EQ(w->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(w->bytes, 24);
  EXPECT_EQ(file.find("b")->data, w->data + 24);
  EXPECT_EQ(std::to_integer<int>(file.find("scalar")->data[0]), 28);
  EXPECT_EQ(file.find("scalar")->tensor().rank, 0);
  EXPECT_EQ(file.find("scalar")->tensor().numel(), 1);
  EXPECT_EQ(file.find("empty")->bytes, 0);
  for (const char* absent : {"", "a", "ww", "zzz", "__metadata__"}) EXPECT_EQ(file.find(absent), nullptr);
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"x", "\xc3\xa9 \"y\""}}));
}

TEST(Safetensors, AcceptsOddButLegalFiles) {
  EXPECT_TRUE(Parsed(safetensors_bytes("{}", 0)).file.entries().empty());
  EXPECT_TRUE(Parsed(safetensors_bytes(R"({"__metadata__":{}})", 0)).file.metadata().empty());
  EXPECT_EQ(Parsed(safetensors_bytes(
                       "{ \n\t\"a\" : {\"dtype\":\"U8\",\"shape\":[ 2 ],\"data_offsets\":[0, 2]}}\n ", 2))
                .file.entries()
                .size(),
            1u);
  // Any text may be a name, also none at all.
  const Parsed names(safetensors_bytes(R"({"":{"dtype":"U8","shape":[],"data_offsets":[0,1]},)"
                                       R"("\u0000":{"dtype":"U8","shape":[],"data_offsets":[1,2]}})",
                                       2));
  EXPECT_NE(names.file.find(""), nullptr);
  EXPECT_NE(names.file.find(std::string_view("\0", 1)), nullptr);
  // A size of zero makes the tensor empty, wherever it stands.
  const Parsed empty(
      safetensors_bytes(R"({"e":{"dtype":"F64","shape":[1000000000,0],"data_offsets":[0,0]}})", 0));
  EXPECT_EQ(empty.file.find("e")->tensor().numel(), 0);
}

TEST(Safetensors, EveryDTypeHasItsSize) {
  for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
    const auto dtype = static_cast<DType>(i);
    const int64_t bytes = 3 * size_of(dtype);
    const Parsed parsed(safetensors_bytes(
        cat(R"({"t":{"dtype":")", name_of(dtype), R"(","shape":[3],"data_offsets":[0,)", bytes, "]}}"),
        static_cast<size_t>(bytes)));
    EXPECT_EQ(parsed.file.find("t")->dtype, dtype);
    EXPECT_EQ(parsed.file.find("t")->bytes, bytes);
  }
}

TEST(Safetensors, ViewsNeedAnAlignedPlaceAndAFittingRank) {
  std::string header = R"({"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                       R"("word":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},)"
                       R"("deep":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[9,10]}})";
  header.append(8 - header.size() % 8, ' ');
  const Parsed parsed(safetensors_bytes(header, 10));
  const SafetensorsFile::Entry* word = parsed.file.find("word");
  ASSERT_NE(word, nullptr);
  EXPECT_FALSE(word->is_aligned());
  EXPECT_EQ(word->bytes, 8);
  EXPECT_TRUE(fails_with([&] { word->tensor(); }, {"\"word\"", "multiple of its element size, 4"}));
  EXPECT_TRUE(parsed.file.find("byte")->is_aligned());
  EXPECT_TRUE(fails_with([&] { parsed.file.find("deep")->tensor(); },
                         {"\"deep\"", "[1, 1, 1, 1, 1]", "rank 5", "at most 4"}));
}

TEST(Safetensors, ViewHasRowMajorStrides) {
  std::string header = R"({"t":{"dtype":"F32","shape":[2,3,4],"data_offsets":[0,96]}})";
  header.append(8 - header.size() % 8, ' ');
  const Parsed parsed(safetensors_bytes(header, 96));
  const Tensor t = parsed.file.find("t")->tensor();
  EXPECT_EQ(t.shape_string(), "[2, 3, 4]");
  EXPECT_TRUE(t.is_contiguous());
  EXPECT_EQ(reinterpret_cast<const std::byte*>(t.at<float>(1, 2, 3)), parsed.file.find("t")->data + 92);
}

TEST(Safetensors, EveryPrefixOfAFileIsRefused) {
  const std::string whole = valid_file();
  ASSERT_NO_THROW(Parsed parsed(whole));
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(Parsed parsed(whole.substr(0, size)), Error) << "cut to " << size << " bytes";
  }
}

TEST(Safetensors, EveryPrefixOfAHeaderIsRefused) {
  const std::string whole = valid_file(), data = whole.substr(whole.size() - 29);
  const std::string padded = whole.substr(8, whole.size() - 8 - 29),
                    text = padded.substr(0, padded.rfind('}') + 1);
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_THROW(Parsed parsed(little_endian(size) + text.substr(0, size) + data), Error)
        << "cut to " << size;
  }
  EXPECT_NO_THROW(Parsed parsed(little_endian(text.size()) + text + data));
}

// What a reader may rely on for every accepted file. Reads each byte that was handed out.
void expect_sound(const Parsed& parsed, size_t file_size) {
  int64_t total = 0;
  unsigned sum = 0;
  for (const SafetensorsFile::Entry& e : parsed.file.entries()) {
    int64_t bytes = size_of(e.dtype);
    for (const int64_t n : e.shape) bytes *= n;
    ASSERT_EQ(e.bytes, bytes);
    ASSERT_GE(e.data, parsed.memory.get());
    ASSERT_LE(e.data + e.bytes, parsed.memory.get() + file_size);
    for (int64_t i = 0; i < e.bytes; ++i) sum += std::to_integer<unsigned>(e.data[i]);
    total += e.bytes;
  }
  ASSERT_LE(total, static_cast<int64_t>(file_size));
  ASSERT_NE(sum, ~0u);  // uses the bytes
}

TEST(Safetensors, FlippedBitsAreRefusedOrHarmless) {
  const std::string whole = valid_file();
  testing::Random random(7);
  int accepted = 0, refused = 0;
  const auto attempt = [&](const std::string& bytes) {
    try {
      const Parsed parsed(bytes);
      expect_sound(parsed, bytes.size());
      ++accepted;
    } catch (const Error&) {
      ++refused;
    }
  };
  for (size_t at = 0; at < whole.size(); ++at) {  // every single bit
    for (int bit = 0; bit < 8; ++bit) {
      std::string bytes = whole;
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << bit));
      attempt(bytes);
    }
  }
  for (int round = 0; round < 20000; ++round) {  // a few bytes: other values, copies, swaps, cuts
    std::string bytes = whole;
    for (int64_t change = random.integer(1, 4); change > 0; --change) {
      const auto place = [&] {
        return static_cast<size_t>(random.integer(0, static_cast<int64_t>(bytes.size()) - 1));
      };
      const size_t a = place(), b = place();
      switch (random.integer(0, 4)) {
        case 0: bytes[a] = static_cast<char>(random.bits()); break;
        case 1: bytes[a] = "0123456789{}[]\",:-e. \\"[random.integer(0, 21)]; break;
        case 2: bytes[a] = bytes[b]; break;
        case 3: std::swap(bytes[a], bytes[b]); break;
        case 4: bytes.erase(a, static_cast<size_t>(random.integer(0, 3))); break;
      }
    }
    attempt(bytes);
  }
  // The flips reach both sides: data bits and letters of names are free, the rest is not.
  EXPECT_GT(accepted, 200);
  EXPECT_GT(refused, 10000);
}

RC_GTEST_PROP(Safetensors, AnyBytesAreRefusedOrHarmless,
              (const std::string& header, const std::string& data)) {
  const std::string bytes = little_endian(header.size() + 1) + "{" + header + data;
  try {
    const Parsed parsed(bytes);
    expect_sound(parsed, bytes.size());
  } catch (const Error& e) {
    RC_ASSERT(std::string(e.what()).rfind("test.safetensors: ", 0) == 0);
  }
}

TEST(Safetensors, OpenNamesTheFile) {
  const testing::TempDir dir;
  EXPECT_TRUE(fails_with([&] { SafetensorsFile::open(dir / "none.safetensors"); },
                         {dir / "none.safetensors", "No such file"}));
  EXPECT_TRUE(fails_with([&] { SafetensorsFile::open(dir.path()); }, {dir.path(), "not a regular file"}));
  testing::write_file(dir / "empty.safetensors", "");
  EXPECT_TRUE(fails_with([&] { SafetensorsFile::open(dir / "empty.safetensors"); },
                         {dir / "empty.safetensors: 0 bytes long"}));
  testing::write_file(dir / "good.safetensors", valid_file());
  SafetensorsFile file = SafetensorsFile::open(dir / "good.safetensors");
  const SafetensorsFile moved = std::move(file);  // entries stay where they are
  EXPECT_EQ(std::to_integer<int>(moved.find("scalar")->data[0]), 28);
}

}  // namespace
}  // namespace kl
