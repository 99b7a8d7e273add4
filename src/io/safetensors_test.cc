// Reading safetensors: what a legal file may look like, and every way a file can lie.
#include "io/safetensors.h"

#include <gtest/gtest.h>
// After gtest, which it uses without naming it.
#include <rapidcheck/gtest.h>

#include "io/safetensors_header.h"
#include "io/test_files.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::fails_with;
using testing::little_endian;
using testing::Parsed;
using testing::safetensors_bytes;

// One U8 tensor "a" of two bytes, for headers that need another tensor beside the interesting one.
const std::string kA = R"("a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]})";

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
  EXPECT_EQ(Parsed(safetensors_bytes("{ \n\t" + kA + "}\n ", 2)).file.entries().size(), 1u);
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

struct Hostile {
  const char* what;
  std::string bytes;
  std::vector<std::string> message;  // parts of it
};

std::string tensor(const std::string& fields) { return R"({"t":{)" + fields + "}}"; }

const Hostile kHostile[] = {
    // The length of the header.
    {"empty", "", {"0 bytes long", "at least 8"}},
    {"seven bytes", std::string(7, '\0'), {"7 bytes long", "at least 8"}},
    {"header beyond the end", little_endian(3) + "{}", {"claims 3 bytes", "only 2 follow"}},
    {"header of 2^64 - 1 bytes", little_endian(~0ull) + "{}", {"claims 18446744073709551615", "100000000"}},
    {"header of 2^63 bytes", little_endian(1ull << 63) + "{}", {"claims 9223372036854775808"}},
    {"header above the limit", little_endian(100'000'001) + "{}", {"claims 100000001", "100000000"}},
    {"not a safetensors file",
     "PK\x03\x04 something else entirely",
     {"claims", "is this a safetensors file"}},
    // The text of the header.
    {"no header", little_endian(0), {"starts with \"\"", "expected {"}},
    {"a list", safetensors_bytes("[]", 0), {"starts with \"[]\"", "expected {"}},
    {"leading space", safetensors_bytes(" {}", 0), {"expected {"}},
    {"byte order mark", safetensors_bytes("\xef\xbb\xbf{}", 0), {"\\xef\\xbb\\xbf{}", "expected {"}},
    {"not closed", safetensors_bytes("{" + kA, 2), {"not valid JSON at byte"}},
    {"trailing garbage", safetensors_bytes("{" + kA + "} x", 2), {"not valid JSON", "end of input"}},
    {"two objects", safetensors_bytes("{" + kA + "}{}", 2), {"not valid JSON", "end of input"}},
    {"zero byte", safetensors_bytes("{" + kA + "}" + std::string("\0x", 2), 2), {"zero byte"}},
    {"zero padding", safetensors_bytes("{" + kA + "}" + std::string(3, '\0'), 2), {"zero byte"}},
    {"a comment", safetensors_bytes("{" + kA + "/* */}", 2), {"not valid JSON"}},
    {"trailing comma", safetensors_bytes("{" + kA + ",}", 2), {"not valid JSON"}},
    {"bad UTF-8 name",
     safetensors_bytes("{\"\xff\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1),
     {"not valid JSON", "UTF-8", "\\xff"}},
    {"overlong UTF-8 metadata",
     safetensors_bytes("{\"__metadata__\":{\"k\":\"\xc0\xaf\"}}", 0),
     {"not valid JSON", "UTF-8"}},
    {"lone surrogate", safetensors_bytes(R"({"__metadata__":{"k":"\ud800"}})", 0), {"not valid JSON"}},
    {"raw control character",
     safetensors_bytes("{\"__metadata__\":{\"k\":\"\x1b\"}}", 0),
     {"not valid JSON"}},
    // Its structure.
    {"tensor is a list",
     safetensors_bytes(R"({"t":[]})", 0),
     {"\"t\"", "expected an object", "found a list"}},
    {"tensor is a string", safetensors_bytes(R"({"t":"x"})", 0), {"\"t\"", "found a string"}},
    {"tensor is null", safetensors_bytes(R"({"t":null})", 0), {"\"t\"", "found null"}},
    {"tensor is a number", safetensors_bytes(R"({"t":3})", 0), {"\"t\"", "found a number"}},
    {"no dtype",
     safetensors_bytes(tensor(R"("shape":[],"data_offsets":[0,1])"), 1),
     {"\"t\"", "dtype is missing"}},
    {"no shape",
     safetensors_bytes(tensor(R"("dtype":"U8","data_offsets":[0,1])"), 1),
     {"\"t\"", "shape is missing"}},
    {"no offsets",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[])"), 1),
     {"\"t\"", "data_offsets is missing"}},
    {"fields of the tensor before do not count",
     safetensors_bytes("{" + kA + R"(,"t":{"shape":[],"data_offsets":[2,3]}})", 3),
     {"\"t\"", "dtype is missing"}},
    {"field twice",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[],"dtype":"F32","data_offsets":[0,1])"), 1),
     {"\"t\"", "dtype stands twice"}},
    {"unknown field",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[],"data_offsets":[0,1],"code":"x")"), 1),
     {"\"t\"", "unknown field \"code\""}},
    {"unknown dtype",
     safetensors_bytes(tensor(R"("dtype":"F128","shape":[],"data_offsets":[0,1])"), 1),
     {"\"t\"", "unknown dtype \"F128\"", "BF16"}},
    {"dtype in lower case",
     safetensors_bytes(tensor(R"("dtype":"bf16","shape":[],"data_offsets":[0,2])"), 2),
     {"unknown dtype \"bf16\""}},
    {"dtype is a number",
     safetensors_bytes(tensor(R"("dtype":1,"shape":[],"data_offsets":[0,1])"), 1),
     {"\"t\"", "dtype", "expected a string", "found a number"}},
    {"dtype is an object",
     safetensors_bytes(tensor(R"("dtype":{},"shape":[],"data_offsets":[0,1])"), 1),
     {"\"t\"", "dtype", "found an object"}},
    {"shape is a number",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":1,"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "expected a list", "found a number"}},
    {"shape holds a list",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[[1]],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "found a list"}},
    {"deep nesting",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":)" + std::string(100000, '[')), 1),
     {"\"t\"", "shape", "found a list"}},
    {"shape holds a string",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":["1"],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "whole number", "found a string"}},
    {"negative size",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[-1],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "whole number", "found -1"}},
    {"fractional size",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[1.5],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "found 1.5"}},
    {"size with an exponent",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[1e0],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "found 1e0"}},
    {"size of 2^63",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "found 9223372036854775808"}},
    {"size of 2^64",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "found 18446744073709551616"}},
    {"size is true",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[true],"data_offsets":[0,1])"), 1),
     {"\"t\"", "shape", "found true"}},
    {"one offset",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[],"data_offsets":[0])"), 1),
     {"\"t\"", "1 numbers", "expected 2"}},
    {"three offsets",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[],"data_offsets":[0,1,2])"), 1),
     {"\"t\"", "more than 2 numbers in data_offsets"}},
    {"negative offset",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[],"data_offsets":[-1,0])"), 1),
     {"\"t\"", "data_offsets", "found -1"}},
    {"metadata is a list", safetensors_bytes(R"({"__metadata__":[]})", 0), {"__metadata__", "found a list"}},
    {"metadata value is a number",
     safetensors_bytes(R"({"__metadata__":{"k":1}})", 0),
     {"__metadata__", "\"k\"", "expected a string", "found a number"}},
    {"metadata value is an object",
     safetensors_bytes(R"({"__metadata__":{"k":{}}})", 0),
     {"__metadata__", "\"k\"", "found an object"}},
    {"metadata twice",
     safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})", 0),
     {"__metadata__ stands twice"}},
    {"metadata key twice", safetensors_bytes(R"({"__metadata__":{"k":"","k":""}})", 0), {"\"k\" twice"}},
    {"tensor twice",
     safetensors_bytes("{" + kA + R"(,"\u0061":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", 4),
     {"\"a\" stands twice"}},
    // Its numbers against the file.
    {"reversed offsets",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[1],"data_offsets":[2,1])"), 2),
     {"\"t\"", "[2, 1]", "inside the 2 bytes"}},
    {"beyond the end",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[3],"data_offsets":[0,3])"), 2),
     {"\"t\"", "[0, 3]", "inside the 2 bytes"}},
    {"far beyond the end",
     safetensors_bytes(
         tensor(R"("dtype":"U8","shape":[1],"data_offsets":[9223372036854775806,9223372036854775807])"), 2),
     {"\"t\"", "inside the 2 bytes"}},
    {"too few bytes",
     safetensors_bytes(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,7])"), 7),
     {"\"t\"", "hold 7 bytes", "expected 8 for F32 [2]"}},
    {"bytes for an empty tensor",
     safetensors_bytes(tensor(R"("dtype":"F32","shape":[2,0],"data_offsets":[0,8])"), 8),
     {"\"t\"", "hold 8 bytes", "expected 0 for F32 [2, 0]"}},
    {"product wraps to the right size",
     safetensors_bytes(tensor(R"("dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4])"), 4),
     {"\"t\"", "[4611686018427387905]", "does not fit in 64 bits"}},
    {"product wraps to zero",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0),
     {"\"t\"", "does not fit in 64 bits"}},
    {"product wraps before a zero",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0])"), 0),
     {"\"t\"", "does not fit in 64 bits"}},
    {"overlap",
     safetensors_bytes("{" + kA + R"(,"t":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", 3),
     {"\"t\"", "begins at byte 1", "expected 2", "overlap"}},
    {"the same bytes twice",
     safetensors_bytes("{" + kA + R"(,"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2),
     {"begins at byte 0", "expected 2", "overlap"}},
    {"empty tensor inside another",
     safetensors_bytes("{" + kA + R"(,"t":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}})", 2),
     {"\"t\"", "begins at byte 1", "overlap"}},
    {"gap",
     safetensors_bytes("{" + kA + R"(,"t":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})", 5),
     {"\"t\"", "begins at byte 3", "expected 2", "gap"}},
    {"gap at the start",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"), 2),
     {"\"t\"", "begins at byte 1", "gap"}},
    {"bytes behind the last tensor",
     safetensors_bytes("{" + kA + "}", 3),
     {"end at byte 2", "expected 3, the end of the file"}},
    {"bytes without tensors", safetensors_bytes("{}", 1), {"end at byte 0", "expected 1"}},
};

