#include "text/unicode_class.h"

#include <memory>
#include <string>
#include <vector>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/check.h"
#include "text/utf8.h"

namespace kl {
namespace {

constexpr char32_t kCodePoints = 0x110000;

std::string every_character() {
  std::string text;
  text.reserve(4382592);
  for (char32_t code = 0; code < kCodePoints; ++code) {
    if (code < 0xD800 || code > 0xDFFF) append_utf8(text, code);
  }
  return text;
}

// Calls found(group, run) for every match of `pattern` in `text`, group being the capture that took part.
template <class F>
void for_each_run(const char* pattern, const std::string& text, F&& found) {
  int error = 0;
  size_t offset = 0;
  const std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                    &error, &offset, nullptr),
      pcre2_code_free);
  KL_CHECK(code, "PCRE2 refused the pattern ", pattern, " at ", offset, " with error ", error);
  // Without JIT (a machine that forbids it) the same answers take some 50 ms.
  (void)pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code.get(), nullptr), pcre2_match_data_free);
  KL_CHECK(match, "PCRE2: no memory for a match");
  const size_t* range = pcre2_get_ovector_pointer(match.get());
  for (size_t at = 0;;) {
    const int groups = pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                   PCRE2_NO_UTF_CHECK, match.get(), nullptr);
    if (groups == PCRE2_ERROR_NOMATCH) return;
    KL_CHECK(groups > 0, "PCRE2 failed with error ", groups, " on the pattern ", pattern);
    found(groups - 1, std::string_view(text).substr(range[0], range[1] - range[0]));
    at = range[1];
  }
}

std::vector<uint8_t> ask_pcre2() {
  const std::string text = every_character();
  std::vector<uint8_t> classes(kCodePoints, kSymbol);
  const auto for_each_code = [](std::string_view run, auto&& f) {
    for (const char *p = run.data(), *end = p + run.size(); p < end;) {
      const Utf8Char c = utf8_char(p, end);
      f(c.code);
      p += c.length;
    }
  };
  // The general categories partition the code points. Every White_Space character is Z or Cc, so that the
  // last two alternatives cannot run over one. \s of PCRE2 is something else than White_Space (it has
  // U+180E).
  constexpr const char* kCategories =
      R"((\p{White_Space}+)|([\p{Lu}\p{Lt}]+)|(\p{Ll}+)|([\p{Lm}\p{Lo}]+)|(\p{M}+)|(\p{N}+)|\p{Cc}|[\p{Cf}\p{Co}\p{Cn}\p{P}\p{S}]+)";
  constexpr uint8_t kOfGroup[] = {kSymbol,    kSpace | kPythonSpace,   kUpperLike,
                                  kLowerLike, kUpperLike | kLowerLike, kUpperLike | kLowerLike | kSymbol,
                                  kNumber};
  for_each_run(kCategories, text, [&](int group, std::string_view run) {
    if (group > 0) for_each_code(run, [&](char32_t code) { classes[code] = kOfGroup[group]; });
  });
  // The script itself: \p{Han} would be its extensions, which hold punctuation such as U+3002.
  for_each_run(R"(\p{sc:Han}+)", text, [&](int, std::string_view run) {
    for_each_code(run, [&](char32_t code) {
      classes[code] = static_cast<uint8_t>((classes[code] & ~(kUpperLike | kLowerLike)) | kHan);
    });
  });
  for (const char c : {'\r', '\n'}) classes[static_cast<uint8_t>(c)] |= kNewline;
  for (char32_t code = 0x1C; code <= 0x1F; ++code) classes[code] |= kPythonSpace;
  return classes;
}

}  // namespace

const uint8_t* unicode_classes() {
  static const std::vector<uint8_t> classes = ask_pcre2();
  return classes.data();
}

}  // namespace kl
