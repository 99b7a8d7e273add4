#include "text/pretokenizer.h"

#include <memory>

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "text/test_text.h"
#include "text/unicode_class.h"

namespace kl {
namespace {

std::vector<std::string> pretokens(std::string_view text) {
  static const Pretokenizer pretokenizer;
  std::vector<std::string> found;
  for (const char *p = text.data(), *end = p + text.size(); p < end;) {
    const char* const next = pretokenizer.pretoken_end(p, end);
    found.emplace_back(p, next);
    p = next;
  }
  return found;
}

// The pattern itself, matched by PCRE2: \s is written \p{White_Space}, \p{Han} \p{sc:Han} and && a lookahead.
std::vector<std::string> pretokens_by_pattern(const std::string& text) {
  static const std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code = [] {
    const std::string prefix = R"([^\r\n\p{L}\p{N}]?)";
    const std::string upper = R"((?:(?!\p{sc:Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]))";
    const std::string lower = R"((?:(?!\p{sc:Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}]))";
    const std::string contraction = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?";
    const std::string pattern =
        R"([\p{sc:Han}]+|)" + prefix + upper + "*" + lower + "+" + contraction + "|" + prefix + upper + "+" +
        lower + "*" + contraction +
        R"(|\p{N}{1,3}| ?[^\p{White_Space}\p{L}\p{N}]+[\r\n]*|\p{White_Space}*[\r\n]+)"
        R"(|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+)";
    int error = 0;
    size_t offset = 0;
    std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> compiled(
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP,
                      &error, &offset, nullptr),
        pcre2_code_free);
    KL_CHECK(compiled, "the pattern does not compile: ", error, " at ", offset);
    pcre2_jit_compile(compiled.get(), PCRE2_JIT_COMPLETE);
    return compiled;
  }();
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code.get(), nullptr), pcre2_match_data_free);
  const size_t* range = pcre2_get_ovector_pointer(match.get());
  std::vector<std::string> found;
  for (size_t at = 0; at < text.size(); at = range[1]) {
    const int result = pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                   PCRE2_ANCHORED, match.get(), nullptr);
    KL_CHECK(result > 0, "the pattern does not match at ", at, ": ", result);
    found.push_back(text.substr(at, range[1] - at));
  }
  return found;
}

using Pieces = std::vector<std::string>;

TEST(Pretokenizer, KnownPretokens) {
  EXPECT_EQ(pretokens("漢 字々〇"), (Pieces{"漢", " ", "字々〇"}));
  EXPECT_EQ(pretokens("fooBarHTTPServer"), (Pieces{"foo", "Bar", "HTTPServer"}));
  EXPECT_EQ(pretokens("あA"), (Pieces{"あ", "A"}));
  EXPECT_EQ(pretokens("DON'T it'ſ"), (Pieces{"DON'T", " it'ſ"}));
  EXPECT_EQ(pretokens("a/b//\n/c"), (Pieces{"a", "/b", "//\n", "/c"}));
  EXPECT_EQ(pretokens("12345"), (Pieces{"123", "45"}));
  EXPECT_EQ(pretokens(" x\n\n  y"), (Pieces{" x", "\n\n", " ", " y"}));
  EXPECT_EQ(pretokens(""), Pieces{});
}

TEST(Pretokenizer, EveryAlternative) {
  EXPECT_EQ(pretokens("漢字かな漢"), (Pieces{"漢字", "かな", "漢"}));  // 1, and && in 2
  EXPECT_EQ(pretokens("HTTPServer's"), (Pieces{"HTTPServer's"}));      // 2
  EXPECT_EQ(pretokens("\tword"), (Pieces{"\tword"}));                  // 2 with a space other than ' '
  EXPECT_EQ(pretokens("(HTTP)"), (Pieces{"(HTTP", ")"}));              // 3
  EXPECT_EQ(pretokens("AあB"), (Pieces{"Aあ", "B"}));                  // 2: U* gives B back, L+ is あ
  EXPECT_EQ(pretokens("x\u0301y"), (Pieces{"x\u0301y"}));
  EXPECT_EQ(pretokens("\u0301\u0301"), (Pieces{"\u0301\u0301"}));
  EXPECT_EQ(pretokens("1〇23"), (Pieces{"1〇2", "3"}));                              // 4 takes Han numbers
  EXPECT_EQ(pretokens("a  !?\r\n\r\n b"), (Pieces{"a", " ", " !?\r\n\r\n", " b"}));  // 5
  EXPECT_EQ(pretokens("!\u0301"), (Pieces{"!\u0301"}));                              // 2 before 5
  EXPECT_EQ(pretokens("a \n \n b"), (Pieces{"a", " \n \n", " b"}));                  // 6
  EXPECT_EQ(pretokens("a   b"), (Pieces{"a", "  ", " b"}));                          // 7
  EXPECT_EQ(pretokens("a   "), (Pieces{"a", "   "}));                                // 7 at the end
  EXPECT_EQ(pretokens("\u20031"), (Pieces{"\u2003", "1"}));                          // 8
  EXPECT_EQ(pretokens("\u180E1"), (Pieces{"\u180E", "1"}));                          // not a space
  EXPECT_EQ(pretokens(" \u180E"), (Pieces{" \u180E"}));                              // but a symbol
}