TEST(Safetensors, RefusesHostileFiles) {
  for (const Hostile& hostile : kHostile) {
    std::vector<std::string> message = hostile.message;
    message.push_back("test.safetensors: ");
    EXPECT_TRUE(fails_with([&] { Parsed parsed(hostile.bytes); }, message)) << hostile.what;
  }
}

TEST(Safetensors, RefusesTooManyNames) {
  std::string header = "{";
  for (size_t i = 0; i <= kMaxHeaderNames; ++i) {
    header += cat('"', i, R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)");
  }
  header.back() = '}';
  EXPECT_TRUE(fails_with([&] { Parsed parsed(safetensors_bytes(header, 0)); }, {"more than 262144 names"}));
}

TEST(Safetensors, RefusesTooManyDimensions) {
  const auto with_rank = [](size_t rank) {
    std::string sizes;
    for (size_t d = 0; d < rank; ++d) sizes += d ? ",1" : "1";
    return safetensors_bytes(tensor(R"("dtype":"U8","data_offsets":[0,1],"shape":[)" + sizes + "]"), 1);
  };
  EXPECT_EQ(Parsed(with_rank(64)).file.find("t")->shape.size(), 64u);
  EXPECT_TRUE(fails_with([&] { Parsed parsed(with_rank(65)); }, {"\"t\"", "more than 64 numbers in shape"}));
}

TEST(Safetensors, MessagesAreBoundedAndPrintable) {
  const std::string name = "\xc3\xa9\x7f" + std::string(100000, 'n');
  const std::string bytes = safetensors_bytes("{\"" + name + "\":{\"dtype\":\"\\u001b[31m\"}}", 0);
  try {
    Parsed parsed(bytes);
    FAIL() << "no error";
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_LT(message.size(), 1000u);
    EXPECT_NE(message.find("\\xc3\\xa9\\x7fnnn"), message.npos) << message;
    EXPECT_NE(message.find("\\x1b[31m"), message.npos) << message;
    EXPECT_TRUE(std::all_of(message.begin(), message.end(), [](char c) { return c >= 0x20 && c < 0x7f; }));
  }
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
