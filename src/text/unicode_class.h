// What the split pattern needs to know of each code point, as one byte. The knowledge itself is PCRE2's: this
// file only asks it once and remembers the answers.
#pragma once

#include <cstdint>

namespace kl {

enum UnicodeClass : uint8_t {
  kHan = 1,           // \p{sc:Han}
  kUpperLike = 2,     // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]
  kLowerLike = 4,     // [\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]
  kNumber = 8,        // \p{N}
  kSpace = 16,        // \s: White_Space
  kNewline = 32,      // [\r\n]
  kSymbol = 64,       // [^\s\p{L}\p{N}], which includes marks (\p{M})
  kPythonSpace = 128  // str.isspace(): White_Space and U+001C..U+001F
};

// UnicodeClass bits of the code points 0 .. U+10FFFF. Made at the first call (some 15 ms), safe from any
// thread.
const uint8_t* unicode_classes();

}  // namespace kl
