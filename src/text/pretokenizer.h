// Cuts text into pre-tokens, the pieces inside which byte pairs are merged. Kimi's pattern, alternatives
// tried in this order, leftmost first, greedy with backtracking:
//
//   1  [\p{Han}]+
//   2  [^\r\n\p{L}\p{N}]? U* L+ (?i:'s|'t|'re|'ve|'m|'ll|'d)?      U =
//   [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]] 3  [^\r\n\p{L}\p{N}]? U+ L* (?i:'s|'t|'re|'ve|'m|'ll|'d)? L =
//   [\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]] 4  \p{N}{1,3} 5  [ ]?[^\s\p{L}\p{N}]+[\r\n]* 6  \s*[\r\n]+ 7
//   \s+(?!\S) 8  \s+
//
// Every character begins a match of one of them, so the pre-tokens joined are the text. The pattern is walked
// by hand over a table of classes; the tests compare it with PCRE2's matches of the pattern. PCRE2 itself was
// tried: its compiled code ends with a stack error in a word of 25,000 letters unless the pattern is bent,
// and bent and at its best it cuts prose at 100 MB/s where this does 260 (Zen 5); ill-formed bytes it
// refuses. Bytes that are not UTF-8 are cut as if each maximal ill-formed subpart were U+FFFD (a symbol).
#pragma once

#include <cstdint>

#include "text/utf8.h"

namespace kl {

class Pretokenizer {
 public:
  Pretokenizer();

  // Where the pre-token that begins at `p` ends. [p, end) is the rest of the text and not empty.
  const char* pretoken_end(const char* p, const char* end) const;

 private:
  struct Char {
    uint8_t classes;  // UnicodeClass bits; 0 only at the end of the text
    uint8_t length;   // in bytes
  };
  Char at(const char* p, const char* end) const;
  const char* run_end(const char* p, const char* end, uint8_t classes) const;
  const char* word_end(const char* p, const char* end) const;
  const char* capitals_end(const char* p, const char* end) const;
  const char* number_end(const char* p, const char* end) const;
  const char* space_end(const char* p, const char* end) const;

  const uint8_t* classes_;
};

}  // namespace kl
