// Every way a safetensors file can lie: each is refused, with a message that says where and what.
#include <gtest/gtest.h>

#include "io/safetensors_header.h"
#include "io/test_files.h"

namespace kl {
namespace {

using testing::fails_with;
using testing::little_endian;
using testing::Parsed;
using testing::safetensors_bytes;

// One U8 tensor "a" of two bytes, for headers that need another tensor beside the interesting one.
const std::string kA = R"("a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]})";

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
    {"negative zero",
     safetensors_bytes(tensor(R"("dtype":"U8","shape":[-0],"data_offsets":[0,0])"), 0),
     {"\"t\"", "shape", "found -0"}},
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
    {"tensor twice, with the same bytes",
     safetensors_bytes("{" + kA + "," + kA + "}", 2),
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

TEST(SafetensorsHostile, RefusesHostileFiles) {
  for (const Hostile& hostile : kHostile) {
    std::vector<std::string> message = hostile.message;
    message.push_back("test.safetensors: ");
    EXPECT_TRUE(fails_with([&] { Parsed parsed(hostile.bytes); }, message)) << hostile.what;
  }
}

TEST(SafetensorsHostile, RefusesTooManyNames) {
  std::string header = "{";
  for (size_t i = 0; i <= kMaxHeaderNames; ++i) {
    header += cat('"', i, R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)");
  }
  header.back() = '}';
  EXPECT_TRUE(fails_with([&] { Parsed parsed(safetensors_bytes(header, 0)); }, {"more than 262144 names"}));
}

TEST(SafetensorsHostile, RefusesTooManyDimensions) {
  const auto with_rank = [](size_t rank) {
    std::string sizes;
    for (size_t d = 0; d < rank; ++d) sizes += d ? ",1" : "1";
    return safetensors_bytes(tensor(R"("dtype":"U8","data_offsets":[0,1],"shape":[)" + sizes + "]"), 1);
  };
  EXPECT_EQ(Parsed(with_rank(64)).file.find("t")->shape.size(), 64u);
  EXPECT_TRUE(fails_with([&] { Parsed parsed(with_rank(65)); }, {"\"t\"", "more than 64 numbers in shape"}));
}

TEST(SafetensorsHostile, MessagesAreBoundedAndPrintable) {
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

}  // namespace
}  // namespace kl