TEST(Pretokenizer, Contractions) {
  for (const char* c :
       {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'vE", "'M", "'Ll", "'D", "'ſ"})
    EXPECT_EQ(pretokens(cat("we", c, "!")), (Pieces{cat("we", c), "!"}));
  EXPECT_EQ(pretokens("we'x"), (Pieces{"we", "'x"}));
  EXPECT_EQ(pretokens("we'l"), (Pieces{"we", "'l"}));
  EXPECT_EQ(pretokens("we'r"), (Pieces{"we", "'r"}));
  EXPECT_EQ(pretokens("we'"), (Pieces{"we", "'"}));
  EXPECT_EQ(pretokens("we'sh"), (Pieces{"we's", "h"}));
}

TEST(Pretokenizer, IllFormedBytesAreCutLikeReplacementCharacters) {
  EXPECT_EQ(pretokens("a\xFF\xFE b"), (Pieces{"a", "\xFF\xFE", " b"}));
  EXPECT_EQ(pretokens("\xE2\x82zz"), (Pieces{"\xE2\x82zz"}));
  EXPECT_EQ(pretokens("a\xE2\x82"), (Pieces{"a", "\xE2\x82"}));
}

// Each character alone, doubled, and beside one of every kind.
TEST(Pretokenizer, EveryCodePointAsThePatternSays) {
  for (char32_t code = 0; code < 0x110000; ++code) {
    const bool scripts = code < 0x32400 || (code >= 0xE0000 && code < 0xE0200);
    if ((code >= 0xD800 && code <= 0xDFFF) || (!scripts && code % 251 != 0)) continue;
    std::string c;
    append_utf8(c, code);
    const std::string text =
        c + "a" + c + "A" + c + c + " " + c + "1" + c + "!" + c + "\n" + "漢" + c + "あ" + c;
    ASSERT_EQ(pretokens(text), pretokens_by_pattern(text)) << "U+" << std::hex << static_cast<uint32_t>(code);
  }
}

RC_GTEST_PROP(Pretokenizer, MixedTextAsThePatternSays, ()) {
  const std::string text = *rc::gen::scale(3.0, testing::mixed_text());
  RC_ASSERT(pretokens(text) == pretokens_by_pattern(text));
}

RC_GTEST_PROP(Pretokenizer, AnyBytesAsTheirReplacementSays, ()) {
  const std::string bytes = *testing::any_bytes();
  std::string shown;
  append_readable(shown, bytes, true);
  std::string joined;
  Pieces readable;
  for (const std::string& piece : pretokens(bytes)) {
    joined += piece;
    append_readable(readable.emplace_back(), piece, true);
  }
  RC_ASSERT(joined == bytes);
  RC_ASSERT(readable == pretokens_by_pattern(shown));
}

TEST(UnicodeClass, PythonSpaces) {
  std::vector<char32_t> found;
  for (char32_t code = 0; code < 0x110000; ++code)
    if (unicode_classes()[code] & kPythonSpace) found.push_back(code);
  EXPECT_EQ(found, (std::vector<char32_t>{0x9,    0xA,    0xB,    0xC,    0xD,    0x1C,   0x1D,   0x1E,
                                          0x1F,   0x20,   0x85,   0xA0,   0x1680, 0x2000, 0x2001, 0x2002,
                                          0x2003, 0x2004, 0x2005, 0x2006, 0x2007, 0x2008, 0x2009, 0x200A,
                                          0x2028, 0x2029, 0x202F, 0x205F, 0x3000}));
}

}  // namespace
}  // namespace kl
