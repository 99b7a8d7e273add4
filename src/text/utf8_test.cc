#include "text/utf8.h"

#include <unordered_set>

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "text/test_text.h"

namespace kl {
namespace {

std::string readable(std::string_view bytes) {
  std::string out;
  append_readable(out, bytes, true);
  return out;
}

TEST(Utf8, WritesAndReadsEveryCodePoint) {
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code <= 0xDFFF) continue;
    std::string bytes;
    append_utf8(bytes, code);
    const Utf8Char c = utf8_char(bytes.data(), bytes.data() + bytes.size());
    ASSERT_EQ(c.code, code);
    ASSERT_EQ(c.length, bytes.size());
    ASSERT_EQ(c.kind, Utf8Char::Kind::well_formed);
    for (size_t n = 1; n < bytes.size(); ++n) {
      const Utf8Char part = utf8_char(bytes.data(), bytes.data() + n);
      ASSERT_EQ(part.kind, Utf8Char::Kind::unfinished) << static_cast<uint32_t>(code);
      ASSERT_EQ(part.length, n);
    }
  }
}

// Expected values: bytes.decode("utf-8", "replace") of Python; the first two are tables of the Unicode
// standard (section 3.9).
TEST(Utf8, OneReplacementPerMaximalSubpart) {
  EXPECT_EQ(readable("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(readable("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), "\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(readable("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");            // a surrogate
  EXPECT_EQ(readable("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");  // U+110000
  EXPECT_EQ(readable("\xF4\x8F\xBF\xBF\xF5"), "\U0010FFFF\uFFFD");
  EXPECT_EQ(readable("a\xE2\x82"), "a\uFFFD");
  EXPECT_EQ(readable("\xE2\x82\xAC\x80z"), "\u20AC\uFFFDz");
  EXPECT_EQ(readable(""), "");
}

TEST(Utf8, UnfinishedCharactersAreLeft) {
  std::string out;
  EXPECT_EQ(append_readable(out, "a\xF0\x9F\x98", false), 1u);
  EXPECT_EQ(out, "a");
  EXPECT_EQ(append_readable(out, "\xE2\x28", false), 2u);  // not unfinished: ill-formed
  EXPECT_EQ(out, "a\uFFFD(");
}

// All characters, and all byte strings that begin one without finishing it, packed into integers.
struct Encodings {
  std::unordered_set<uint32_t> characters, beginnings;
};
uint32_t packed(std::string_view bytes) {
  uint32_t value = 0;
  for (const char c : bytes) value = value << 8 | static_cast<uint8_t>(c);
  return value;
}
const Encodings& encodings() {
  static const Encodings all = [] {
    Encodings found;
    for (char32_t code = 0; code < 0x110000; ++code) {
      if (code >= 0xD800 && code <= 0xDFFF) continue;
      std::string bytes;
      append_utf8(bytes, code);
      found.characters.insert(packed(bytes));
      for (size_t n = 1; n < bytes.size(); ++n) found.beginnings.insert(packed(bytes.substr(0, n)));
    }
    return found;
  }();
  return all;
}

// The definition: an ill-formed part is as long as it still begins a character, and at least one byte.
std::string readable_by_definition(std::string_view bytes) {
  std::string out;
  while (!bytes.empty()) {
    size_t length = 1;
    while (length < bytes.size() && encodings().beginnings.contains(packed(bytes.substr(0, length))))
      ++length;
    const bool whole = encodings().characters.contains(packed(bytes.substr(0, length)));
    // The last byte looked at is part of a character, of an unfinished one at the end, or of what follows.
    const bool unfinished = encodings().beginnings.contains(packed(bytes.substr(0, length)));
    if (!whole && !unfinished && length > 1) --length;
    out += whole ? bytes.substr(0, length) : "\uFFFD";
    bytes.remove_prefix(length);
  }
  return out;
}

RC_GTEST_PROP(Utf8, AnyBytesAsTheDefinitionSays, ()) {
  const std::string bytes = *testing::any_bytes();
  RC_ASSERT(readable(bytes) == readable_by_definition(bytes));
}

RC_GTEST_PROP(Utf8, WellFormedTextStays, ()) {
  const std::string text = *testing::mixed_text();
  RC_ASSERT(readable(text) == text);
}

}  // namespace
}  // namespace kl
