#include "text/json_text.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "text/test_text.h"

namespace kl {
namespace {

std::string rewritten(std::string_view text, bool compact) {
  return python_json(parse_json(text, "x"), compact);
}

// Expected values: json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False[, separators=(",", ":")]).
TEST(JsonText, AsPythonWrites) {
  const char* text =
      R"({"type": "function", "a": {"b": [1, -2.5, 1e3, true, null, "é\n\"\\/"], "B": {}, "é": []}})";
  EXPECT_EQ(rewritten(text, true),
            R"({"a":{"B":{},"b":[1,-2.5,1000.0,true,null,"é\n\"\\/"],"é":[]},"type":"function"})");
  EXPECT_EQ(
      rewritten(text, false),
      R"({"a": {"B": {}, "b": [1, -2.5, 1000.0, true, null, "é\n\"\\/"], "é": []}, "type": "function"})");
  EXPECT_EQ(rewritten(R"(["\u0001\u001f\u007f\b\f\r\t\u2028\ud83d\ude0a<>&'"])", true),
            "[\"\\u0001\\u001f\x7F\\b\\f\\r\\t\u2028\U0001F60A<>&'\"]");
  EXPECT_EQ(
      rewritten("[1e16, 1e15, 0.0001, 0.00001, 0.1, -0.0, 18446744073709551615, -9223372036854775808]", true),
      "[1e+16,1000000000000000.0,0.0001,1e-05,0.1,-0.0,18446744073709551615,-9223372036854775808]");
  EXPECT_EQ(
      rewritten("[123456789.5, 9999999999999998.0, 1.7976931348623157e308, 5e-324, 1.5e-5, -12E3]", true),
      "[123456789.5,9999999999999998.0,1.7976931348623157e+308,5e-324,1.5e-05,-12000.0]");
  EXPECT_EQ(rewritten("[]", false), "[]");
  EXPECT_EQ(rewritten("\"a\"", false), "\"a\"");
}

TEST(JsonText, BadTextIsAnError) {
  for (const char* bad : {"", "[", "{\"a\":}", "[1] 2", "\"\xFF\"", "\"\\ud800\"", "[1e999]", "nan"})
    EXPECT_TRUE(testing::error_of([&] { parse_json(bad, "the tools"); }).starts_with("the tools: not JSON: "))
        << bad;
  const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_EQ(testing::error_of([&] { rewritten(nested(100), true); }), "");
  EXPECT_EQ(testing::error_of([&] { rewritten(nested(101), true); }), "x: nested deeper than 100 levels");
  EXPECT_EQ(testing::error_of([] { parse_json(std::string(1'000'000, '['), "x"); }),
            "x: nested deeper than 100 levels");
}

}  // namespace
}  // namespace kl
