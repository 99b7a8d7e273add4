// UTF-8 out of bytes that may be anything: one character at a time, and whole texts made readable.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace kl {

struct Utf8Char {
  enum class Kind : uint8_t {
    well_formed,
    ill_formed,  // no character begins like this
    unfinished,  // the bytes end inside a character that was well-formed so far
  };
  char32_t code;   // U+FFFD unless well_formed
  uint8_t length;  // in bytes; of ill-formed bytes the maximal subpart (Unicode 3.9, U+FFFD substitution)
  Kind kind;
};

// The character at `p`, which is before `end`.
inline Utf8Char utf8_char(const char* p, const char* end) {
  using Kind = Utf8Char::Kind;
  constexpr char32_t kReplacement = 0xFFFD;
  const auto lead = static_cast<uint8_t>(*p);
  if (lead < 0x80) return {lead, 1, Kind::well_formed};
  int length;
  uint8_t low = 0x80, high = 0xBF;  // bounds of the next byte; only the second one's differ (no overlong
                                    // forms, no surrogates, nothing above U+10FFFF)
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if ((lead & 0xF0) == 0xE0) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {kReplacement, 1, Kind::ill_formed};
  }
  char32_t code = lead & (0x7Fu >> length);
  for (int i = 1; i < length; ++i) {
    if (p + i == end) return {kReplacement, static_cast<uint8_t>(i), Kind::unfinished};
    const auto byte = static_cast<uint8_t>(p[i]);
    if (byte < low || byte > high) return {kReplacement, static_cast<uint8_t>(i), Kind::ill_formed};
    code = code << 6 | (byte & 0x3Fu);
    low = 0x80, high = 0xBF;
  }
  return {code, static_cast<uint8_t>(length), Kind::well_formed};
}

// Appends `bytes` to `out` with one U+FFFD for each maximal ill-formed subpart, which is what Python's
// bytes.decode("utf-8", "replace") gives. Returns how many bytes were used: all with `final`; otherwise an
// unfinished character at the end (at most 3 bytes) is left for the next call.
size_t append_readable(std::string& out, std::string_view bytes, bool final);

// Appends one code point, which is not a surrogate and at most U+10FFFF.
void append_utf8(std::string& out, char32_t code);

}  // namespace kl
