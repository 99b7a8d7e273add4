#include "text/pretokenizer.h"

#include "text/unicode_class.h"

namespace kl {
namespace {

// (?i:'s|'t|'re|'ve|'m|'ll|'d)? at `p`; in Unicode, ſ (U+017F) is an s too.
const char* contraction_end(const char* p, const char* end) {
  if (end - p < 2 || *p != '\'') return p;
  const auto lower = [](char c) { return static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c); };
  const char first = lower(p[1]), second = end - p > 2 ? lower(p[2]) : '\0';
  switch (first) {
    case 's':
    case 't':
    case 'm':
    case 'd': return p + 2;
    case 'r':
    case 'v': return second == 'e' ? p + 3 : p;
    case 'l': return second == 'l' ? p + 3 : p;
    case '\xC5': return second == '\xBF' ? p + 3 : p;
    default: return p;
  }
}

}  // namespace

Pretokenizer::Pretokenizer() : classes_(unicode_classes()) {}

inline Pretokenizer::Char Pretokenizer::at(const char* p, const char* end) const {
  if (p == end) return {0, 0};
  const auto byte = static_cast<uint8_t>(*p);
  if (byte < 0x80) return {classes_[byte], 1};
  const Utf8Char c = utf8_char(p, end);
  return {classes_[c.code], c.length};
}

inline const char* Pretokenizer::run_end(const char* p, const char* end, uint8_t classes) const {
  for (Char c = at(p, end); c.classes & classes; c = at(p, end)) p += c.length;
  return p;
}

// U* L+ and the contraction; null if there is no match. U* takes all it can; if no L follows it gives
// characters back until the last one that is in L as well.
inline const char* Pretokenizer::word_end(const char* p, const char* end) const {
  const char* after_last_both = nullptr;
  Char c = at(p, end);
  for (; c.classes & kUpperLike; c = at(p, end)) {
    p += c.length;
    if (c.classes & kLowerLike) after_last_both = p;
  }
  if (c.classes & kLowerLike) return contraction_end(run_end(p + c.length, end, kLowerLike), end);
  return after_last_both ? contraction_end(after_last_both, end) : nullptr;
}

// U+ L* and the contraction where word_end found none: then L* is empty.
inline const char* Pretokenizer::capitals_end(const char* p, const char* end) const {
  const char* const last = run_end(p, end, kUpperLike);
  return last == p ? nullptr : contraction_end(last, end);
}

const char* Pretokenizer::number_end(const char* p, const char* end) const {
  for (int i = 0; i < 3; ++i) {
    const Char c = at(p, end);
    if (!(c.classes & kNumber)) break;
    p += c.length;
  }
  return p;
}

// Rules 6 to 8.
const char* Pretokenizer::space_end(const char* p, const char* end) const {
  const char* after_last_newline = nullptr;
  const char* last = p;  // the last space of the run
  const char* q = p;
  for (Char c = at(q, end); c.classes & kSpace; c = at(q, end)) {
    last = q;
    q += c.length;
    if (c.classes & kNewline) after_last_newline = q;
  }
  if (after_last_newline) return after_last_newline;
  return q == end || last == p ? q : last;
}

const char* Pretokenizer::pretoken_end(const char* p, const char* end) const {
  const Char c = at(p, end);
  const char* const next = p + c.length;
  if (c.classes & kHan) return run_end(next, end, kHan);
  if (c.classes & kNumber) return number_end(p, end);
  const bool letter = c.classes & (kUpperLike | kLowerLike), mark = letter && (c.classes & kSymbol);
  if (letter && !mark) {
    const char* word = word_end(p, end);
    return word ? word : capitals_end(p, end);
  }
  if (!(c.classes & kNewline)) {  // a symbol or space before a word belongs to it
    if (const char* word = word_end(next, end)) return word;
    if (mark) return word_end(p, end);  // a mark is a letter too, so this matches
    if (const char* capitals = capitals_end(next, end)) return capitals;
  }
  if (c.classes & kSymbol) return run_end(run_end(next, end, kSymbol), end, kNewline);
  if (*p == ' ') {
    const char* const symbols = run_end(next, end, kSymbol);
    if (symbols != next) return run_end(symbols, end, kNewline);
  }
  return space_end(p, end);
}

}  // namespace kl
